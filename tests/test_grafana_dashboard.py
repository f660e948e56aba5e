"""The Grafana dashboard asks for nothing that a server does not tell."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest, parser
from scripted_client import ScriptedClient

from lightvllm.server.metrics import Metrics
from lightvllm.server.observed import ObservedEngine

DASHBOARD = Path(__file__).parent.parent / "manifests" / "monitoring" / "grafana-dashboard.json"
METRIC = re.compile(r"\b((?:vllm|lightvllm):\w+|(?:http|process)_\w+)(?:\{([^}]*)\})?")
ADDED_BY_PROMETHEUS = {"instance", "job"}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def queries() -> Iterator[tuple[str, str]]:
    """Of each panel and variable: its title and what it asks."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]


def scraped() -> dict[str, set[str]]:
    """The labels of each series that a server tells after a request."""
    client, metrics = ScriptedClient(), Metrics()
    engine = ObservedEngine(client, metrics)

    async def request() -> None:
        async for _ in engine.generate([1]):
            pass

    asyncio.run(request())
    client.set(total_steps=1)
    metrics.answered("GET", "/", 200, 0.1)
    told: dict[str, set[str]] = {}
    for family in parser.text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
    return told


def test_every_metric_and_label_exists() -> None:
    told, asked = scraped(), set()
    for title, query in queries():
        found = METRIC.findall(query)
        assert found, f"{title}: {query}"
        for name, selector in found:
            assert name in told, f"{title} asks for {name}"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= told[name] | ADDED_BY_PROMETHEUS, f"{title}: {name} has no {labels - told[name]}"
            asked.add(name)
        by = {each.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for each in group.split(",")}
        assert all(by <= told[name] | ADDED_BY_PROMETHEUS for name, _ in found), f"{title}: {by}"
    assert len(asked) > 25


def test_a_metric_that_is_not_there_would_be_found() -> None:
    assert METRIC.findall('rate(vllm:no_such_thing_total{a="b"}[5m])') == [("vllm:no_such_thing_total", 'a="b"')]


def test_it_can_be_imported_anywhere() -> None:
    board = dashboard()
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "model", "instance"}
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps(board))
    assert set(sources) == {"${datasource}", "lightvllm"}
    for title, query in queries():
        for opening, closing in ("()", "[]", "{}"):
            assert query.count(opening) == query.count(closing), f"{title}: {query}"
        if "label_values" not in query:
            assert "$instance" in query, f"{title} would mix up servers"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_it_shows_what_matters() -> None:
    titles = " | ".join(panel["title"] for panel in dashboard()["panels"]).lower()
    for what in (
        "time to first token", "time per output token", "end to end", "throughput", "queue time", "kv cache in use",
        "prefix cache hit rate", "preemptions", "rank health", "executor overhead", "http answers by status",
    ):  # fmt: skip
        assert what in titles

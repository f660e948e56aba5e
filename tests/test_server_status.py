"""The status page's figures and files, as a program asks for them; ``test_server_status_page.py`` looks at the page."""

from __future__ import annotations

import asyncio
import json
import re
import time
from importlib import resources
from typing import Any

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from scripted_client import ScriptedClient
from served_app import served

from lightvllm.server import status
from lightvllm.server.app import create_app
from lightvllm.server.settings import ServerSettings
from lightvllm.version import __version__


def settings(**given: Any) -> ServerSettings:
    return ServerSettings(**given)


def first_event(url: str, **options: Any) -> dict[str, Any]:
    with httpx.stream("GET", f"{url}/status/events", timeout=10, **options) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return next_event(answer.iter_lines())


def next_event(lines: Any) -> dict[str, Any]:
    line = next(line for line in lines if line)
    assert line.startswith("data: ")
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return event


def test_status_json() -> None:
    client = ScriptedClient(tp=2)
    app = create_app(client, settings(served_model_names=("name", "alias")))
    client.set(num_running=3, kv_cache_usage=0.5, total_generation_tokens=9)
    app.state.metrics.failed("r-1", "WorkerDied: once")
    app.state.metrics.failed("r-2", "WorkerDied: once")
    app.state.metrics.failed("", "later")
    answer = TestClient(app).get("/status.json")
    assert answer.headers["cache-control"] == "no-store"
    got = answer.json()
    assert (got["version"], got["model"], got["phase"], got["reason"]) == (__version__, "name", "ready", None)
    assert abs(got["time"] - time.time()) < 60
    assert got["engine"] == {
        "executor": "k8s",
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 1,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "start_seconds": 1.5,
    }
    assert [(rank["rank"], rank["health"], rank["device"]) for rank in got["ranks"]] == [
        (0, "ready", "cuda:0"),
        (1, "ready", "cuda:1"),
    ]
    assert (got["stats"]["num_running"], got["stats"]["total_generation_tokens"]) == (3, 9)
    assert [(error["message"], error["count"], error["request_id"]) for error in got["errors"]] == [
        ("later", 1, ""),
        ("WorkerDied: once", 2, "r-2"),
    ]
    client.kill(1)
    got = TestClient(app).get("/status.json").json()
    assert (got["phase"], got["ranks"][1]["health"], got["ranks"][1]["reason"]) == (
        "failed",
        "dead",
        "killed by SIGKILL",
    )
    assert got["reason"].startswith("the engine has failed")


def test_while_the_model_loads_there_are_no_figures_of_the_engine() -> None:
    app = create_app(None, settings())
    app.state.lifecycle.progress = "placing"
    got = TestClient(app).get("/status.json").json()
    assert (got["phase"], got["engine"], got["stats"], got["ranks"]) == ("starting", None, None, [])
    assert got["reason"] == "the model is being loaded: placing"


def test_the_files_of_the_page_are_served_and_packaged() -> None:
    client = TestClient(create_app(None, settings()))
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "{{" not in page.text
    linked = set(re.findall(r'(?:href|src)="(static/[^"]+)"', page.text))
    assert linked == {"static/status.js", "static/status.css", "static/icon.svg"}
    for answer in (page, *(client.get(f"/{each}") for each in linked)):
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", answer.text), "nothing from elsewhere"
        assert not re.search(r"\son\w+=|style=", answer.text.split("<script")[0]), "nothing that the policy forbids"
    files = {entry.name for entry in resources.files("lightvllm.server").joinpath("static").iterdir()}
    assert files == {each.removeprefix("static/") for each in linked} | {"status.html", "docs.html", "docs.js"}
    for name in ("../app.py", "%2e%2e%2fapp.py", "status.html", "app.py", ""):
        assert client.get(f"/static/{name}").status_code == 404


def test_links_hold_below_a_root_path() -> None:
    app = create_app(None, settings(root_path="/a&b"))
    page = TestClient(app).get("/a&b/").text
    assert 'src="/a&amp;b/static/status.js"' in page
    assert 'data-root="/a&amp;b/"' in page


def test_figures_need_a_key_where_there_is_one_and_the_page_does_not() -> None:
    with served(create_app(ScriptedClient(), settings(api_keys=("secret",)))) as server:
        for path, code in {"/": 200, "/static/status.js": 200, "/status.json": 401, "/status/events": 401}.items():
            assert httpx.get(server.url + path).status_code == code
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{server.url}/status.json", headers=key).status_code == 200
        assert first_event(server.url, headers=key)["phase"] == "ready"


def test_events_tell_a_change_at_once_and_numbers_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "EVENT_SECONDS", 30.0)
    monkeypatch.setattr(status, "LOOK_SECONDS", 0.01)
    client = ScriptedClient(tp=2)
    with served(create_app(client, settings())) as server, httpx.stream("GET", f"{server.url}/status/events") as answer:
        lines = answer.iter_lines()
        assert next_event(lines)["phase"] == "ready"
        client.set(total_generation_tokens=5)  # no event, or the next one would still say ready
        server.call(lambda: client.kill(1))
        event = next_event(lines)
        assert (event["phase"], event["stats"]["total_generation_tokens"]) == ("failed", 5)
        monkeypatch.setattr(status, "EVENT_SECONDS", 0.05)
        client.set(total_generation_tokens=6)
        assert next_event(lines)["stats"]["total_generation_tokens"] == 6


def test_events_end_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LOOK_SECONDS", 0.01)
    client = ScriptedClient()
    app = create_app(client, settings())
    with served(app) as server, httpx.stream("GET", f"{server.url}/status/events") as answer:
        lines = answer.iter_lines()
        next_event(lines)
        server.call(app.state.lifecycle.stop)
        assert next_event(lines)["phase"] == "stopping"
        server.call(client.shutdown)
        assert not [line for line in list(lines)[1:] if not line.startswith("data: ") and line]
    assert app.state.status_listeners == 0


def test_so_many_pages_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "MAX_LISTENERS", 2)
    with served(create_app(ScriptedClient(), settings())) as server:
        url = f"{server.url}/status/events"
        with httpx.stream("GET", url) as one, httpx.stream("GET", url) as two:
            lines = [each.iter_lines() for each in (one, two)]  # held: an iterator that is dropped closes its stream
            for each in lines:
                next_event(each)
            refused = httpx.get(url)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_pages")
            assert refused.headers["retry-after"] == "10"


def test_pages_that_come_at_once_are_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """All have been let in before the first of them is counted."""
    monkeypatch.setattr(status, "MAX_LISTENERS", 2)
    state = create_app(ScriptedClient(), settings()).state

    async def come() -> list[bool]:
        streams = [status._events(state) for _ in range(4)]
        begun = [await anext(stream, None) is not None for stream in streams]
        assert state.status_listeners == 2
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        return begun

    assert asyncio.run(come()) == [True, True, False, False]
    assert state.status_listeners == 0


def test_it_is_described() -> None:
    described = TestClient(create_app(None, settings())).get("/openapi.json").json()["paths"]
    assert "/status.json" in described
    assert not {"/", "/static/{name}", "/status/events", "/metrics"} & set(described)

"""Each HTTP request is counted by its route and leaves one line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from scripted_client import ScriptedClient
from served_app import served
from starlette.testclient import TestClient
from waiting import wait_until

from lightvllm import logs
from lightvllm.server.access import Access
from lightvllm.server.app import create_app
from lightvllm.server.logging import HttpRequest, http_request, log_answer
from lightvllm.server.metrics import Metrics
from lightvllm.server.settings import ServerSettings


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """What the access log has said, as JSON."""
    told: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(json.loads(logs.JsonFormatter().format(record)))

    caplog.set_level(logging.INFO, "lightvllm")
    logger, handler = logging.getLogger("lightvllm.access"), Keep()
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def app_of(**settings: Any) -> FastAPI:
    app = create_app(ScriptedClient(), ServerSettings(**settings))

    @app.get("/items/{item}")
    async def item(item: str) -> str:
        if item == "broken":
            raise RuntimeError("a defect")
        return item

    @app.post("/generate")
    async def generate() -> int:
        total = 0
        for _ in range(2):
            async for output in app.state.engine.generate([1, 2, 3], request_id="e", output_kind="delta"):
                total += len(output.outputs[0].token_ids)
        return total

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def numbers() -> AsyncIterator[str]:
            while True:
                yield "number\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(numbers())

    return app


def counted(app: FastAPI) -> dict[str, float]:
    (family,) = [each for each in app.state.metrics.collect() if each.name == "http_requests"]
    return {
        " ".join(sample.labels[k] for k in ("method", "handler", "status")): sample.value for sample in family.samples
    }


def test_a_line_and_a_count_for_each_request(lines: list[dict[str, Any]]) -> None:
    app = app_of()
    client = TestClient(app, raise_server_exceptions=False)
    client.get("/items/1", headers={"X-Request-Id": "mine"})
    client.get("/items/2?secret=query")
    client.get("/items/broken")
    client.get("/no/such/path")
    client.request("BREW", "/items/1")
    client.post("/generate")
    assert counted(app) == {
        "GET /items/{item} 200": 2,
        "GET /items/{item} 500": 1,
        "GET none 404": 1,
        "other /items/{item} 405": 1,
        "POST /generate 200": 1,
    }
    assert [(line["method"], line["path"], line["status"], line["level"]) for line in lines] == [
        ("GET", "/items/1", 200, "info"),
        ("GET", "/items/2", 200, "info"),
        ("GET", "/items/broken", 500, "warning"),
        ("GET", "/no/such/path", 404, "info"),
        ("other", "/items/1", 405, "info"),
        ("POST", "/generate", 200, "info"),
    ]
    assert lines[0]["request_id"] == "mine"
    assert all(line["request_id"] and line["seconds"] >= 0 and line["client"] == "testclient" for line in lines)
    assert "secret" not in json.dumps(lines)
    assert (lines[-1]["model"], lines[-1]["prompt_tokens"], lines[-1]["generated_tokens"]) == ("tiny", 6, 8)
    assert "model" not in lines[0]
    assert http_request.get() is None


def test_a_client_that_leaves_is_499(lines: list[dict[str, Any]]) -> None:
    app = app_of()
    with served(app) as server:
        with httpx.stream("GET", f"{server.url}/endless") as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())
        wait_until(lambda: lines, "the server notices")
    assert counted(app) == {"GET /endless 499": 1}
    assert (lines[0]["status"], lines[0]["path"]) == (499, "/endless")


def test_probes_are_quiet_unless_they_fail(lines: list[dict[str, Any]]) -> None:
    app = app_of()
    client = TestClient(app)
    for path in ("/health", "/metrics", "/live"):
        client.get(path)
    assert not lines
    app.state.lifecycle.stop()
    client.get("/health")
    assert [(line["path"], line["status"]) for line in lines] == [("/health", 503)]
    assert counted(app)["GET /health 200"] == 1
    lines.clear()
    TestClient(app_of(root_path="/llm")).get("/llm/health")
    assert not lines, "below a proxy's path too"


def test_without_request_log(lines: list[dict[str, Any]]) -> None:
    app = app_of(log_requests=False)
    TestClient(app).get("/items/1")
    assert not lines
    assert counted(app) == {"GET /items/{item} 200": 1}


def test_what_is_not_http_passes() -> None:
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Access(inner)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_a_path_cannot_forge_lines(lines: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    log_answer(HttpRequest("r"), "GET", "/a\r\n12:00:00 INFO forged\x1b[31m é", 404, 0.1)
    assert lines[0]["path"] == "/a%0D%0A12:00:00%20INFO%20forged%1B%5B31m%20%C3%A9"
    assert "\n" not in caplog.records[-1].getMessage()


def test_metrics_of_requests_are_not_kept_by_what_clients_make_up() -> None:
    app = app_of()
    client = TestClient(app)
    for number in range(50):
        client.get(f"/made/up/{number}")
        client.request(f"METHOD{number}", "/x")
    assert set(counted(app)) == {"GET none 404", "other none 404"}
    assert isinstance(app.state.metrics, Metrics)

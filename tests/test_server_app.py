"""The application: probes in every phase, the gate before the API, and a description that is true."""

from __future__ import annotations

import asyncio
from typing import Annotated

import httpx2 as httpx
import msgspec
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from scripted_client import ScriptedClient
from served_app import served

from lightvllm.engine.protocol import EngineClient
from lightvllm.errors import RpcTimeout
from lightvllm.server.app import attach_engine, create_app, in_flight
from lightvllm.server.settings import ServerSettings
from lightvllm.version import __version__


def app_of(client: ScriptedClient | None, **settings: object) -> FastAPI:
    app = create_app(client, ServerSettings(**settings))  # type: ignore[arg-type]

    @app.get("/v1/gated")
    async def gated(engine: Annotated[EngineClient, Depends(in_flight)]) -> int:
        return app.state.lifecycle.num_in_flight

    return app


def test_starting():
    app = app_of(None)
    client = TestClient(app)
    app.state.lifecycle.progress = "loading weights: 1 of 2 ranks done"
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")
    assert answer.json()["reason"] == "the model is being loaded: loading weights: 1 of 2 ranks done"
    assert client.get("/ping").status_code == 503
    assert client.get("/live").json() == {"status": "alive", "reason": None}
    refused = client.get("/v1/gated")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_starting")
    assert refused.headers["retry-after"] == "5"
    assert "loading weights" in refused.json()["error"]["message"]
    assert client.get("/metrics").status_code == 200
    attach_engine(app, ScriptedClient())
    assert client.get("/health").json() == {"status": "ready", "reason": None, "dead_ranks": []}
    assert client.get("/v1/gated").json() == 1
    assert app.state.lifecycle.num_in_flight == 0


def test_an_engine_that_says_it_starts_is_not_ready():
    client = TestClient(app_of(ScriptedClient(state="starting")))
    assert (client.get("/health").status_code, client.get("/v1/gated").status_code) == (503, 503)


def test_failed():
    engine = ScriptedClient(tp=2)
    client = TestClient(app_of(engine))
    assert client.get("/health").status_code == 200
    engine.kill(1)
    answer = client.get("/health")
    assert answer.status_code == 503
    assert (answer.json()["status"], answer.json()["dead_ranks"]) == ("failed", [1])
    assert "killed by SIGKILL" in answer.json()["reason"]
    assert client.get("/live").status_code == 503
    refused = client.get("/v1/gated")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
    assert "retry-after" not in refused.headers, "it will not come back"


def test_a_dead_rank_is_enough():
    engine = ScriptedClient(tp=2)
    engine.ranks[0] = msgspec.structs.replace(engine.ranks[0], health="dead", reason="out of memory")
    answer = TestClient(app_of(engine)).get("/health")
    assert (answer.status_code, answer.json()["reason"]) == (
        503,
        "the engine has failed: rank 0 is dead: out of memory",
    )


def test_stopping():
    app = app_of(ScriptedClient())
    client = TestClient(app)
    app.state.lifecycle.stop()
    assert client.get("/health").json()["status"] == "stopping"
    assert client.get("/health").status_code == 503
    assert client.get("/live").status_code == 200, "a restart would cut off what is being finished"
    assert client.get("/v1/gated").json()["error"]["code"] == "shutting_down"


def test_deep_health_asks_the_workers_once_for_all_who_ask():
    engine = ScriptedClient()
    asked, gate = 0, asyncio.Event()

    async def check_health() -> None:
        nonlocal asked
        asked += 1
        await gate.wait()
        if asked == 2:
            raise RpcTimeout("rank 1 did not answer")

    engine.check_health = check_health  # type: ignore[method-assign]
    app = app_of(engine)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            asking = [asyncio.create_task(client.get("/health?deep=true")) for _ in range(10)]
            while not asked:
                await asyncio.sleep(0)
            assert (await client.get("/health")).status_code == 200, "the cheap one does not wait"
            gate.set()
            return [*(await asyncio.gather(*asking)), await client.get("/health?deep=true")]

    *first, last = asyncio.run(ask())
    assert [answer.status_code for answer in first] == [200] * 10
    assert asked == 2
    assert last.status_code == 503
    assert last.json()["reason"] == "the workers do not answer: rank 1 did not answer"


def test_version_and_load():
    engine = ScriptedClient()
    client = TestClient(app_of(engine))
    assert client.get("/version").json() == {"version": __version__}
    engine.set(num_running=3, num_waiting=2, kv_cache_usage=0.25)
    load = client.get("/load").json()
    assert (load["server_load"], load["num_running"], load["num_waiting"], load["kv_cache_usage"]) == (0, 3, 2, 0.25)
    assert load["uptime_seconds"] >= 0


def test_the_description_is_true_of_what_middlewares_answer():
    schema = TestClient(app_of(ScriptedClient(), api_keys=("k",))).get("/openapi.json").json()
    gated, health = schema["paths"]["/v1/gated"]["get"], schema["paths"]["/health"]["get"]
    assert gated["security"] == [{"ApiKey": []}]
    assert "security" not in health
    assert {"200", "401", "404", "429", "500", "503"} <= gated["responses"].keys()
    assert "Retry-After" in gated["responses"]["429"]["headers"]
    assert "422" not in health["responses"]
    assert "400" in health["responses"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert all("X-Request-Id" in answer["headers"] for answer in gated["responses"].values())
    operations = [o["operationId"] for path in schema["paths"].values() for o in path.values()]
    assert len(operations) == len(set(operations))


def test_no_docs():
    client = TestClient(app_of(ScriptedClient(), docs=False))
    assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/redoc")] == [404] * 3
    assert TestClient(app_of(ScriptedClient())).get("/docs").status_code == 200


def test_below_a_proxys_path():
    client = TestClient(app_of(ScriptedClient(), root_path="/llm", api_keys=("k",)))
    for path in ("/health", "/llm/health"):
        assert client.get(path).status_code == 200
    for path in ("/v1/gated", "/llm/v1/gated", "/llm/version", "/llmhealth"):
        assert client.get(path).status_code == 401, path
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]


@pytest.mark.parametrize("path", ["/health", "/live", "/ping"])
def test_probes_by_head(path):
    engine = ScriptedClient(state="ready")
    with served(app_of(engine)) as server:
        answer = httpx.head(f"{server.url}{path}")
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["cache-control"] == "no-store"
        engine.state, engine.failure = "failed", "it broke"
        answer = httpx.head(f"{server.url}{path}")
        assert (answer.status_code, answer.content) == (503, b"")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "POST", "BREW"])
def test_any_method_is_answered(method):
    answer = TestClient(app_of(ScriptedClient())).request(method, "/version")
    assert answer.status_code == (200 if method == "GET" else 405)

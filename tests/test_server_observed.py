"""An engine that is watched: outputs pass unchanged, and every request is counted by how it ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_client import ScriptedClient

from lightvllm.errors import ConfigError, QueueFull, WorkerDied
from lightvllm.server.logging import HttpRequest, http_request
from lightvllm.server.metrics import Metrics
from lightvllm.server.observed import ObservedEngine


def ended(metrics: Metrics) -> dict[str, int]:
    return {ending: count for ending, count in metrics.requests.endings.items() if count}


async def outputs_of(engine: Any, **options: Any) -> list[Any]:
    return [output async for output in engine.generate([1, 2, 3], **options)]


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final"])
def test_it_is_the_engine_to_those_who_use_it(kind: str) -> None:
    client = ScriptedClient(tp=2)
    engine = ObservedEngine(client, Metrics())

    def plain(outputs: list[Any]) -> list[Any]:
        return [(o.request_id, o.prompt_token_ids, [c.token_ids for c in o.outputs], o.finished) for o in outputs]

    options = {"request_id": "r", "output_kind": kind}
    assert plain(asyncio.run(outputs_of(engine, **options))) == plain(asyncio.run(outputs_of(client, **options)))
    for name in ("info", "state", "failure", "ranks", "stats"):
        assert getattr(engine, name) == getattr(client, name)
    heard: list[str] = []
    end = engine.on_change(lambda: heard.append("change"))
    client.set(num_running=1)
    end()
    client.set(num_running=2)
    assert heard == ["change"]
    asyncio.run(engine.check_health())
    asyncio.run(engine.shutdown())
    assert client.state == engine.state == "stopped"


def test_requests_that_fail_are_counted_by_how() -> None:
    client, metrics = ScriptedClient(), Metrics()
    engine = ObservedEngine(client, metrics)

    def fails(error: Exception, after: int = 0) -> None:
        client.error, client.error_after = error, after
        with pytest.raises(type(error)):
            asyncio.run(outputs_of(engine, request_id="r-1"))

    fails(ConfigError("the prompt is too long"))
    fails(QueueFull("too many", retry_after=1.0))
    assert metrics.requests.rejections == 1
    assert not ended(metrics), "neither was ever a request of the engine"
    assert not metrics.errors
    fails(WorkerDied("w", "killed by SIGKILL", 1), after=1)
    fails(WorkerDied("w", "killed by SIGKILL", 1))
    assert ended(metrics) == {"error": 2}
    assert metrics.requests.e2e.count == 0
    assert metrics.requests.first_token.count == 1, "what was before the failure stays"
    (error,) = metrics.errors
    assert (error.request_id, error.count) == ("r-1", 2)
    assert error.message == "worker w (rank 1) died: killed by SIGKILL"
    fails(RuntimeError("a defect"))
    assert metrics.errors[-1].message == "RuntimeError: a defect"


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_client_that_goes_away_is_an_abort(how: str) -> None:
    client, metrics = ScriptedClient(), Metrics()
    engine = ObservedEngine(client, metrics)

    async def main() -> None:
        client.gate = asyncio.Event()
        outputs = engine.generate([1], output_kind="delta")
        await anext(outputs)
        if how == "close":
            await outputs.aclose()
            return
        task = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert ended(metrics) == {"abort": 1}
    assert metrics.requests.e2e.count == 0
    assert not metrics.errors


def test_one_that_nobody_began_to_read_is_none() -> None:
    metrics = Metrics()

    async def main() -> None:
        await ObservedEngine(ScriptedClient(), metrics).generate([1]).aclose()

    asyncio.run(main())
    assert not ended(metrics)


def test_embeddings_are_requests_too() -> None:
    client, metrics = ScriptedClient(), Metrics()
    engine = ObservedEngine(client, metrics)
    asyncio.run(engine.embed([1, 2, 3]))
    assert ended(metrics) == {"stop": 1}
    assert (metrics.requests.prompt_tokens.total, metrics.requests.e2e.count) == (3, 1)
    assert metrics.requests.generation_tokens.count == 0
    client.error = QueueFull("too many")
    with pytest.raises(QueueFull):
        asyncio.run(engine.embed([1]))
    assert metrics.requests.rejections == 1


def test_the_http_request_is_told_what_it_cost() -> None:
    engine = ObservedEngine(ScriptedClient(), Metrics("served-name"))
    request = HttpRequest("r")

    async def main() -> None:
        http_request.set(request)
        mine = engine.generate([1, 2, 3])
        http_request.set(HttpRequest("another"))  # it counts who asked, not who reads
        async for _ in mine:
            pass
        http_request.set(request)
        await engine.embed([1, 2])

    asyncio.run(main())
    assert (request.model, request.prompt_tokens, request.generated_tokens) == ("served-name", 5, 4)
    assert request.first_token_seconds is not None

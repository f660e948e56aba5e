"""``benchmarks/serve.py``: its load is bounded and whole, and it sees what it is there to see. The last test is a load
test of a tiny model's server, short."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT

pytest.importorskip("aiohttp", reason="the server extra is not installed")

from aiohttp import web

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def drawn(count: int = 12) -> list[Any]:
    from serve_load import draw

    return draw(count, vocab=500, prompt_tokens=(2, 9), new_tokens=(10, 30), seed=1)


def tokens_of(body: dict[str, Any]) -> list[int]:
    """What the fake says: the request's own tokens, or what follows from its prompt."""
    own = [int(token) for token in body.get("logit_bias", {})]
    return [
        own[at % len(own)] if own else (body["prompt"][0] * 7 + body["seed"] + at * at) % 500
        for at in range(body["max_tokens"])
    ]


Send = Callable[..., Awaitable[None]]


async def proper(send: Send, body: dict[str, Any]) -> None:
    await asyncio.sleep(0.01)
    tokens = tokens_of(body)
    for at, token in enumerate(tokens):
        await send([token], "length" if at == len(tokens) - 1 else None)
    await send(usage=len(tokens))
    await send(done=True)


@asynccontextmanager
async def serving(script: Callable[[Send, dict[str, Any]], Awaitable[None]], active: list[int]) -> AsyncIterator[str]:
    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        active.append(active[-1] + 1)
        identity = f"cmpl-{len(active)}"

        async def send(
            tokens: list[int] | None = None,
            reason: str | None = None,
            usage: int | None = None,
            done: bool = False,
            error: str | None = None,
            identity: str = identity,
        ) -> None:
            event: dict[str, Any] = {"id": identity, "choices": []}
            if tokens is not None:
                event["choices"] = [{"index": 0, "text": "x", "token_ids": tokens, "finish_reason": reason}]
            if error is not None:
                event = {"error": {"message": error}}
            if usage is not None:
                event["usage"] = {"prompt_tokens": 1, "completion_tokens": usage, "total_tokens": 1 + usage}
            await response.write(b"data: " + (b"[DONE]" if done else json.dumps(event).encode()) + b"\n\n")

        try:
            await script(send, body)
        finally:
            active.append(active[-1] - 1)
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def run(
    script: Callable[[Send, dict[str, Any]], Awaitable[None]] = proper, works: list[Any] | None = None, **options: Any
) -> tuple[list[Any], list[int]]:
    from serve_load import load

    active = [0]

    async def main() -> list[Any]:
        async with serving(script, active) as url:
            return await load(url, "tiny", works or drawn(), **{"concurrency": 4, "timeout": LIMIT, **options})

    return asyncio.run(main()), active


def references(works: list[Any]) -> dict[int, list[int]]:
    return {work.number: tokens_of(work.body("tiny", True)) for work in works}


def test_a_load_of_whole_streams() -> None:
    from serve_load import judge
    from serve_report import figures

    works = drawn()
    streams, active = run(requests=30)
    assert len(streams) == 30
    assert max(active) == 4
    verdict = judge(streams, references(works))
    assert verdict.good
    assert (verdict.done, verdict.compared, verdict.unlike, verdict.vanished) == (30, 30, [], 0)
    row = figures(streams)
    assert row["tokens"] == sum(stream.work.max_tokens for stream in streams)
    assert 0 < row["ttft_p50"] <= row["ttft_p99"] <= row["e2e_p99"]
    assert row["itl_p50"] <= row["itl_p90"] <= row["itl_p99"]


def test_the_pool_has_three_kinds_and_is_the_same_again() -> None:
    works = drawn(300)
    assert works == drawn(300)
    assert all(2 <= len(work.prompt) <= 9 and 10 <= work.max_tokens <= 30 for work in works)
    assert sum(work.max_tokens for work in works) / 300 < 20  # many short ones
    assert [work.temperature for work in works[:3]] == [0.0, 0.8, 0.8]
    marked = [work.own for work in works if work.own]
    assert len(marked) == 100
    assert all(len(own) == 4 for own in marked)
    assert not marked[0] & marked[1]
    assert len({tuple(work.prompt) for work in works if len(work.prompt) > 4}) > 100


def test_load_ends_with_its_time() -> None:
    async def slow(send: Send, body: dict[str, Any]) -> None:
        await asyncio.sleep(0.05)
        await proper(send, body)

    streams, _ = run(slow, seconds=0.3)
    assert 4 <= len(streams) <= 4 * 8
    assert all(stream.outcome == "done" for stream in streams)


def test_clients_vanish_in_the_middle_and_the_server_sees_it() -> None:
    from serve_load import judge

    async def paced(send: Send, body: dict[str, Any]) -> None:
        for at, token in enumerate(tokens_of(body)):
            await send([token], "length" if at + 1 == body["max_tokens"] else None)
            await asyncio.sleep(0.002)
        await send(usage=body["max_tokens"])
        await send(done=True)

    streams, active = run(paced, requests=40, vanishing=0.5, seed=3)
    verdict = judge(streams, references(drawn()))
    assert verdict.good
    assert verdict.vanished + verdict.done == 40
    assert 10 <= verdict.vanished <= 30
    assert active[-1] == 0
    assert all(len(stream.arrivals) < stream.work.max_tokens for stream in streams if stream.outcome == "vanished")


@pytest.mark.parametrize("url", ["http://10.0.0.1:8000", "http://example.com", "http://[2001:db8::1]:80", "8000"])
def test_only_loopback_is_loaded(url: str) -> None:
    from serve_load import load

    with pytest.raises(ValueError, match="not on loopback"):
        asyncio.run(load(url, "tiny", drawn(), concurrency=1, requests=1))


def test_no_load_without_a_bound() -> None:
    from serve_load import load

    with pytest.raises(ValueError, match="without a bound"):
        asyncio.run(load("http://127.0.0.1:1", "tiny", drawn(), concurrency=1))


def only(wrong: Callable[[Send, dict[str, Any]], Awaitable[None]], works: list[Any], number: int) -> Any:
    """``wrong`` for one request, properly for the others."""

    async def script(send: Send, body: dict[str, Any]) -> None:
        await (wrong if body["prompt"] == works[number].prompt else proper)(send, body)

    return script


@pytest.mark.parametrize("fault", ["a token is missing", "no usage", "another finish reason"])
def test_a_stream_that_is_not_whole_is_lost(fault: str) -> None:
    from serve_load import judge

    async def wrong(send: Send, body: dict[str, Any]) -> None:
        tokens = tokens_of(body)[1 if fault == "a token is missing" else 0 :]
        for at, token in enumerate(tokens):
            last = "stop" if fault == "another finish reason" else "length"
            await send([token], last if at == len(tokens) - 1 else None)
        if fault != "no usage":
            await send(usage=len(tokens))
        await send(done=True)

    works = drawn()
    verdict = judge(run(only(wrong, works, 4), works, requests=12)[0], references(works))
    assert (len(verdict.lost), verdict.mixed, verdict.failed) == (1, [], [])
    assert verdict.lost[0].startswith("request 4: ")


@pytest.mark.parametrize("fault", ["ends", "breaks", "an error"])
def test_a_stream_that_breaks_off_has_failed(fault: str) -> None:
    from serve_load import judge

    async def wrong(send: Send, body: dict[str, Any]) -> None:
        await send(tokens_of(body)[:1])
        if fault == "an error":
            await send(error="the engine died")
        if fault == "breaks":
            raise ConnectionResetError

    works = drawn()
    streams, _ = run(only(wrong, works, 4), works, requests=12)
    verdict = judge(streams, references(works))
    assert (len(verdict.failed), verdict.lost, verdict.mixed, verdict.done) == (1, [], [], 11)


@pytest.mark.parametrize("number", [2, 5])
def test_one_strange_token_in_a_marked_stream_is_a_mix_up(number: int) -> None:
    from serve_load import judge

    async def wrong(send: Send, body: dict[str, Any]) -> None:
        tokens = tokens_of(body)
        tokens[5] = next(iter(works[8].own))
        for at, token in enumerate(tokens):
            await send([token], "length" if at == len(tokens) - 1 else None)
        await send(usage=len(tokens))
        await send(done=True)

    works = drawn()
    verdict = judge(run(only(wrong, works, number), works, requests=12)[0], {})
    assert len(verdict.mixed) == 1
    assert f"request {number}: tokens" in verdict.mixed[0]


def test_a_row_of_anothers_tokens_is_a_mix_up_and_other_tokens_are_not() -> None:
    from serve_load import judge

    works = drawn()
    expected = references(works)

    async def wrong(send: Send, body: dict[str, Any]) -> None:
        tokens = tokens_of(body)
        tokens[1:9] = expected[3][:8] if body["prompt"] == works[0].prompt else [7] * 8
        for at, token in enumerate(tokens):
            await send([token], "length" if at == len(tokens) - 1 else None)
        await send(usage=len(tokens))
        await send(done=True)

    async def both(send: Send, body: dict[str, Any]) -> None:
        await (wrong if body["prompt"] in (works[0].prompt, works[4].prompt) else proper)(send, body)

    verdict = judge(run(both, works, requests=12)[0], expected)
    assert len(verdict.mixed) == 1
    assert verdict.mixed[0] == "request 0: 8 tokens in a row are those of requests [3]"
    assert verdict.unlike == [pytest.approx(1 / works[4].max_tokens)]


def test_an_id_of_two_streams_is_a_mix_up() -> None:
    from serve_load import judge

    async def same(send: Send, body: dict[str, Any]) -> None:
        tokens = tokens_of(body)
        for at, token in enumerate(tokens):
            await send([token], "length" if at == len(tokens) - 1 else None, identity="cmpl-1")
        await send(usage=len(tokens), identity="cmpl-1")
        await send(done=True)

    verdict = judge(run(same, requests=3)[0], {})
    assert len(verdict.mixed) == 3


def test_memory_that_grows_is_seen() -> None:
    from serve_report import Sample, slope

    samples = [Sample(float(at), 100.0 + (at - 30 if at > 30 else 0) * 0.5, 10, 5, 2) for at in range(60)]
    assert slope(samples) == pytest.approx(30.0)
    assert slope(samples[:20]) == pytest.approx(0.0)


def test_this_process_is_sampled() -> None:
    from serve_report import sample

    now = sample(os.getpid())
    assert now.memory_mib > 10
    assert now.fds > 2
    assert now.threads >= 1
    assert now.processes >= 1


def test_percentiles() -> None:
    from serve_report import percentile

    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (50, 90, 99)] == [50.0, 90.0, 99.0]
    assert percentile([3.0], 50) == 3.0


@pytest.mark.slow
def test_a_short_load_test_of_a_tiny_model(tmp_path: Path) -> None:
    import tiny_llama

    folder = tmp_path / "model"
    folder.mkdir()
    tiny_llama.build(folder)
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "serve.py"), "load-test", str(folder), "--json", str(report)]
    command += ["--seconds", "15", "--concurrency", "50", "--pool", "60", "--threads", "1", "--max-num-seqs", "16"]
    command += ["--prompt-tokens", "4:40", "--new-tokens", "4:40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert told["leaks"] == []
    verdict = told["verdict"]
    assert (verdict["failed"], verdict["lost"], verdict["mixed"]) == ([], [], [])
    assert verdict["done"] >= 100
    assert verdict["vanished"] >= 5
    assert len(verdict["unlike"]) <= verdict["compared"] * 0.05

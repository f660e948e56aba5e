"""``RequestStream``: what a reader gets, whenever it reads."""

from __future__ import annotations

import asyncio

import pytest

from lightvllm.engine.core_messages import Delta
from lightvllm.engine.outputs import CompletionOutput, RequestMetrics
from lightvllm.engine.protocol import OutputKind
from lightvllm.engine.request_stream import RequestStream
from lightvllm.errors import Shutdown


def stream(kind: OutputKind, n: int = 1) -> RequestStream:
    return RequestStream("mine", "text", [1, 2], n, 10.0, kind)


def delta(text: str, index: int = 0, finished: bool = False, metrics: RequestMetrics | None = None) -> Delta:
    output = CompletionOutput(index, text, [len(text)], finish_reason="stop" if finished else None)
    return Delta(0, [output], finished, num_cached_tokens=3, metrics=metrics)


@pytest.mark.asyncio
async def test_deltas_that_were_not_taken_are_one() -> None:
    reading = stream("delta")
    reading.put(delta("a"))
    assert (await reading.next()).outputs[0].text == "a"
    reading.put(delta("b"))
    assert reading.put(delta("cc", finished=True)) == 1
    last = await reading.next()
    assert (last.outputs[0].text, last.outputs[0].token_ids, last.finished) == ("bcc", [1, 2], True)
    assert (last.request_id, last.prompt, last.prompt_token_ids, last.num_cached_tokens) == ("mine", "text", [1, 2], 3)
    assert reading.num_unfinished == 0


@pytest.mark.asyncio
async def test_cumulative_outputs_have_every_sequence() -> None:
    reading = stream("cumulative", n=2)
    reading.put(delta("a", index=1))
    first = await reading.next()
    reading.put(delta("b", index=1))
    second = await reading.next()
    assert [[o.text for o in output.outputs] for output in (first, second)] == [["", "a"], ["", "ab"]]
    assert first.outputs[1].token_ids == [1]


@pytest.mark.asyncio
async def test_a_final_output_comes_alone() -> None:
    reading = stream("final")
    waiting = asyncio.ensure_future(reading.next())
    await asyncio.sleep(0)
    reading.put(delta("a"))
    await asyncio.sleep(0)
    assert not waiting.done()
    reading.put(delta("b", finished=True))
    assert (await waiting).outputs[0].text == "ab"


@pytest.mark.asyncio
async def test_a_request_arrived_when_its_front_had_it() -> None:
    reading = stream("delta")
    reading.put(delta("a"))
    assert (await reading.next()).metrics == RequestMetrics(10.0)
    reading.put(delta("b", finished=True, metrics=RequestMetrics(11.0, finished_time=12.0)))
    assert (await reading.next()).metrics == RequestMetrics(10.0, finished_time=12.0)


@pytest.mark.asyncio
async def test_a_failure_comes_after_what_had_come() -> None:
    reading = stream("delta")
    reading.put(delta("a"))
    reading.fail(Shutdown("over"))
    assert (await reading.next()).outputs[0].text == "a"
    for _ in range(2):
        with pytest.raises(Shutdown, match="over"):
            await reading.next()


@pytest.mark.asyncio
async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    reading = stream("delta")
    waiting = asyncio.ensure_future(reading.next())
    await asyncio.sleep(0)
    reading.put(delta("a"))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (await reading.next()).outputs[0].text == "a"

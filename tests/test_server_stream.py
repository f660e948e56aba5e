"""Frames of server-sent events, and the HTTP answer that sends them: slow readers, late errors, leaving clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from lightvllm.errors import WorkerDied
from lightvllm.server.errors import ApiError
from lightvllm.server.params import AnswerHead
from lightvllm.server.stream import DONE, EventStream, Frames, encode

HEAD = AnswerHead(id='cmpl-"1"', model="org/tiny", system_fingerprint="fp", created=5)
FIELDS = {"id": 'cmpl-"1"', "object": "text_completion", "created": 5, "model": "org/tiny", "system_fingerprint": "fp"}


def decoded(frame: bytes) -> Any:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"}\n\n")
    assert frame.count(b"\n") == 2
    return json.loads(frame.removeprefix(b"data: "))


@pytest.mark.parametrize("text", ["x", 'a "quoted"\nline\r\n', "\u2028 東京 😀 \x00", "\\"])
def test_a_frame_is_one_line_of_json(text: str) -> None:
    frames = Frames(HEAD, "text_completion", usage=False)
    body = b',"text":' + encode(text)
    assert decoded(frames.choice(3, body)) == {**FIELDS, "choices": [{"index": 3, "text": text}]}


def test_usage_and_prompt_tokens_stand_beside_the_choices() -> None:
    with_usage, without = Frames(HEAD, "o", usage=True), Frames(HEAD, "o", usage=False)
    head = {**FIELDS, "object": "o"}
    choices = [{"index": 0, "text": "x"}]
    body = b',"text":"x"'
    assert decoded(with_usage.choice(0, body)) == {**head, "choices": choices, "usage": None}
    usage = {"prompt_tokens": 1}
    assert decoded(with_usage.choice(0, body, usage=usage)) == {**head, "choices": choices, "usage": usage}
    told = with_usage.choice(0, body, prompt_token_ids=[1, 2])
    assert decoded(told) == {**head, "choices": choices, "usage": None, "prompt_token_ids": [1, 2]}
    told = without.choice(0, body, prompt_token_ids=[1, 2])
    assert decoded(told) == {**head, "choices": choices, "prompt_token_ids": [1, 2]}
    assert decoded(with_usage.usage(usage)) == {**head, "choices": [], "usage": usage}


class Exchange:
    """An ASGI server's side of one answer.

    Attributes:
        body: what was sent.
        room: a sender waits for it, as for a client that reads slowly.
        left: set when the client goes.
    """

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.room = asyncio.Event()
        self.room.set()
        self.left = asyncio.Event()

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        await self.room.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


class Source:
    """A generator of frames that knows whether it was closed.

    Attributes:
        asked: how many frames were asked for.
    """

    def __init__(self, frames: list[bytes], error: Exception | None = None, *, endless: bool = False) -> None:
        self.closed = False
        self.asked = 0
        self._frames, self._error, self._endless = frames, error, endless

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for frame in self._frames:
                self.asked += 1
                yield frame
            if self._error is not None:
                raise self._error
            if self._endless:
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def send(exchange: Exchange, source: Source) -> None:
    rest = source()
    async with asyncio.timeout(20):
        await EventStream(await anext(rest), rest, "req")({"type": "http"}, exchange.receive, exchange.send)


def test_frames_are_sent_in_order_and_the_generator_is_closed() -> None:
    async def main() -> None:
        exchange, source = Exchange(), Source([b"1", b"2", DONE])
        await send(exchange, source)
        assert exchange.body == b"12" + DONE
        assert exchange.messages[0]["status"] == 200
        headers = dict(exchange.messages[0]["headers"])
        assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
        assert b"content-length" not in headers
        assert exchange.messages[-1]["more_body"] is False
        assert source.closed

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status_code"),
    [
        (ApiError(408, "too late", type="timeout_error", code="timeout"), "timeout"),
        (WorkerDied("w0", "killed by SIGKILL", 0), "engine_failed"),
        (KeyError("a defect"), "internal_error"),
    ],
)
def test_an_error_on_the_way_is_the_last_event(error: Exception, status_code: str) -> None:
    async def main() -> None:
        exchange, source = Exchange(), Source([b"1", b"2"], error)
        await send(exchange, source)
        told = decoded(exchange.body.removeprefix(b"12"))
        assert told["error"]["code"] == status_code
        assert "a defect" not in told["error"]["message"]
        assert exchange.messages[-1]["more_body"] is False
        assert source.closed

    asyncio.run(main())


def test_a_client_that_leaves_ends_the_generator_at_once() -> None:
    async def main() -> None:
        exchange, source = Exchange(), Source([b"1", b"2"], endless=True)
        answer = asyncio.create_task(send(exchange, source))
        while exchange.body != b"12":
            await asyncio.sleep(0)
        assert not source.closed
        exchange.left.set()
        await answer
        assert source.closed

    asyncio.run(main())


def test_a_client_that_reads_slowly_is_not_sent_ahead() -> None:
    async def main() -> None:
        exchange, source = Exchange(), Source([b"1", b"2", b"3", b"4"])
        exchange.room.clear()
        answer = asyncio.create_task(send(exchange, source))
        for _ in range(100):
            await asyncio.sleep(0)
        assert source.asked == 1
        exchange.room.set()
        await answer
        assert exchange.body == b"1234"

    asyncio.run(main())


def test_a_cancelled_answer_closes_the_generator() -> None:
    async def main() -> None:
        exchange, source = Exchange(), Source([b"1"], endless=True)
        answer = asyncio.create_task(send(exchange, source))
        while exchange.body != b"1":
            await asyncio.sleep(0)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        assert source.closed

    asyncio.run(main())

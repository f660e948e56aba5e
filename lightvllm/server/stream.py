"""Server-sent events as OpenAI's streams write them, made for speed: what does not change is encoded once per stream.

A frame is ``data: `` and one line of JSON and an empty line. ``Frames`` puts a choice between a head and a tail that
are ready; only its text passes through a JSON encoder. ``EventStream`` is the HTTP answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightvllm.server.errors import as_api_error
from lightvllm.server.params import AnswerHead

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode


class Frames:
    """The chunks of one stream.

    Args:
        object_name: ``"chat.completion.chunk"`` or ``"text_completion"``.
        usage: with ``include_usage``, chunks say that theirs is null and the last one tells it.
    """

    def __init__(self, head: AnswerHead, object_name: str, *, usage: bool) -> None:
        fields = {
            "id": head.id,
            "object": object_name,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
        }
        self._fields = encode(fields)[1:-1]
        self._head = b"data: {" + self._fields + b',"choices":[{"index":'
        self._null_usage = b'"usage":null' if usage else b""
        self._tail = b"}]," + self._null_usage + b"}\n\n" if usage else b"}]}\n\n"

    def choice(
        self, index: int, body: bytes, *, usage: dict[str, Any] | None = None, prompt_token_ids: list[int] | None = None
    ) -> bytes:
        """A chunk with one choice; ``body`` is what follows its index: ``,"delta":{…},"finish_reason":null``."""
        if usage is None and prompt_token_ids is None:
            return b"%s%d%s%s" % (self._head, index, body, self._tail)
        rest = [self._null_usage] if usage is None else [b'"usage":' + encode(usage)]
        if prompt_token_ids is not None:
            rest.append(b'"prompt_token_ids":' + encode(prompt_token_ids))
        return b"%s%d%s}],%s}\n\n" % (self._head, index, body, b",".join(filter(None, rest)))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices that ends a stream with ``include_usage``."""
        return b"data: {" + self._fields + b',"choices":[],"usage":' + encode(usage) + b"}\n\n"


class EventStream(Response):
    """Sends frames as they come, and closes their generator in every case: at the end, on an error, and at once when
    the client goes.

    An error after the beginning is sent as a last frame, ``data: {"error": {…}}``, and no ``[DONE]`` follows it.

    Args:
        first: the first frame, made before the status is sent, so that what fails before it has a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], request_id: str | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for frames in self._rest:
                await send({"type": "http.response.body", "body": frames, "more_body": True})
        except Exception as error:  # noqa: BLE001  as_api_error logs what nobody expected
            body = encode(as_api_error(error, request_id=self._request_id).body())
            await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass

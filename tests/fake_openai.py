"""An OpenAI-compatible server that answers what a test wants, on loopback, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import web
from waiting import LIMIT

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class FakeOpenAI:
    """Says ``answer(body)``, word by word if it is to stream.

    Attributes:
        models: what ``/v1/models`` tells.
        requests: bodies of the chat completions that came, in order; ``headers`` the headers.
        handler: answers chat completions; assign another.
        active, most_active: requests that are being answered now, and that were at a time.
        ended: requests whose client went away before the end.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.models = ["tiny"]
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.handler: Handler = self.answers
        self.answer: Callable[[dict[str, Any]], str] = lambda body: f"you said {body['messages'][-1]['content']}"
        self.active = self.most_active = self.ended = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.url = self._do(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT)
        self._loop.close()

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LIMIT)

    async def _start(self) -> str:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return await self.handler(request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.ended += 1
            raise
        finally:
            self.active -= 1

    async def answers(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        text = self.answer(body)
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return web.json_response({"object": "chat.completion", "choices": [choice]})
        response = await begin_stream(request)
        for word in text.split(" "):
            await send(response, chunk(word if word == text.split(" ", 1)[0] else f" {word}"))
        await send(response, chunk(None, "stop"))
        await response.write(b"data: [DONE]\n\n")
        return response


async def begin_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


async def send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(data)}\n\n".encode())


def chunk(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def refusal(status: int, message: str, retry_after: str | None = None, **fields: Any) -> web.Response:
    """OpenAI's error object."""
    error = {"message": message, "type": "invalid_request_error", "code": None, "param": None, **fields}
    headers = {"X-Request-Id": "req-7"} | ({"Retry-After": retry_after} if retry_after is not None else {})
    return web.json_response({"error": error}, status=status, headers=headers)

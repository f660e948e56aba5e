"""Plain ASGI middlewares: the request's id, API keys, and how large and slow a body may be.

They see a request before FastAPI does, and answer in OpenAI's shape by themselves. From the outside in: ``RootPath``,
``RequestContext``, (CORS, Starlette's,) ``Authentication``, (``rate_limit.RateLimiter``,) ``RequestBodies``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightvllm import logs
from lightvllm.errors import Shutdown
from lightvllm.keys import ApiKeys
from lightvllm.server.errors import ApiError, as_api_error
from lightvllm.server.paths import is_open, route_path

logger = logging.getLogger(__name__)


class RootPath:
    """Says below which path a proxy serves the application, whether the proxy takes that off or not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = self._root_path
        await self.app(scope, receive, send)


class RequestContext:
    """Gives each request an id, and answers what nobody expected.

    A client's ``X-Request-Id`` is taken if it is at most 128 letters, digits and ``._:-`` (so that it cannot forge log
    lines or headers), otherwise one is made. It is at ``request.state.request_id``, in ``logs.request_id`` while the
    request is handled, and in the answer's header ``X-Request-Id``. Ids that clients choose need not be unique.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = logs.accepted_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        token = logs.request_id.set(request_id)
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("the client of request %s has left", request_id)
        except Exception as error:  # noqa: BLE001  as_api_error logs what is not expected
            answer = as_api_error(error, request_id=request_id)
            if not started:
                await answer.response()(scope, receive, send_with_id)
            # Otherwise the connection ends in the middle of the answer, by which a client can tell.
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or scope["app"].state.lifecycle.phase != "stopping":
                raise
            task.uncancel()  # it was uvicorn, which waits no longer for what is not the engine's
            if not started:
                await as_api_error(Shutdown("")).response()(scope, receive, send_with_id)
        finally:
            logs.request_id.reset(token)


class Authentication:
    """Lets requests pass that bring one of ``keys`` as ``Authorization: Bearer``, and all to open paths.

    ``scope["state"]["client"]`` says which key it was, without telling it: ``"key-1"``.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, *, metrics_without_key: bool = False) -> None:
        self.app = app
        self._keys = keys
        self._metrics_without_key = metrics_without_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(route_path(scope), metrics_without_key=self._metrics_without_key):
            await self.app(scope, receive, send)
            return
        authorization = Headers(scope=scope).get("authorization", "")
        number = self._keys.find(authorization)
        if number is None:
            what = "the API key is not valid" if authorization.partition(" ")[2] else "no API key was sent"
            answer = ApiError(
                401,
                f"{what}; send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await answer.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = f"key-{number}"
        await self.app(scope, receive, send)


class RequestBodies:
    """Takes in the whole body before the app sees the request: at most ``max_bytes``, within ``timeout`` seconds.

    What is announced as too large is refused before it is read. The app then gets the body as one message.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self.app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if "content-length" not in headers and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(headers, receive)
        except ApiError as error:
            # Not closing lets the client read the answer although it is still sending; what it sends is thrown away.
            # One that waits for "100 Continue" will not send it, and its next request would be taken for the body.
            if "expect" in headers:
                error.headers["Connection"] = "close"
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client has left
            return

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message: Message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self.app(scope, replay, send)

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        announced = headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._max_bytes):
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {self._timeout:g} s",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is longer than {self._max_bytes} bytes, the most allowed", code="request_too_large"
        )

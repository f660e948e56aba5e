"""Requests to an OpenAI-compatible server: what is tried again, how long is waited, and every failure as one of ours.

All of it runs in one asyncio loop. No exception of httpx2 leaves this module.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import msgspec

from lightvllm.errors import AuthError, ConfigError, LightvllmError, RpcTimeout, ServerError
from lightvllm.keys import is_sendable

RETRIED = (429, 503)
"""The server is busy, or not ready: it has done nothing, and may later."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0  # seconds between tries, where the server does not say


class _Body(msgspec.Struct):
    message: str = ""
    type: str | None = None
    code: str | int | None = None
    param: str | None = None


class _Error(msgspec.Struct):
    error: _Body | str


class _Again(Exception):
    """Nothing has been done, so that it may be tried again: after so many seconds, where the server says."""

    def __init__(self, error: LightvllmError, after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after = after


class Http:
    """A server's address, and the connections to it.

    Args:
        base_url: as OpenAI's clients take it; ``/v1`` is added where it has no path.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds in which a request is to be answered in full, further tries and streams included.
        connect_timeout: seconds for a connection.
        max_connections: at a time.
        max_retries: further tries after 429, 503, and where no connection came about.
        tls_ca: certificates of authorities in PEM, instead of the system's, for https.
        transport: instead of the network (tests).
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout: float,
        connect_timeout: float,
        max_connections: int,
        max_retries: int,
        tls_ca: str | None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        try:
            url = httpx2.URL(base_url)
        except (httpx2.InvalidURL, TypeError) as error:
            raise ConfigError(f"base_url={base_url!r} is no URL: {error}; use http://host:port/v1") from None
        if url.userinfo:
            raise ConfigError("base_url holds a name or a password; use http://host:port/v1, and api_key for the key")
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"base_url={base_url!r} is not usable; use http://host:port/v1")
        if api_key and not is_sendable(api_key):
            raise ConfigError("api_key cannot be sent in a header; use printable ASCII without spaces")
        self.url = url.copy_with(path="/v1") if url.path in ("", "/") else url
        self.timeout = timeout
        self._max_retries = max_retries
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            verify=_trusted(tls_ca) if tls_ca else True,
            timeout=httpx2.Timeout(None, connect=connect_timeout),
            limits=httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            transport=transport,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def request(self, method: str, path: str, body: Any = None) -> bytes:
        """The body of the answer. Raises ServerError, AuthError, RpcTimeout."""
        async with self._open(method, path, body) as response:
            return await response.aread()

    async def stream(self, path: str, body: Any, receive: Callable[[str], None]) -> None:
        """Hand each server-sent event's data to ``receive``, up to ``[DONE]``. What has begun is not tried again.

        Raises ServerError (also for an error amid the events, and where the end is missing), AuthError, RpcTimeout.
        """
        async with self._open("POST", path, body) as response:
            request_id = response.headers.get("x-request-id")
            async for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                if '"error"' in event.data[:16]:
                    raise _server_error(event.data.encode(), None, request_id, "the server broke off the stream")
                receive(event.data)
            raise ServerError(f"{self.url} broke off the stream: it ended without [DONE]", request_id=request_id)

    @asynccontextmanager
    async def _open(self, method: str, path: str, body: Any) -> AsyncIterator[httpx2.Response]:
        """A successful answer whose body is still to come; its time runs until the block ends."""
        deadline = time.monotonic() + self.timeout
        try:
            content = None if body is None else msgspec.json.encode(body)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the request is no JSON: {error}") from None
        try:
            async with asyncio.timeout(self.timeout):
                response = await self._try(method, path, content, deadline)
                try:
                    yield response
                finally:
                    await response.aclose()
        except TimeoutError:
            raise RpcTimeout(f"{self.url}: no complete answer in {self.timeout:g} s (timeout)") from None
        except httpx2.RequestError as error:
            raise ServerError(f"{self.url} broke off: {_said(error)}") from error

    async def _try(self, method: str, path: str, content: bytes | None, deadline: float) -> httpx2.Response:
        tried = 0
        while True:
            try:
                return await self._send(method, path, content)
            except _Again as again:
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**tried) * random.uniform(0.5, 1.0)  # noqa: S311  no secret
                wait = wait if again.after is None else again.after
                if tried == self._max_retries or time.monotonic() + wait > deadline:
                    raise again.error from again.__cause__
            tried += 1
            await asyncio.sleep(wait)

    async def _send(self, method: str, path: str, content: bytes | None) -> httpx2.Response:
        headers = {"Content-Type": "application/json"} if content is not None else None
        request = self._client.build_request(method, path, content=content, headers=headers)
        try:
            response = await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.RemoteProtocolError) as error:
            # The last: a kept connection that the server closed just then. It has not answered.
            raise _Again(ServerError(f"cannot reach {self.url}: {_said(error)}")) from error
        if response.is_success:
            return response
        try:
            body = await response.aread()
        finally:
            await response.aclose()
        what = f"{self.url}: {response.status_code} {response.reason_phrase}"
        refusal = _server_error(body, response.status_code, response.headers.get("x-request-id"), what)
        if response.status_code in (401, 403):
            raise AuthError(str(refusal))
        if response.status_code in RETRIED:
            raise _Again(refusal, _retry_after(response.headers.get("retry-after")))
        raise refusal


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _trusted(path: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"tls_ca={path!r} cannot be used: {error}") from None


def _server_error(body: bytes, status: int | None, request_id: str | None, what: str) -> ServerError:
    """OpenAI's error object, or whatever else the server has said, as ours."""
    try:
        error = msgspec.json.decode(body, type=_Error).error
        said = _Body(message=error) if isinstance(error, str) else error
    except msgspec.MsgspecError:
        said = _Body(message=body[:200].decode(errors="replace").strip())
    code = None if said.code is None else str(said.code)
    return ServerError(
        f"{what}: {said.message}" if said.message else what, status, said.type, code, said.param, request_id
    )


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3): a number of them, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None

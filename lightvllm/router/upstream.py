"""HTTP to the replicas: connections, TLS, the router's own key, and which headers pass in either direction."""

from __future__ import annotations

import io
import ssl
from types import SimpleNamespace, TracebackType
from typing import Any

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from lightvllm.router.replica import Replica
from lightvllm.router.settings import RouterSettings

SERVER = "lightvllm-router"  # aiohttp would tell its version and Python's

_ONE_PIECE = 1 << 20

_HOP_BY_HOP = {  # RFC 9110, section 7.6.1
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_NOT_UPSTREAM = _HOP_BY_HOP | {
    # The client's secrets are for the router, and what it says of its own address nobody has checked.
    *("authorization", "api-key", "x-api-key", "cookie"),
    *("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto", "x-real-ip"),
    # Of the client's own connection and transfer; aiohttp has decoded the body.
    *("host", "content-length", "content-encoding", "expect", "accept-encoding", "x-request-id"),
}
_NOT_DOWNSTREAM = _HOP_BY_HOP | {"content-length", "date", "server", "set-cookie", "x-request-id"}


class Upstream:
    """Connections to all replicas. Use with ``async with``.

    Args:
        settings: of the router.
        key: shown to replicas as ``Authorization: Bearer``.
        tls: trusts and proves what it says; True trusts the system's CAs.
    """

    def __init__(self, settings: RouterSettings, key: str | None = None, tls: ssl.SSLContext | bool = True) -> None:
        self._settings = settings
        self._own = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        settings = self._settings
        # aiohttp takes keepalive_timeout=0 for "keep them"; no connection is kept then.
        reuse: dict[str, Any] = (
            {"keepalive_timeout": settings.keepalive} if settings.keepalive else {"force_close": True}
        )
        self._session, self._fresh = self._open(**reuse), self._open(force_close=True)
        return self

    def _open(self, **options: Any) -> aiohttp.ClientSession:
        traces = aiohttp.TraceConfig()
        traces.on_connection_reuseconn.append(_mark_reused)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=5, ssl=self._tls, **options),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout),
            auto_decompress=False,
            trace_configs=[traces],
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in (self._session, self._fresh):
            if session is not None:
                await session.close()

    def headers(self, received: CIMultiDictProxy[str], peer: str, request_id: str) -> CIMultiDict[str]:
        """What a replica is sent: the client's headers without those that are not for it, and the router's own."""
        headers = _without(received, _NOT_UPSTREAM)
        headers.update(self._own)
        headers["X-Forwarded-For"] = peer
        headers["X-Request-Id"] = request_id
        return headers

    async def post(
        self, replica: Replica, path: str, content: bytes, headers: CIMultiDict[str]
    ) -> aiohttp.ClientResponse:
        """Send a request; the answer as soon as its headers are there, to be closed by the caller.

        A replica may close a kept connection in the moment in which it is used again. Who cannot know whether the
        request or that moment broke it sends the request once more, on a connection of its own.

        Args:
            path: with the query, encoded.
        """
        # aiohttp sends bytes in one piece, and warns of that for large ones.
        large, kept = len(content) >= _ONE_PIECE, SimpleNamespace(reused=False)
        try:
            return await self._request(
                self._session,
                "POST",
                replica,
                path,
                headers,
                data=io.BytesIO(content) if large else content,
                trace_request_ctx=kept,
            )
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not kept.reused:
                raise
        data = io.BytesIO(content) if large else content
        return await self._request(self._fresh, "POST", replica, path, headers, data=data)

    async def get(self, replica: Replica, path: str, timeout: float) -> tuple[int, bytes]:
        """Status and body, of at most 16 MiB. Raises aiohttp's errors, OSError and TimeoutError."""
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=self._settings.connect_timeout)
        answer = await self._request(self._session, "GET", replica, path, CIMultiDict(self._own), timeout=limit)
        try:
            return answer.status, await read_most(answer, 1 << 24)
        finally:
            answer.close() if not answer.content.at_eof() else answer.release()

    async def _request(
        self,
        session: aiohttp.ClientSession | None,
        method: str,
        replica: Replica,
        path: str,
        headers: CIMultiDict[str],
        **options: Any,
    ) -> aiohttp.ClientResponse:
        assert session is not None
        url = URL(replica.target.url + path, encoded=True)
        if host := replica.target.host:
            headers = CIMultiDict(headers)
            headers["Host"] = host if url.is_default_port() else f"{host}:{url.port}"
            options["server_hostname"] = host
        return await session.request(method, url, headers=headers, allow_redirects=False, **options)


async def read_most(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The body; ValueError if it is longer than ``most`` bytes."""
    body = bytearray()
    while chunk := await answer.content.readany():
        body += chunk
        if len(body) > most:
            raise ValueError(f"the answer is longer than {most} bytes")
    return bytes(body)


def downstream_headers(received: CIMultiDictProxy[str], request_id: str) -> CIMultiDict[str]:
    """What the client is sent of a replica's headers."""
    headers = _without(received, _NOT_DOWNSTREAM)
    headers["Server"] = SERVER
    headers["X-Request-Id"] = request_id
    return headers


def _without(received: CIMultiDictProxy[str], dropped: set[str]) -> CIMultiDict[str]:
    for connection in received.getall("Connection", ()):  # it may be there more than once
        dropped = dropped | {name.strip().lower() for name in connection.split(",")}
    return CIMultiDict((name, value) for name, value in received.items() if name.lower() not in dropped)


async def _mark_reused(session: aiohttp.ClientSession, context: Any, parameters: Any) -> None:
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.reused = True

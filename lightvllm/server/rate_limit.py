"""``RateLimiter``: so many requests per API key, or per client address where there are no keys.

The generic cell rate algorithm (ITU-T I.371; "virtual scheduling"): per client one number, the time at which its
bucket will be full again. Refused requests cost nothing. Memory is bounded: whoever has a full bucket can be forgotten
without a difference; beyond ``max_clients`` the client that came least recently is forgotten, which does it a favour.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightvllm.server.errors import ApiError
from lightvllm.server.paths import is_api, route_path
from lightvllm.server.settings import RateLimit


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one request.

    Attributes:
        allowed: whether it may pass; it has then been counted.
        remaining: requests that may follow at once.
        reset: seconds until the bucket is full again.
        retry_after: seconds until a refused request would pass; 0 if it was not refused.
    """

    allowed: bool
    remaining: int
    reset: float
    retry_after: float


class Buckets:
    """A bucket of ``limit.count`` requests for each client, filled evenly over ``limit.seconds``."""

    def __init__(self, limit: RateLimit, max_clients: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._max_clients = max_clients
        self._clock = clock
        self._interval = limit.seconds / limit.count  # in which one request is earned
        self._full_at: OrderedDict[str, float] = OrderedDict()  # by client, the least recent first

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str) -> Verdict:
        """One request of ``client``, now."""
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now)
        after = full_at + self._interval
        wait = after - now - self._limit.seconds
        # A sum of fractions of a second is not exact: a thousandth of a request is forgiven.
        if wait > self._interval / 1000:
            self._forget(now)
            return Verdict(False, 0, full_at - now, wait)
        self._full_at[client] = after
        self._full_at.move_to_end(client)
        self._forget(now)
        remaining = int((self._limit.seconds - (after - now)) / self._interval + 1e-3)
        return Verdict(True, remaining, after - now, 0.0)

    def _forget(self, now: float) -> None:
        # Two at a time, so that the memory also shrinks while clients come. The present client's is not full.
        for _ in range(2):
            client, full_at = next(iter(self._full_at.items()))
            if full_at > now and len(self._full_at) <= self._max_clients:
                return
            del self._full_at[client]


class RateLimiter:
    """Answers 429 with Retry-After, and tells all API requests how they stand by OpenAI's ``x-ratelimit-*`` headers."""

    def __init__(self, app: ASGIApp, limit: RateLimit, max_clients: int) -> None:
        self.app = app
        self._limit = limit
        self._buckets = Buckets(limit, max_clients)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_api(route_path(scope)):
            await self.app(scope, receive, send)
            return
        client = scope.get("state", {}).get("client") or _network(scope.get("client"))
        verdict = self._buckets.take(client)
        headers = {
            "x-ratelimit-limit-requests": str(self._limit.count),
            "x-ratelimit-remaining-requests": str(verdict.remaining),
            "x-ratelimit-reset-requests": f"{math.ceil(verdict.reset * 1000)}ms",
        }
        if not verdict.allowed:
            answer = ApiError(
                429,
                f"more than {self._limit.count} requests in {self._limit.seconds:g} s; "
                f"try again in {verdict.retry_after:.1f} s",
                code="rate_limit_exceeded",
                retry_after=verdict.retry_after,
                headers=headers,
            )
            await answer.response()(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _network(address: tuple[str, int] | None) -> str:
    """Whom an address belongs to: itself, or for IPv6 its /64, of which one host may use any address."""
    if address is None or not address[0]:
        return "local"  # a Unix socket
    host = address[0].partition("%")[0]
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:  # a test client's
        return host
    return host if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))

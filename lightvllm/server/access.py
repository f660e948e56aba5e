"""``Access``: the outermost middleware, which counts each HTTP request and writes its line in the log.

It is plain ASGI and passes every message on at once. The request's id is ``RequestContext``'s, within.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightvllm.server.logging import HttpRequest, http_request, log_answer
from lightvllm.server.metrics import Metrics

CLIENT_LEFT = 499
"""What log and metrics call the status of a request whose client did not wait for the end of the answer; nginx's."""

_QUIET = frozenset({"/health", "/live", "/ping", "/metrics", "/load"})  # asked for every few seconds by machines
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Access:
    """Counts requests in the application's ``state.metrics``, and logs them if ``log_requests``."""

    def __init__(self, app: ASGIApp, *, log_requests: bool = True) -> None:
        self.app = app
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status, complete = 0, False

        async def watched_send(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                complete = True

        headers = Headers(scope=scope)
        request = HttpRequest(traceparent=headers.get("traceparent", ""), tracestate=headers.get("tracestate", ""))
        token = http_request.set(request)
        left = CLIENT_LEFT
        try:
            await self.app(scope, receive, watched_send)
        except Exception:
            left = 500
            raise
        finally:
            http_request.reset(token)
            if not complete:
                status = left
            self._done(scope, request, status, time.monotonic() - started)

    def _done(self, scope: Scope, request: HttpRequest, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        # Templates only: what clients make up must not become a metric each.
        handler = getattr(scope.get("route"), "path", None) or "none"
        metrics: Metrics = scope["app"].state.metrics
        metrics.answered(method, handler, status, seconds)
        if self._log_requests:
            request.request_id = scope.get("state", {}).get("request_id", "")
            client = scope["client"][0] if scope.get("client") else ""
            log_answer(request, method, scope["path"], status, seconds, client, quiet=handler in _QUIET)

"""What the router itself answers: errors in OpenAI's shape, as answers and as the last event of a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from aiohttp import web

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer to the client that is no success.

    Args:
        status: the HTTP status.
        message: one line; what was got, what was expected, what to do.
        param: the field of the request that is wrong.
        code: what a program can tell the error by.
        retry_after: seconds after which it is worth trying again; sent as the header Retry-After, rounded up.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body(self) -> bytes:
        """OpenAI's error object, JSON in ASCII, without line breaks."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def event(self) -> bytes:
        """The same as a server-sent event."""
        return b"data: " + self.body() + b"\n\n"

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=self.headers)


def shutting_down() -> ApiError:
    return ApiError(503, "the router is shutting down; try again", code="shutting_down", retry_after=1)


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    """404, naming the known ones."""
    return ApiError(
        404,
        f"the model {name!r:.200} does not exist; known: {', '.join(known) or 'none yet'}",
        param="model",
        code="model_not_found",
    )

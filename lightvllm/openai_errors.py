"""``OpenAIError``: an error as OpenAI's API tells it, with its status and headers; one for the server and the router.

They add how their web framework answers with it. Any module may import this one; it imports nothing of lightvllm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
}


class OpenAIError(Exception):
    """An answer to the client that is no success.

    Args:
        status: the HTTP status.
        message: one line; what was got, what was expected, what to do.
        type: OpenAI's kind of error; None takes the one usual for the status.
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
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body(self) -> dict[str, Any]:
        """The error object, ready for JSON; also what a stream sends as its last event."""
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(self.message), "type": self.type, "param": param, "code": self.code}}

    def content(self) -> bytes:
        """``body`` as JSON in ASCII, without line breaks."""
        return json.dumps(self.body()).encode()


def _encodable(text: str) -> str:
    """Lone surrogates, which a client can send as an escape in JSON, have no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()

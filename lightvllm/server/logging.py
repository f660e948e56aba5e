"""The server's log: a line for each HTTP request, in place of uvicorn's, and uvicorn's own messages in our format.

``HttpRequest`` is what a request leaves behind for its line: ``Access`` makes one and calls ``log_answer`` at the end;
``ObservedEngine`` adds what the engine did for it. No prompt, no answer and no header is logged.
"""

from __future__ import annotations

import logging
import os
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import quote

from lightvllm import logs
from lightvllm.logs import LogFormat, LogLevel

access = logging.getLogger("lightvllm.access")

_IN_PATHS = "/:@-._~!$&'()*+,;=%"


@dataclass(slots=True)
class HttpRequest:
    """What the log and the traces say of one HTTP request.

    Attributes:
        request_id: its ``X-Request-Id``.
        traceparent, tracestate: as the client sent them (W3C Trace Context), else empty.
        model: the engine's, once it was asked.
        prompt_tokens, generated_tokens: of all requests of the engine that this one caused.
        first_token_seconds: of the first of them.
    """

    request_id: str = ""
    traceparent: str = ""
    tracestate: str = ""
    model: str | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: float | None = None

    def add(self, prompt_tokens: int, generated_tokens: int, first_token_seconds: float | None) -> None:
        """The engine has done this for it, besides what it did before."""
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens
        if self.first_token_seconds is None:
            self.first_token_seconds = first_token_seconds


http_request: ContextVar[HttpRequest | None] = ContextVar("http_request", default=None)
"""The HTTP request that is being answered; None outside one (``run-batch``)."""


def configure_logging(log_format: LogFormat = "text", level: LogLevel = "info") -> None:
    """As ``logs.configure``, with uvicorn's messages among ours and its access log off."""
    logs.configure(log_format, level)
    os.environ[logs.ENVIRONMENT] = f"{log_format}:{level}"  # for the engine's process and the workers
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        theirs = logging.getLogger(name)
        theirs.handlers.clear()
        theirs.propagate = name != "uvicorn.access"
    logging.getLogger("uvicorn").setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True


def log_answer(
    request: HttpRequest, method: str, path: str, status: int, seconds: float, client: str = "", *, quiet: bool = False
) -> None:
    """The line of one HTTP request that has been answered in full, or whose client has gone (status 499).

    Args:
        path: as the client sent it, without the query.
        seconds: from the request's head to the end of its answer.
        quiet: a success is worth no more than the level debug.
    """
    level = logging.WARNING if status >= 500 else logging.DEBUG if quiet and status < 400 else logging.INFO
    if not access.isEnabledFor(level):
        return
    extra: dict[str, object] = {"request_id": request.request_id, "client": client or None}
    if request.model is not None:
        extra |= {
            "model": request.model,
            "prompt_tokens": request.prompt_tokens,
            "generated_tokens": request.generated_tokens,
        }
        if request.first_token_seconds is not None:
            extra["first_token_seconds"] = round(request.first_token_seconds, 6)
    answer = {"method": method, "path": quote(path, safe=_IN_PATHS), "status": status, "seconds": round(seconds, 6)}
    access.log(level, "%(method)s %(path)s %(status)d in %(seconds).3f s", answer, extra=extra)

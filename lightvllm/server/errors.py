"""What goes wrong, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the right status.

``as_api_error`` turns any exception into an ``ApiError``, for handlers, streams and batches alike (``invalid_request``
a request that pydantic refuses); ``install`` has an app answer with it. Nothing of a traceback reaches a client: what
was not expected is logged with the request's id, and the client gets that id.

Status: 400 the request is wrong (FastAPI's 422 is not used, because OpenAI's clients do not know it) · 401 no valid
API key · 404 and 405 no such path, model or method · 408 the body did not come · 413 it is too large · 429 come again
later: a rate limit, or the engine's queue is full · 500 a defect of ours · 501 an extra is not installed · 503 there is
no engine to answer: it starts, has failed, or is being shut down. A full queue is no 503, because load balancers take
a replica out for 5xx answers, and the others would then have to carry its load as well.
"""

from __future__ import annotations

import http
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from lightvllm.errors import (
    AuthError,
    ConfigError,
    LightvllmError,
    MissingExtra,
    PlacementError,
    QueueFull,
    RpcTimeout,
    Shutdown,
    WorkerDied,
    WorkerError,
)
from lightvllm.openai_errors import OpenAIError

logger = logging.getLogger(__name__)

MAX_REPORTED_ERRORS = 3
"""Of one request body; a wrong list of a thousand messages is not told a thousand times."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str = Field(description="One line that a user can act on.")
    type: str = Field(description="The kind of error, such as invalid_request_error.")
    param: str | None = Field(description="The field of the request that is wrong, such as messages[0].role.")
    code: str | None = Field(description="What a program can tell the error by, such as model_not_found.")


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorDetail


class ApiError(OpenAIError):
    """An answer of FastAPI's that is no success."""

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def as_api_error(error: BaseException, *, request_id: str | None = None) -> ApiError:
    """What a client is told of ``error``; logs it if nobody expected it.

    Args:
        request_id: named in the log and in the message of an unexpected error.
    """
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return _from_http(error)
        case MissingExtra():
            return ApiError(501, str(error), code="missing_extra")
        case ConfigError():
            return ApiError(400, str(error))
        case QueueFull():
            return ApiError(
                429, str(error), type="overloaded_error", code="engine_overloaded", retry_after=error.retry_after
            )
        case Shutdown():
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=1)
        case WorkerDied() | WorkerError() | RpcTimeout() | PlacementError() | AuthError():
            return ApiError(503, f"the engine has failed: {error}", code="engine_failed")
    where = f" (request {request_id})" if request_id else ""
    logger.error("unexpected error%s", where, exc_info=error)
    kind = "engine error" if isinstance(error, LightvllmError) else "internal error"
    return ApiError(500, f"{kind}{where}; the server's log has the details", code="internal_error")


def invalid_request(error: ValidationError) -> ApiError:
    """What a client is told whose request is no valid ``BaseModel``; for requests that FastAPI has not checked."""
    return _invalid(error.errors(include_url=False, include_context=False))


def install(app: FastAPI) -> None:
    """Have ``app`` answer with OpenAI's error object whatever is expected to be raised while it handles a request.

    The rest goes through to ``middleware.RequestContext``, which does the same for it.
    """

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error, request_id=getattr(request.state, "request_id", None)).response()

    for kind in (ApiError, RequestValidationError, HTTPException, LightvllmError):
        app.add_exception_handler(kind, handle)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses=``: these statuses answer with ``ErrorResponse``."""
    return {
        status: {"model": ErrorResponse, "description": http.HTTPStatus(status).phrase} for status in sorted(statuses)
    }


def _from_http(error: HTTPException) -> ApiError:
    headers = dict(error.headers or {})
    if error.status_code == 404 and error.detail == "Not Found":
        return ApiError(
            404, "there is no such path; the page /docs, where it is on, lists all", code="not_found", headers=headers
        )
    if error.status_code == 405:
        allowed = headers.get("Allow") or headers.get("allow")
        advice = f"; use {allowed}" if allowed else ""
        return ApiError(405, f"this path does not know the method{advice}", code="method_not_allowed", headers=headers)
    if error.__cause__ is not None and error.status_code == 400:  # FastAPI could not read the body
        return ApiError(400, "the body is no valid JSON text in UTF-8", code="invalid_json", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """From pydantic's list of errors: names the first field that is wrong, tells the first few."""
    told: dict[str, None] = {}  # in order, each line once
    first: str | None = None
    for error in errors:
        param = _param(error["loc"])
        if error["type"] == "json_invalid":
            reason = (error.get("ctx") or {}).get("error", "cannot be parsed")
            position = next((part for part in error["loc"] if isinstance(part, int)), 0)
            return ApiError(400, f"the body is no valid JSON: {reason} at character {position}", code="invalid_json")
        text = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if error["loc"] == ("body",) and error["type"] == "missing":
            text = "a JSON body is expected"
        line = f"{param}: {text}" if param else text
        value = error.get("input")
        if isinstance(value, bool | int | float | str) and error["type"] not in ("missing", "value_error"):
            line += f" (got {_short(value)})"
        told[line] = None
        first = first or param or None
    more = len(told) - MAX_REPORTED_ERRORS
    message = "; ".join(list(told)[:MAX_REPORTED_ERRORS]) + (f"; and {more} more" if more > 0 else "")
    missing = bool(errors) and errors[0]["type"] == "missing"
    return ApiError(
        400, message or "the request is invalid", param=first, code="missing_required_parameter" if missing else None
    )


def _short(value: bool | int | float | str) -> str:
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print very long ones
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.60}"


def _param(location: Sequence[Any]) -> str:
    """``("body", "messages", 0, "role")`` as ``messages[0].role``.

    Pydantic adds to the path which alternative of a union it has tried (``list[int]``, ``function-after[…]``, class
    names): those are left out.
    """
    parts = location[1:] if location and location[0] in ("body", "query", "path", "header", "cookie") else location
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part == part.lower() and part not in ("str", "int", "float", "bool", "none"):
            text += f".{part}" if text else part
    return text

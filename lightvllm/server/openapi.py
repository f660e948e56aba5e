"""The API's description at ``/openapi.json``, made true of what middlewares and error handlers add to every route.

FastAPI knows the routes; it does not know that wrong bodies are answered with 400 in OpenAI's shape (it says 422 and a
shape of its own), which paths need an API key, or what limits answer.
"""

from __future__ import annotations

import http
from typing import Any

from fastapi import FastAPI

from lightvllm.server.errors import ErrorResponse
from lightvllm.server.paths import is_api, is_open
from lightvllm.server.settings import ServerSettings

_SCHEME = "ApiKey"
_REQUEST_ID = {
    "X-Request-Id": {
        "description": "The request's id, as it stands in the server's log: the client's own, if that was sane.",
        "schema": {"type": "string"},
    }
}
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds after which it is worth trying again.", "schema": {"type": "integer"}}
}


def describe(app: FastAPI, settings: ServerSettings) -> None:
    """Have ``app.openapi()``, and so ``/openapi.json``, tell the whole truth."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(plain(), settings)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(schema: dict[str, Any], settings: ServerSettings) -> dict[str, Any]:
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    described = ErrorResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(described.pop("$defs", {}))
    schemas["ErrorResponse"] = described
    if settings.api_keys:
        components["securitySchemes"] = {
            _SCHEME: {"type": "http", "scheme": "bearer", "description": "One of the server's API keys."}
        }
    for path, operations in schema.get("paths", {}).items():
        needs_key = bool(settings.api_keys) and not is_open(path, metrics_without_key=settings.metrics_without_key)
        for operation in operations.values():
            if needs_key:
                operation["security"] = [{_SCHEME: []}]
            answers = operation["responses"]
            answers.pop("422", None)
            for status in _errors(path, operation, needs_key=needs_key):
                answers.setdefault(str(status), _error(status))
            for status, answer in answers.items():
                answer.setdefault("headers", {}).update(_REQUEST_ID | (_RETRY_AFTER if status == "429" else {}))
    return schema


def _errors(path: str, operation: dict[str, Any], *, needs_key: bool) -> list[int]:
    statuses = [500]
    if operation.get("parameters") or "requestBody" in operation:
        statuses.append(400)
    if needs_key:
        statuses.append(401)
    if "requestBody" in operation:
        statuses += [408, 413]
    if is_api(path):
        statuses += [404, 429, 501, 503]
    return sorted(statuses)


def _error(status: int) -> dict[str, Any]:
    return {
        "description": http.HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }

"""What the router itself answers: errors in OpenAI's shape, as answers and as the last event of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from lightvllm.openai_errors import OpenAIError


class ApiError(OpenAIError):
    """An answer of aiohttp's that is no success."""

    def event(self) -> bytes:
        """As a server-sent event."""
        return b"data: " + self.content() + b"\n\n"

    def response(self) -> web.Response:
        headers = self.headers
        return web.Response(status=self.status, body=self.content(), content_type="application/json", headers=headers)


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

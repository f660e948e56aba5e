"""``create_app``: the FastAPI application, put together from its parts.

The parts know each other by ``app.state``: ``engine`` (``EngineClient``, or None while the model loads), ``settings``,
``lifecycle``, ``in_flight``, ``metrics``. A request meets, from the outside in: its id and log line, CORS, the API key,
the rate limit, the size of its body, then the routes; each is a plain ASGI middleware, because Starlette's
``BaseHTTPMiddleware`` hides a client's leaving from a stream.
"""

from __future__ import annotations

from fastapi import FastAPI, Request

from lightvllm.engine.protocol import EngineClient
from lightvllm.server import errors, health
from lightvllm.server.lifecycle import Lifecycle
from lightvllm.server.middleware import InFlight
from lightvllm.server.settings import ServerSettings
from lightvllm.version import __version__

_DESCRIPTION = "OpenAI's API over a lightvllm engine. Errors have OpenAI's shape; every answer has an X-Request-Id."


def create_app(client: EngineClient | None, settings: ServerSettings) -> FastAPI:
    """The application.

    Args:
        client: the engine; None while it is not there yet, then set ``app.state.engine``.
        settings: see ``ServerSettings``.
    """
    app = FastAPI(
        title="lightvllm",
        version=__version__,
        description=_DESCRIPTION,
        root_path=settings.root_path,
        docs_url="/docs" if settings.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.engine = client
    app.state.settings = settings
    app.state.lifecycle = Lifecycle(app.state)
    app.state.in_flight = InFlight()
    errors.install(app)
    app.include_router(health.router)
    return app


def require_engine(request: Request) -> EngineClient:
    """A dependency: the engine, or 503 with the reason why it cannot take a request."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle.require_engine()

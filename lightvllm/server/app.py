"""``create_app``: the FastAPI application, put together from its parts.

The parts know each other by ``app.state``: ``engine`` (``EngineClient``, or None while the model loads), ``settings``,
``lifecycle``, ``metrics``, ``tracer`` (or None). A request meets, from the outside in: its log line, its id, CORS, the
API key, the rate limit, the size of its body, then the routes; each is a plain ASGI middleware, because Starlette's
``BaseHTTPMiddleware`` hides a client's leaving from a stream. Routes of the API are reached only while the engine can
take a request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI, Request
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from lightvllm.engine.protocol import EngineClient
from lightvllm.keys import ApiKeys
from lightvllm.server import api, docs, errors, health, metrics, openapi, status
from lightvllm.server.access import Access
from lightvllm.server.lifecycle import Lifecycle
from lightvllm.server.metrics import Metrics
from lightvllm.server.middleware import Authentication, RequestBodies, RequestContext, RootPath
from lightvllm.server.observed import ObservedEngine
from lightvllm.server.rate_limit import RateLimiter
from lightvllm.server.settings import ServerSettings
from lightvllm.server.tracing import Tracer
from lightvllm.version import __version__

_DESCRIPTION = "OpenAI's API over a lightvllm engine. Errors have OpenAI's shape; every answer has an X-Request-Id."

_EXPOSED_HEADERS = (
    "X-Request-Id",
    "Retry-After",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
)


def create_app(client: EngineClient | None, settings: ServerSettings) -> FastAPI:
    """The application.

    Args:
        client: the engine; None while it is not there yet, then give it to ``attach_engine``.
        settings: see ``ServerSettings``.
    """
    app = FastAPI(
        title="lightvllm",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's page loads its scripts from a CDN; ``docs`` has its own
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        generate_unique_id_function=lambda route: route.name,
        middleware=_middleware(settings),
    )
    app.state.settings = settings
    app.state.engine = None
    app.state.lifecycle = Lifecycle(app.state)
    app.state.metrics = Metrics(settings.served_model_names[0] if settings.served_model_names else None)
    app.state.tracer = None if settings.otlp_traces_endpoint is None else Tracer(settings.otlp_traces_endpoint)
    errors.install(app)
    app.include_router(health.router)
    app.include_router(metrics.router)
    if settings.docs:
        app.include_router(docs.router)  # before the status page's, whose /static/{name} would take its files' paths
    app.include_router(status.router)
    app.include_router(api.router, dependencies=[Depends(in_flight)])
    openapi.describe(app, settings)
    if client is not None:
        attach_engine(app, client)
    return app


def attach_engine(app: FastAPI, client: EngineClient) -> None:
    """Have ``app`` answer with ``client`` from now on."""
    app.state.engine = ObservedEngine(client, app.state.metrics, app.state.tracer)


async def in_flight(request: Request) -> AsyncIterator[EngineClient]:
    """A dependency of the API's routes: 503 with the reason if the engine cannot take a request, and what is answered
    is waited for when the server ends."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    with lifecycle.in_flight() as engine:
        yield engine


def _middleware(settings: ServerSettings) -> list[Middleware]:
    """From the outside in."""
    chain = [Middleware(RootPath, settings.root_path)] if settings.root_path else []
    chain += [Middleware(Access, log_requests=settings.log_requests), Middleware(RequestContext)]
    if settings.allowed_origins:
        chain.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=settings.allowed_methods,
                allow_headers=settings.allowed_headers,
                allow_credentials=settings.allow_credentials,
                expose_headers=_EXPOSED_HEADERS,
            )
        )
    if settings.api_keys:
        keys = ApiKeys(key.get_secret_value() for key in settings.api_keys)
        chain.append(Middleware(Authentication, keys, metrics_without_key=settings.metrics_without_key))
    if settings.rate_limit is not None:
        chain.append(Middleware(RateLimiter, settings.rate_limit, settings.max_rate_limit_clients))
    chain.append(Middleware(RequestBodies, settings.max_request_bytes, settings.body_timeout))
    return chain

"""``create_app``: the router as an aiohttp application.

| path | for |
|---|---|
| the paths of ``settings.paths``, by POST | models, by the body's ``model`` |
| ``/v1/models``, ``/v1/models/NAME`` | all models that are known |
| ``/backends`` | the state of every replica |
| ``/metrics``, ``/queue.json?model=NAME`` | Prometheus, and autoscalers without it |
| ``/health``, ``/version`` | probes; need no key |

aiohttp serves and calls, because one process then reads and writes a chunk without a layer between; see
``benchmarks/router.py``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from lightvllm.keys import ApiKeys
from lightvllm.logs import accepted_id, request_id
from lightvllm.router.health import Prober
from lightvllm.router.metrics import CONTENT_TYPE, Metrics
from lightvllm.router.pool import Pool
from lightvllm.router.proxy import Proxy
from lightvllm.router.replica import Replica
from lightvllm.router.replies import ApiError, shutting_down, unknown_model
from lightvllm.router.settings import RouterSettings
from lightvllm.router.sources import Source, follow
from lightvllm.router.upstream import SERVER, Upstream
from lightvllm.version import __version__

logger = logging.getLogger(__name__)

_OPEN = {"/health", "/version"}
_MEASURES = {"/metrics", "/queue.json"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Router:
    """Everything behind the application; ``app[ROUTER]``.

    Args:
        settings: of the router.
        sources: say what replicas there are.
        keys: one of them must be shown.
        upstream: connects to replicas; the app enters and leaves it.

    Attributes:
        draining: new requests are refused.
        busy: connections whose request is being answered, one at a time each, with the task that does it.
        quiet: connections seen without a request, and since when (the event loop's time); one leaves with its next
            request.
    """

    def __init__(self, settings: RouterSettings, sources: list[Source], keys: ApiKeys, upstream: Upstream) -> None:
        self.settings, self.sources, self.keys, self.upstream = settings, sources, keys, upstream
        self.draining = False
        self.busy: dict[object, asyncio.Task[object]] = {}
        self.quiet: dict[object, float] = {}
        self.metrics = Metrics()
        self.prober: Prober
        self.pool = Pool(
            settings,
            on_eject=lambda replica: self.metrics.ejections.labels(replica.name).inc(),
            added=lambda replica: self.prober.start(replica),
            removed=self._removed,
        )
        self.prober = Prober(self.pool, upstream, settings)
        self.proxy = Proxy(self.pool, upstream, self.metrics, settings)
        self.metrics.watch(self.pool, self.proxy.memory)

    def _removed(self, replica: Replica) -> None:
        self.prober.stop(replica)
        self.metrics.forget_gone()

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """aiohttp's start and end."""
        async with self.upstream:
            async with follow(self.sources, self.pool):
                yield
            await self.prober.close()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The request's id, the client's key, errors in OpenAI's shape."""
        name = accepted_id(request.headers.get("X-Request-Id", ""))
        request_id.set(name)  # each connection's task handles one request after another
        task = asyncio.current_task()
        assert task is not None
        self.busy[request.protocol] = task
        self.quiet.pop(request.protocol, None)
        try:
            self._admit(request)
            response = await handler(request)
        except ApiError as error:
            response = error.response()
        except web.HTTPException as error:
            response = _http_error(error, self.settings)
        except asyncio.CancelledError:
            if not self.proxy.ending or request.protocol in self.proxy.begun:
                raise  # the client has left, or has been told by its stream
            task.uncancel()
            response = shutting_down().response()
        except Exception:
            logger.exception("a defect in this router")
            response = ApiError(
                500, f"internal error (request {name}); the router's log has the details", code="internal_error"
            ).response()
        finally:
            self.busy.pop(request.protocol, None)
            self.proxy.begun.discard(request.protocol)
        if not response.prepared:
            response.headers["X-Request-Id"] = name
            response.headers["Server"] = SERVER
            if self.draining:
                response.force_close()
        return response

    def _admit(self, request: web.Request) -> None:
        path = request.path
        if path in _OPEN:
            return
        is_open = path in _MEASURES and self.settings.metrics_without_key
        if not is_open and self.keys and self.keys.find(request.headers.get("Authorization")) is None:
            raise ApiError(
                401,
                "no valid API key; send one as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.draining and path not in _MEASURES:
            raise shutting_down()

    # ---- what the router answers itself

    async def health(self, request: web.Request) -> web.Response:
        """503 once it drains. It does not depend on replicas: without any, requests are held."""
        status = "draining" if self.draining else "ready"
        return web.json_response({"status": status}, status=503 if self.draining else 200)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": __version__})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self.pool.card(name) for name in self.pool.models]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if not self.pool.knows(name):
            raise unknown_model(name, self.pool.models)
        return web.json_response(self.pool.card(name))

    async def backends(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [replica.describe() for replica in self.pool]})

    async def show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def queue(self, request: web.Request) -> web.Response:
        """Of one model, or of all by name; flat numbers, for autoscalers that read JSON."""
        name = request.query.get("model")
        if name is None:
            return web.json_response({"models": {name: self._queue(name) for name in self.pool.models}})
        if not self.pool.knows(name):
            raise unknown_model(name, self.pool.models)
        return web.json_response(self._queue(name))

    def _queue(self, name: str) -> dict[str, int]:
        pending, waiting = self.pool.pending[name], self.pool.num_held(name)
        return {"pending": pending, "waiting": waiting, "in_flight": pending - waiting}


ROUTER: web.AppKey[Router] = web.AppKey("router", Router)


def create_app(
    settings: RouterSettings,
    sources: list[Source],
    keys: ApiKeys | None = None,
    upstream: Upstream | None = None,
) -> web.Application:
    """The application; it follows its sources and probes replicas from its start to its end.

    Run it with ``handler_cancellation=True``, so that clients who leave end their requests.
    """
    router = Router(settings, sources, keys or ApiKeys(), upstream or Upstream(settings))
    app = web.Application(middlewares=[router.middleware])
    app[ROUTER] = router
    app.cleanup_ctx.append(router.run)
    for path in settings.paths:
        app.router.add_post(path, router.proxy.handle)
    gets: dict[str, Any] = {
        "/v1/models": router.models,
        "/v1/models/{name:.+}": router.model,
        "/backends": router.backends,
        "/metrics": router.show_metrics,
        "/queue.json": router.queue,
        "/health": router.health,
        "/version": router.version,
    }
    for path, handler in gets.items():
        app.router.add_get(path, handler)
    return app


def _http_error(error: web.HTTPException, settings: RouterSettings) -> web.Response:
    headers = {name: value for name, value in error.headers.items() if name in ("Allow", "Connection")}
    match error.status:
        case 404:
            wrong = ApiError(
                404, f"there is no such path; requests go to {', '.join(settings.paths)}", code="not_found"
            )
        case 405:
            wrong = ApiError(405, f"this path does not know the method; use {headers.get('Allow')}", headers=headers)
        case _:
            wrong = ApiError(error.status, error.reason, headers=headers)
    return wrong.response()

"""Probes: ``/health`` (readiness), ``/live`` (liveness), ``/ping``, and ``/version`` and ``/load``.

``/health`` is 200 only while a request could be answered: the engine is ready, no rank is dead, nobody is shutting
down. It costs a look at what the engine has told, so it can be asked at any rate; ``?deep=true`` has every worker
answer, which one check at a time does for all who ask. ``/live`` is 503 only when a restart of the process is what
helps: after the engine has failed. It stays 200 while the model loads or requests are finished before the end. The
three may be asked by HEAD, too; the server then sends no body.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from lightvllm.engine.protocol import EngineClient
from lightvllm.errors import LightvllmError
from lightvllm.server.lifecycle import Lifecycle, Phase
from lightvllm.version import __version__

router = APIRouter(tags=["server"])

DEEP_CHECK_TIMEOUT = 20.0
"""Seconds within which all workers must answer a deep check."""


class Health(BaseModel):
    """Whether requests can be answered."""

    status: Phase
    reason: str | None = Field(default=None, description="Why not, if the status is not ready.")
    dead_ranks: list[int] = Field(default=[], description="Workers that are gone.")


class Liveness(BaseModel):
    """Whether the process should be left running."""

    status: Literal["alive", "failed"]
    reason: str | None = None


class Version(BaseModel):
    """Of lightvllm."""

    version: str


class Load(BaseModel):
    """What the server is busy with."""

    server_load: int = Field(description="Requests to the API that are being answered.")
    num_running: int = Field(description="Sequences that the engine runs.")
    num_waiting: int = Field(description="Sequences that wait to be run.")
    kv_cache_usage: float = Field(description="Share of the KV cache that is held, 0 to 1.")
    uptime_seconds: float


_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": Health, "description": "Starting, failed, or shutting down; the body says which and why."}
}


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=_NOT_READY, summary="Readiness")
async def health(
    request: Request,
    response: Response,
    deep: Annotated[bool, Query(description="Have every worker answer before saying yes.")] = False,
) -> Health:
    lifecycle: Lifecycle = request.app.state.lifecycle
    engine, reason = lifecycle.engine, lifecycle.reason
    phase = lifecycle.phase
    if deep and phase == "ready" and engine is not None:
        reason = await _deep_check(request, engine)
        phase = "failed" if reason else phase
    if phase != "ready":
        response.status_code = 503
    response.headers["Cache-Control"] = "no-store"
    dead = [rank.rank for rank in engine.ranks if rank.health == "dead"] if engine is not None else []
    return Health(status=phase, reason=reason, dead_ranks=dead)


@router.head("/ping", include_in_schema=False)
@router.get("/ping", responses=_NOT_READY, summary="Readiness, as Amazon SageMaker asks for it")
async def ping(request: Request, response: Response) -> Health:
    return await health(request, response)


@router.head("/live", include_in_schema=False)
@router.get("/live", responses={503: {"model": Liveness, "description": "The engine has failed."}}, summary="Liveness")
async def live(request: Request, response: Response) -> Liveness:
    lifecycle: Lifecycle = request.app.state.lifecycle
    response.headers["Cache-Control"] = "no-store"
    if lifecycle.phase == "failed":
        response.status_code = 503
        return Liveness(status="failed", reason=lifecycle.reason)
    return Liveness(status="alive")


@router.get("/version")
async def version() -> Version:
    return Version(version=__version__)


@router.get("/load")
async def load(request: Request) -> Load:
    lifecycle: Lifecycle = request.app.state.lifecycle
    stats = lifecycle.engine.stats if lifecycle.engine is not None else None
    return Load(
        server_load=lifecycle.num_in_flight,
        num_running=stats.num_running if stats else 0,
        num_waiting=stats.num_waiting if stats else 0,
        kv_cache_usage=stats.kv_cache_usage if stats else 0.0,
        uptime_seconds=round(time.time() - lifecycle.started_at, 3),
    )


async def _deep_check(request: Request, engine: EngineClient) -> str | None:
    """Why the workers do not answer, or None; those who ask while a check runs get its result."""

    async def check() -> str | None:
        try:
            async with asyncio.timeout(DEEP_CHECK_TIMEOUT):
                await engine.check_health()
        except LightvllmError as error:  # RpcTimeout, which is also a TimeoutError, among them
            return f"the workers do not answer: {error}"
        except TimeoutError:
            return f"the workers did not answer within {DEEP_CHECK_TIMEOUT:g} s"
        return None

    state = request.app.state
    running: asyncio.Task[str | None] | None = getattr(state, "deep_check", None)
    if running is None or running.done():
        running = state.deep_check = asyncio.create_task(check(), name="deep health check")
    return await asyncio.shield(running)

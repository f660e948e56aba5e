"""The status page: ``/`` and what it is made of, ``/status.json``, and ``/status/events``, which tells it what changes.

The page is the same for every server and holds no figures, so it needs no API key; the figures need one where the
server has any: the page asks for it and keeps it for the session of the browser's tab. No build step and nothing from
elsewhere: one HTML, one JS and one CSS file in ``static/``.
"""

from __future__ import annotations

import asyncio
import functools
import html
import time
from collections.abc import AsyncIterator, Iterable
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from lightvllm.engine.protocol import EngineClient, RankHealth
from lightvllm.server.errors import ApiError
from lightvllm.server.lifecycle import Lifecycle, Phase
from lightvllm.server.metrics import Metrics
from lightvllm.version import __version__

EVENT_SECONDS = 1.0
"""Between two events while nothing changes but numbers."""

LOOK_SECONDS = 0.25
"""How soon a change of state, progress or health is told."""

MAX_LISTENERS = 32
"""Pages that may be open at once; more are told to come again."""


def page_headers(images: str = "img-src 'self'") -> dict[str, str]:
    """Of a page of ours and what it is made of: it runs, shows and asks nothing that is from elsewhere."""
    return {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": (
            f"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; {images}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


_HEADERS = page_headers()
_STATIC = {
    "status.css": "text/css; charset=utf-8",
    "status.js": "text/javascript; charset=utf-8",
    "docs.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

router = APIRouter()


class _Taken(BaseModel):
    """Made of an object with attributes of the same names."""

    model_config = ConfigDict(from_attributes=True)


class Rank(_Taken):
    """One worker: its place in the layout, where it runs, and how it is."""

    rank: int
    tp_rank: int
    pp_rank: int
    worker: str
    node: str
    address: str
    device: str
    pid: int
    parameter_bytes: int
    health: RankHealth
    reason: str


class Engine(BaseModel):
    """What does not change while an engine lives."""

    executor: str
    dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    start_seconds: float


class Stats(_Taken):
    """The engine's numbers; those that begin with ``total_`` only grow."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float = Field(description="Share of the KV cache that is held, 0 to 1.")
    num_kv_blocks: int
    total_prefix_cache_queries: int
    total_prefix_cache_hits: int
    total_preemptions: int
    total_prompt_tokens: int
    total_generation_tokens: int
    total_steps: int
    total_step_seconds: float
    total_executor_seconds: float


class Requests(BaseModel):
    """What has become of requests since the server began, by how they ended; and sums over them."""

    stop: int
    length: int
    abort: int
    timeout: int
    error: int
    refused: int = Field(description="Refused because too many were waiting.")
    in_flight: int = Field(description="HTTP requests that are being answered by the engine.")
    first_tokens: int = Field(description="Requests that have got their first token,")
    first_token_seconds: float = Field(description="and the time until then, all of them together.")
    intervals: int = Field(description="Intervals between tokens,")
    interval_seconds: float = Field(description="and all of them together.")


class Failure(_Taken):
    """Something that went wrong on the server's side, how often in a row, and when last."""

    time: float = Field(description="Seconds since 1970.")
    request_id: str
    message: str
    count: int


class Status(BaseModel):
    """Where a server stands."""

    version: str
    model: str
    time: float = Field(description="Of this answer, seconds since 1970.")
    uptime_seconds: float
    phase: Phase
    reason: str | None = Field(description="Why it is not ready.")
    engine: Engine | None = Field(description="Nothing while the model is being loaded.")
    ranks: list[Rank]
    stats: Stats | None
    requests: Requests
    errors: list[Failure] = Field(description="The latest, newest first.")


def status_of(app_state: Any) -> Status:
    """What ``/status.json`` answers, from the application's state."""
    lifecycle: Lifecycle = app_state.lifecycle
    metrics: Metrics = app_state.metrics
    client = lifecycle.engine
    requests = metrics.requests
    return Status(
        version=__version__,
        model=metrics.model_name,
        time=time.time(),
        uptime_seconds=time.time() - lifecycle.started_at,
        phase=lifecycle.phase,
        reason=lifecycle.reason,
        engine=None if client is None else _engine(client),
        ranks=[] if client is None else [Rank.model_validate(rank) for rank in client.ranks],
        stats=None if client is None else Stats.model_validate(client.stats),
        requests=Requests(
            **requests.endings,
            refused=requests.rejections,
            in_flight=lifecycle.num_in_flight,
            first_tokens=requests.first_token.count,
            first_token_seconds=requests.first_token.total,
            intervals=requests.inter_token.count,
            interval_seconds=requests.inter_token.total,
        ),
        errors=[Failure.model_validate(error) for error in reversed(metrics.errors)],
    )


def _engine(client: EngineClient) -> Engine:
    config = client.info.config
    return Engine(
        executor=client.info.executor,
        dtype=config.model.dtype,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        max_model_len=config.model.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        start_seconds=client.info.start_seconds,
    )


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    text = static_text("status.html").replace("{{root}}", html.escape(root_of(request), quote=True))
    return Response(text, media_type="text/html; charset=utf-8", headers=_HEADERS)


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> Response:
    if name not in _STATIC:
        raise ApiError(404, f"there is no file {name!r} here", code="not_found")
    return Response(static_text(name), media_type=_STATIC[name], headers=_HEADERS)


def root_of(request: Request) -> str:
    """What a page's links begin with: relative ones hold below any proxy; with a root path they may not, for the page
    may be asked for without a slash."""
    root = request.scope.get("root_path", "")
    return f"{root}/" if root else ""


@functools.cache
def static_text(name: str) -> str:
    """A file of ``static/``."""
    return resources.files("lightvllm.server").joinpath("static", name).read_text(encoding="utf-8")


@router.get("/status.json", tags=["server"], summary="Where the server stands")
async def status(request: Request, response: Response) -> Status:
    response.headers["Cache-Control"] = "no-store"
    return status_of(request.app.state)


@router.get("/status/events", include_in_schema=False)
async def events(request: Request) -> StreamingResponse:
    """``/status.json`` again and again, as server-sent events, until the client goes or the server has ended."""
    state = request.app.state
    listeners = getattr(state, "status_listeners", 0)
    if listeners >= MAX_LISTENERS:
        raise ApiError(
            503, f"{listeners} status pages are open, the most allowed", code="too_many_pages", retry_after=10
        )
    return StreamingResponse(
        _events(state), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


async def _events(state: Any) -> AsyncIterator[str]:
    lifecycle: Lifecycle = state.lifecycle
    listeners = getattr(state, "status_listeners", 0)
    if listeners >= MAX_LISTENERS:  # many came at once, before any had begun; a page asks again by itself
        return
    state.status_listeners = listeners + 1
    try:
        while True:
            told, at = _signs(lifecycle), time.monotonic()
            yield f"data: {status_of(state).model_dump_json()}\n\n"
            if lifecycle.phase == "stopping" and (lifecycle.engine is None or lifecycle.engine.state == "stopped"):
                return
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                if _signs(lifecycle) != told or time.monotonic() - at >= EVENT_SECONDS:
                    break
    finally:
        state.status_listeners -= 1


def _signs(lifecycle: Lifecycle) -> Iterable[object]:
    """What is told at once when it changes."""
    ranks = [] if lifecycle.engine is None else [(rank.health, rank.reason) for rank in lifecycle.engine.ranks]
    return (lifecycle.phase, lifecycle.reason, *ranks)

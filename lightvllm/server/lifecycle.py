"""Where the server stands, from listening to gone: what probes, the status page and the gate before the API ask.

    starting ──► ready ──► stopping
        │          │
        └──► failed ◄┘      the process of a server that fails while it starts ends; one that fails later stays

The engine is at ``app.state.engine``, None while it starts; this reads it there. No HTTP here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal

from lightvllm.engine.protocol import EngineClient
from lightvllm.server.errors import ApiError

Phase = Literal["starting", "ready", "failed", "stopping"]


class Lifecycle:
    """At ``app.state.lifecycle``.

    Attributes:
        progress: what start-up is waiting for, in a few words.
        started_at: ``time.time()`` of the process's start as a server.
    """

    def __init__(self, app_state: Any) -> None:
        self._app_state = app_state
        self._stopping = False
        self._num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.progress = ""
        self.started_at = time.time()

    def stop(self) -> None:
        """From now on nothing new is taken; what runs goes on."""
        self._stopping = True

    @property
    def num_in_flight(self) -> int:
        """Requests that have been given the engine and are not yet answered in full."""
        return self._num_in_flight

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[EngineClient]:
        """The engine for one request; see ``require_engine``."""
        engine = self.require_engine()
        self._num_in_flight += 1
        self._idle.clear()
        try:
            yield engine
        finally:
            self._num_in_flight -= 1
            if not self._num_in_flight:
                self._idle.set()

    async def idle(self) -> None:
        """Waits until no request is in flight."""
        await self._idle.wait()

    @property
    def engine(self) -> EngineClient | None:
        engine: EngineClient | None = self._app_state.engine
        return engine

    @property
    def phase(self) -> Phase:
        engine = self.engine
        if self._stopping or (engine is not None and engine.state == "stopped"):
            return "stopping"
        if engine is None or engine.state == "starting":
            return "starting"
        if engine.state == "failed" or self._dead():
            return "failed"
        return "ready"

    @property
    def reason(self) -> str | None:
        """Why it is not ready, in one line; None when it is."""
        match self.phase:
            case "ready":
                return None
            case "stopping":
                return "the server is shutting down"
            case "starting":
                return f"the model is being loaded: {self.progress}" if self.progress else "the model is being loaded"
        engine = self.engine
        if engine is not None and engine.failure:
            return f"the engine has failed: {engine.failure}"
        return "the engine has failed: " + ("; ".join(self._dead()) or "no reason is known")

    def require_engine(self) -> EngineClient:
        """The engine, if it can take a request; otherwise raises ApiError 503, which says why not."""
        engine, phase = self.engine, self.phase
        if phase == "ready" and engine is not None:
            return engine
        codes = {"starting": "engine_starting", "failed": "engine_failed", "stopping": "shutting_down"}
        waits = {"starting": 5.0, "stopping": 1.0}
        raise ApiError(503, self.reason or "not ready", code=codes[phase], retry_after=waits.get(phase))

    def _dead(self) -> list[str]:
        ranks = self.engine.ranks if self.engine is not None else []
        return [
            f"rank {rank.rank} is dead" + f": {rank.reason}" * bool(rank.reason)
            for rank in ranks
            if rank.health == "dead"
        ]

"""Asking replicas how they are: ``/health`` every few seconds, how busy they are, and what models they serve.

A replica that answers 503 wants no requests but finishes those that it has; one that does not answer is ejected. How
busy it is comes from ``/load`` (lightvllm) or ``/metrics`` (vLLM's names), if it has one of them.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from typing import Any

import aiohttp
import msgspec

from lightvllm.router.pool import Pool
from lightvllm.router.replica import Replica
from lightvllm.router.settings import RouterSettings
from lightvllm.router.upstream import Upstream

logger = logging.getLogger(__name__)

_GAUGE = re.compile(rb"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? +([0-9.eE+]+)", re.MULTILINE)


_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.DecodeError)


class _Load(msgspec.Struct):
    num_running: int
    num_waiting: int


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


class Prober:
    """One task per replica, from ``start`` to ``stop``."""

    def __init__(self, pool: Pool, upstream: Upstream, settings: RouterSettings) -> None:
        self._pool, self._upstream, self._settings = pool, upstream, settings
        self._tasks: dict[Replica, asyncio.Task[None]] = {}

    def start(self, replica: Replica) -> None:
        self._tasks[replica] = asyncio.create_task(self._watch(replica), name=f"probes of {replica.name}")

    def stop(self, replica: Replica) -> None:
        if task := self._tasks.pop(replica, None):
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, replica: Replica) -> None:
        asked_models = -float("inf")
        load_from: str | None = "/load"
        while True:
            try:
                was_out = replica.state != "healthy"
                if was_out:
                    asked_models, load_from = -float("inf"), "/load"
                if await self._is_well(replica):
                    # The models first: a replica that is healthy without them would be one for none.
                    if time.monotonic() - asked_models >= self._settings.models_interval:
                        await self._ask_models(replica)
                        asked_models = time.monotonic()
                    self._pool.probed(replica)
                    load_from = await self._ask_load(replica, load_from)
            except _FAILURES as error:
                self._pool.failed(replica, describe(error), at_once=isinstance(error, aiohttp.ClientConnectorError))
            except Exception:
                logger.exception("defect in the probe of %s", replica.name)
                self._pool.failed(replica, "the router could not make sense of its answer", at_once=True)
            interval = self._settings.health_interval
            if replica.state == "new":
                interval = min(interval, 0.2)
            await asyncio.sleep(interval * random.uniform(0.8, 1.2))  # noqa: S311

    async def _is_well(self, replica: Replica) -> bool:
        status, _ = await self._get(replica, "/health")
        if status == 503:
            self._pool.unready(replica, "/health says 503")
        elif status != 200:
            self._pool.failed(replica, f"/health says {status}")
        return status == 200

    async def _ask_models(self, replica: Replica) -> None:
        status, body = await self._get(replica, "/v1/models")
        if status in (401, 403):
            raise ValueError(f"/v1/models says {status}: it wants another --backend-api-key-file")
        if status != 200:
            if replica.target.models is None:
                raise ValueError(f"/v1/models says {status}; name its models, such as MODEL={replica.target.url}")
            return
        cards = {
            card["id"]: card for card in msgspec.json.decode(body, type=_Models).data if isinstance(card.get("id"), str)
        }
        if replica.target.models is not None and (missing := set(replica.target.models) - set(cards)):
            logger.warning("backend %s does not list %s", replica.name, ", ".join(sorted(missing)))
        self._pool.serves(replica, cards)

    async def _ask_load(self, replica: Replica, path: str | None) -> str | None:
        """Where to ask for it the next time; None if it does not say."""
        if path is None:
            return None
        before = replica.in_flight
        try:
            status, body = await self._get(replica, path)
        except _FAILURES:  # it is well, as it has just said: only nothing is known of its load
            replica.elsewhere = 0
            return path
        busy: float | None = None
        if status == 200 and path == "/load":
            try:
                load = msgspec.json.decode(body, type=_Load)
                busy = load.num_running + load.num_waiting
            except msgspec.DecodeError:  # vLLM has /load with other content
                pass
        elif status == 200 and (values := _GAUGE.findall(body)):
            busy = sum(map(float, values))
        if busy is None:
            return "/metrics" if path == "/load" else None
        # What came or went while it was asked is not to be seen as somebody else's.
        replica.elsewhere = max(0, round(busy) - max(before, replica.in_flight))
        return path

    async def _get(self, replica: Replica, path: str) -> tuple[int, bytes]:
        return await self._upstream.get(replica, path, self._settings.health_timeout)


def describe(error: BaseException) -> str:
    """One line on what happened to a connection."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = getattr(error, "os_error", None) or getattr(error, "certificate_error", error)
        return f"cannot connect: {getattr(reason, 'strerror', None) or reason}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(": ")

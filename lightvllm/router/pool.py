"""All replicas of all models, and the requests that wait for one.

Everything here happens in the router's event loop. A request ``acquire``s a replica and gives it back with ``release``;
if none can take it, it is held, in order of arrival, until one can. Sources tell what replicas there are (``update``),
probes and the proxy how they are.
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import msgspec

from lightvllm.router.balance import choose
from lightvllm.router.replica import Replica, State, Target
from lightvllm.router.replies import ApiError
from lightvllm.router.settings import RouterSettings

logger = logging.getLogger(__name__)

_RETRY_HELD = 5.0  # seconds told to a client for whom no replica came


class Snapshot(msgspec.Struct, frozen=True):
    """All that one source knows at a time: its replicas, and models that are known although they may have none."""

    targets: tuple[Target, ...] = ()
    models: frozenset[str] = frozenset()


class _Held:
    """A request that waits."""

    def __init__(self, arrival: int, key: bytes | None, avoid: Collection[Replica]) -> None:
        self.arrival = arrival
        self.key = key
        self.avoid = avoid
        self.granted: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()


class Request:
    """One client's request, from its arrival to its end.

    Attributes:
        arrival: its place in the order of all.
        held: seconds that it waited for a replica.
    """

    def __init__(self, model: str, key: bytes | None, arrival: int) -> None:
        self.model = model
        self.key = key
        self.arrival = arrival
        self.held = 0.0


class Pool:
    """See the module.

    Args:
        settings: of the router.
        on_eject: called with a replica that is ejected.
        added, removed: called with each replica that comes or goes.
    """

    def __init__(
        self,
        settings: RouterSettings,
        on_eject: Callable[[Replica], None] = lambda replica: None,
        added: Callable[[Replica], None] = lambda replica: None,
        removed: Callable[[Replica], None] = lambda replica: None,
    ) -> None:
        self.pending: Counter[str] = Counter()
        self._settings = settings
        self._on_eject, self._added, self._removed = on_eject, added, removed
        self._snapshots: dict[str, Snapshot] = {}
        self._replicas: dict[str, Replica] = {}  # by URL, in order of coming
        self._by_model: dict[str, list[Replica]] = {}
        self._known: set[str] = set(settings.models)
        self._held: dict[str, list[_Held]] = {}
        self._arrivals = itertools.count()

    # ---- what there is

    @property
    def models(self) -> list[str]:
        """Every known model's name, sorted."""
        return sorted(self._known)

    @property
    def replicas(self) -> list[Replica]:
        return list(self._replicas.values())

    def knows(self, model: str) -> bool:
        return model in self._known

    def card(self, model: str) -> dict[str, Any]:
        """The entry of /v1/models, as a replica tells it if one does."""
        for replica in self._by_model.get(model, ()):
            if card := replica.cards.get(model):
                return card
        return {"id": model, "object": "model", "created": 0, "owned_by": "lightvllm"}

    def num_held(self, model: str) -> int:
        return len(self._held.get(model, ()))

    def update(self, source: str, snapshot: Snapshot) -> None:
        """Take over what ``source`` knows now, in place of what it knew before."""
        self._snapshots[source] = snapshot
        wanted: dict[str, Target] = {}
        for known in self._snapshots.values():
            for target in known.targets:
                wanted.setdefault(target.url, target)
        for url, replica in list(self._replicas.items()):
            now = wanted.get(url)
            if now is None or now.name != replica.name or now.models != replica.target.models:
                del self._replicas[url]
                replica.removed = True
                logger.info("backend %s is gone", replica.name)
                self._removed(replica)
            else:
                replica.target = now
        for url, target in wanted.items():
            if url not in self._replicas:
                self._replicas[url] = replica = Replica(target)
                logger.info("backend %s at %s", replica.name, url)
                self._added(replica)
        self._index()

    def _index(self) -> None:
        self._by_model = {}
        for replica in self._replicas.values():
            for model in replica.models:
                self._by_model.setdefault(model, []).append(replica)
        self._known = {*self._settings.models, *self._by_model}
        self._known.update(*(snapshot.models for snapshot in self._snapshots.values()))
        self._wake(list(self._held))

    # ---- requests

    def enter(self, model: str, key: bytes | None) -> Request:
        """A request has come; ``leave`` must follow."""
        self.pending[model] += 1
        return Request(model, key, next(self._arrivals))

    def leave(self, request: Request) -> None:
        self.pending[request.model] -= 1

    async def acquire(self, request: Request, avoid: Collection[Replica] = ()) -> Replica:
        """A replica for one try; ``release`` must follow. One of ``avoid`` only if there is no other.

        Raises ApiError (503): too many requests are held, or none could take it within the hold time-out.
        """
        queue = self._held.get(request.model)
        first = not queue or request.arrival < queue[0].arrival
        if first and (replica := self._pick(request.model, request.key, avoid)):
            replica.in_flight += 1
            return replica
        if queue is not None and len(queue) >= self._settings.max_held:
            raise self._too_many(request.model)
        if not self._settings.max_held or not self._settings.hold_timeout:
            raise self._none_came(request.model)
        held = _Held(request.arrival, request.key, avoid)
        if not queue:
            logger.info("no replica of %r can take requests: they are held", request.model)
        queue = self._held.setdefault(request.model, [])
        bisect.insort(queue, held, key=lambda other: other.arrival)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.hold_timeout):
                return await held.granted
        except TimeoutError:
            self._give_back(held)
            raise self._none_came(request.model) from None
        except asyncio.CancelledError:
            self._give_back(held)
            raise
        finally:
            request.held += time.monotonic() - began
            if held in queue:
                queue.remove(held)
            if not queue and self._held.get(request.model) is queue:
                del self._held[request.model]

    def release(self, replica: Replica) -> None:
        replica.in_flight -= 1
        if self._settings.max_in_flight and self._held:
            self._wake(replica.models)

    def _give_back(self, held: _Held) -> None:
        """What was granted in the moment in which the request gave up."""
        if held.granted.done() and not held.granted.cancelled():
            self.release(held.granted.result())

    def _pick(self, model: str, key: bytes | None, avoid: Collection[Replica] = ()) -> Replica | None:
        most = self._settings.max_in_flight
        usable = [r for r in self._by_model.get(model, ()) if r.usable and (not most or r.in_flight < most)]
        if not usable:
            return None
        preferred = [replica for replica in usable if replica not in avoid] or usable
        if any(replica.busy_until for replica in preferred):
            now = time.monotonic()
            preferred = [replica for replica in preferred if replica.busy_until <= now] or preferred
        return choose(preferred, key, self._settings.balance_factor, self._settings.affinity_slack)

    def _wake(self, models: Collection[str]) -> None:
        """Grant replicas to those who wait, in order of arrival, whichever of the models they wait for."""
        heads = [(queue[0].arrival, model) for model in set(models) if (queue := self._held.get(model))]
        heapq.heapify(heads)
        while heads:
            _, model = heads[0]
            queue = self._held[model]
            held = queue[0]
            if not held.granted.done():
                replica = self._pick(model, held.key, held.avoid)
                if replica is None:  # and nobody behind it gets one either
                    heapq.heappop(heads)
                    continue
                replica.in_flight += 1
                held.granted.set_result(replica)
            queue.pop(0)
            if queue:
                heapq.heapreplace(heads, (queue[0].arrival, model))
            else:
                heapq.heappop(heads)

    def _too_many(self, model: str) -> ApiError:
        return ApiError(
            503,
            f"no replica of {model!r} can take requests now, and {self._settings.max_held} are waiting already",
            code="no_replica",
            retry_after=_RETRY_HELD,
        )

    def _none_came(self, model: str) -> ApiError:
        waited = f" within {self._settings.hold_timeout:g} s" if self._settings.hold_timeout else ""
        return ApiError(
            503, f"no replica of {model!r} could take the request{waited}", code="no_replica", retry_after=_RETRY_HELD
        )

    # ---- how replicas are

    def unready(self, replica: Replica, reason: str) -> None:
        """It wants no requests: it starts, or finishes those that it has."""
        replica.successes = 0
        self._become(replica, "unready", reason)

    def probed(self, replica: Replica) -> None:
        """It has said that it is well."""
        replica.successes += 1
        if replica.state == "healthy":
            return
        enough = 1 if replica.state == "new" else self._settings.healthy_after
        if replica.successes >= enough and time.monotonic() >= replica.out_until:
            replica.failures = 0
            self._become(replica, "healthy", "")
            self._wake([model for model in self._held if model in replica.models])

    def serves(self, replica: Replica, cards: dict[str, dict[str, Any]]) -> None:
        """What the replica's /v1/models holds, by the model's name."""
        replica.cards = cards
        if replica.target.models is None and tuple(cards) != replica.models:
            replica.models = tuple(cards)
            self._index()

    def succeeded(self, replica: Replica) -> None:
        """A request to it went well."""
        replica.failures = replica.ejections = 0

    def failed(self, replica: Replica, reason: str, *, at_once: bool = False) -> None:
        """A request or a probe failed; eject it if that is enough."""
        replica.successes = 0
        replica.failures += 1
        if replica.state == "ejected":
            replica.reason = reason
        elif at_once or replica.failures >= self._settings.eject_after or replica.state != "healthy":
            replica.ejections += 1
            pause = min(2.0 ** min(replica.ejections - 1, 30), self._settings.max_ejection)
            replica.out_until = time.monotonic() + pause
            self._become(replica, "ejected", reason)
            self._on_eject(replica)

    def _become(self, replica: Replica, state: State, reason: str) -> None:
        if replica.become(state, reason):
            if state == "healthy":
                logger.info("backend %s is healthy", replica.name)
            elif not replica.removed:
                logger.warning("backend %s is %s: %s", replica.name, state, reason)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

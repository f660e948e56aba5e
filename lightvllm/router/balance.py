"""Which replica gets a request: consistent hashing with bounded loads, pure arithmetic.

Rendezvous hashing (Thaler and Ravishankar, 1998): a replica's score comes from the request's key and its own name; the
highest has the request. When one of n replicas goes, only its own 1/n of the keys move; when one comes, it takes 1/n
from the others. Bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): a replica that would have more than
``factor`` times the average load is passed over, and the next in order of score is asked.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Loaded(Protocol):
    """A replica as balancing sees it."""

    @property
    def name(self) -> str: ...

    @property
    def load(self) -> int:
        """Requests that it is busy with."""


R = TypeVar("R", bound=Loaded)


def rendezvous(replicas: Sequence[R], key: bytes) -> list[R]:
    """The replicas, the one that ``key`` belongs to first."""
    if len(replicas) < 2:
        return list(replicas)
    return sorted(replicas, key=lambda replica: _score(key, replica.name), reverse=True)


def capacity(total: int, replicas: int, factor: float, slack: int) -> int:
    """How many requests a replica may have for affinity to give it one, that one counted.

    Args:
        total: requests of all replicas, without the new one.
        replicas: how many there are, at least 1.
        factor: times the average, at least 1: so there is always one below it.
        slack: the least capacity.
    """
    return max(slack, math.ceil(factor * (total + 1) / replicas))


def choose(replicas: Sequence[R], key: bytes | None, factor: float = 1.25, slack: int = 4) -> R:
    """The replica for a request; ``replicas`` must not be empty.

    Args:
        key: what the request has in common with those that should go where it goes; None: the least loaded, one of
            them at random if several are.
        factor, slack: see ``capacity``.
    """
    if len(replicas) == 1:
        return replicas[0]
    if key is not None:
        most = capacity(sum(replica.load for replica in replicas), len(replicas), factor, slack)
        for replica in rendezvous(replicas, key):
            if replica.load < most:
                return replica
    least = min(replica.load for replica in replicas)
    return random.choice([replica for replica in replicas if replica.load == least])  # noqa: S311


def _score(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), key=key, digest_size=8).digest()

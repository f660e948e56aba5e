"""How much memory the bodies of requests and of unfinished answers take, all together: a bound, and who has what of it.

A body is kept until its answer begins, so that it can be sent again; of requests that are held that may be long.
"""

from __future__ import annotations


class Memory:
    """Bytes for all requests.

    Args:
        most: so many.

    Attributes:
        used: at the moment.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0


class Share:
    """What one request has of it, from its first byte until ``give_back``."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0

    def take(self, count: int) -> bool:
        """``count`` bytes more; False, and nothing is taken, if there is not so much left."""
        if self._memory.used + count > self._memory.most:
            return False
        self._memory.used += count
        self._size += count
        return True

    def give_back(self) -> None:
        """All of it; idempotent."""
        self._memory.used -= self._size
        self._size = 0

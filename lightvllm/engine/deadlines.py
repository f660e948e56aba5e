"""When requests that bring a time-out are to be ended."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

_SPARE = 64


class Deadlines:
    """A heap of (time, request id). Entries of requests that have ended in time are left in it until they come up, or
    until they are most of it; ``counts(time, request_id)`` tells them from the others."""

    def __init__(self, counts: Callable[[float, str], bool]) -> None:
        self._counts = counts
        self._heap: list[tuple[float, str]] = []
        self._limit = _SPARE

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time: float, request_id: str) -> None:
        if len(self._heap) >= self._limit:
            self._heap = [entry for entry in self._heap if self._counts(*entry)]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + _SPARE
        heapq.heappush(self._heap, (time, request_id))

    def pop_due(self, now: float) -> Iterator[str]:
        """Take out the requests whose time has come, the earliest first."""
        while self._heap and self._heap[0][0] <= now:
            time, request_id = heapq.heappop(self._heap)
            if self._counts(time, request_id):
                yield request_id

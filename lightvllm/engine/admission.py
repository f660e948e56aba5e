"""How many requests may wait, and when those that are refused should come again."""

from __future__ import annotations

import time
from collections import deque

from lightvllm.engine.stats import EngineStats
from lightvllm.errors import QueueFull

_WINDOW = 64  # ends of sequences by which the throughput is judged
_SHORTEST, _LONGEST = 1.0, 60.0  # seconds


class Admission:
    """Counts the sequences that a front has under way.

    Those beyond what the engine runs at a time are waiting: beyond ``max_num_seqs``, or beyond what is running if the
    engine says that some are waiting (for blocks of KV cache, for their prompts' turn).
    """

    def __init__(self, max_num_seqs: int, max_num_waiting: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_num_waiting = max_num_waiting
        self._under_way = 0
        self._ends: deque[float] = deque(maxlen=_WINDOW)

    def admit(self, num_seqs: int, stats: EngineStats) -> None:
        """Count a request of so many sequences; raises QueueFull if as many are waiting as may."""
        running = self._max_num_seqs if not stats.num_waiting else stats.num_running
        waiting = self._under_way - running
        if waiting >= self._max_num_waiting:
            seconds = self._seconds_until_room(waiting - self._max_num_waiting + 1)
            raise QueueFull(
                f"{max(0, waiting)} sequences are waiting and max_num_waiting={self._max_num_waiting}; try again in "
                f"about {seconds:.0f} s",
                seconds,
            )
        self._under_way += num_seqs

    def ended(self, num_seqs: int) -> None:
        """So many have come to their end."""
        self.left(num_seqs)
        self._ends.extend([time.monotonic()] * num_seqs)

    def left(self, num_seqs: int) -> None:
        """So many are no more under way, whatever the reason."""
        self._under_way -= num_seqs

    def _seconds_until_room(self, num_seqs: int) -> float:
        """At the pace of the latest ends; a guess when there were too few."""
        if len(self._ends) < 2:
            return _SHORTEST
        pace = len(self._ends) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(max(num_seqs / pace, _SHORTEST), _LONGEST)

"""Ray's shared-memory channels, read with patience.

A Ray channel's reader spins: a worker whose compiled graph has nothing to do keeps a core busy, and so does a driver
that waits for a slow step. Here a reader spins for a moment only, in which the next value of a busy graph comes, and
then looks again and again, never letting more time pass than a twentieth of what it has waited, nor more than
``_LONGEST_PAUSE``. Also, Ray's ``_buffer_size_bytes`` does not reach the channels of a worker; here it does.

Imported where a graph is compiled and, with Ray's pickles, in its workers; the only module that imports ray outright.
"""

from __future__ import annotations

import time
from typing import Any

from ray.dag import DAGContext
from ray.exceptions import RayChannelTimeoutError
from ray.experimental.channel.shared_memory_channel import CompositeChannel, SharedMemoryType

_SPIN = 0.002  # seconds; Ray counts in milliseconds
_SHORTEST_PAUSE = 50e-6
_LONGEST_PAUSE = 0.01


class PatientChannel(CompositeChannel):  # type: ignore[misc]
    """See the module's docstring; otherwise Ray's CompositeChannel."""

    _waiting_since: float | None = None

    def __reduce__(self) -> Any:
        return type(self), super().__reduce__()[1]

    def read(self, timeout: float | None = None) -> Any:
        """The next value. ``timeout`` is in seconds, None or -1 for ever; raises RayChannelTimeoutError."""
        now = time.monotonic()
        deadline = float("inf") if timeout is None or timeout == -1 else now + timeout
        spin = 0.0
        if self._waiting_since is None:
            self._waiting_since = now
            spin = min(_SPIN, deadline - now)
        while True:
            try:
                value = super().read(spin)
            except RayChannelTimeoutError:
                now = time.monotonic()
                if now >= deadline:
                    raise
                pause = min(max((now - self._waiting_since) / 20, _SHORTEST_PAUSE), _LONGEST_PAUSE)
                time.sleep(min(pause, deadline - now))
                spin = 0.0
            else:
                self._waiting_since = None
                return value


class PatientMemory(SharedMemoryType):  # type: ignore[misc]
    """The type of nodes whose results go through PatientChannels with ``num_shm_buffers`` buffers each."""

    def create_channel(
        self, writer: Any, reader_and_node_list: list[tuple[Any, str]], driver_actor_id: str | None = None
    ) -> PatientChannel:
        context = DAGContext.get_current()
        default, context.buffer_size_bytes = context.buffer_size_bytes, self.buffer_size_bytes
        try:
            return PatientChannel(writer, reader_and_node_list, self._num_shm_buffers, driver_actor_id)
        finally:
            context.buffer_size_bytes = default

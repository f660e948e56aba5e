"""A thread for what workers finish after their methods have returned (``messages.Deferred``). Used by the backends, on
the worker's side; it knows no orchestrator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class LateThread:
    """Runs what it is given, one by one and in order, in a daemon thread of its own, which starts at first need."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, task: Callable[[], object]) -> None:
        """Have ``task``, which must not raise, run after what was put before. Not from two threads at once, and not
        after ``end``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._tasks.put(task)

    def end(self) -> None:
        """The thread ends when what was put has been run."""
        self._tasks.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Return when the thread has ended, or after ``timeout`` seconds; in the thread itself at once.

        ``end`` comes before."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # and with it what it held (a step's tensors), which would otherwise live until the next one comes

"""The folder where models and compiled kernels are kept, and one process at a time that changes a part of it.

Imports nothing but the standard library; both sides use it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL = 0.05  # seconds


def cache_dir() -> Path:
    """``$LIGHTVLLM_CACHE``, or ``~/.cache/lightvllm``."""
    return Path(os.environ.get("LIGHTVLLM_CACHE") or "~/.cache/lightvllm").expanduser()


@contextmanager
def locked(path: Path, timeout: float, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the exclusive lock on ``path``; the kernel drops it when its holder ends, however it ends.

    ``on_wait`` is called once if another process holds it. Raises TimeoutError after ``timeout`` seconds.
    """
    deadline, waiting = time.monotonic() + timeout, False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    on_wait()
                    waiting = True
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                time.sleep(_POLL)
        yield

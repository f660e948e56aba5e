"""Waiting for a condition, with a limit; whether a process is gone; whether files were left open."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable
from typing import Any

import psutil

LIMIT = 60.0  # seconds that any one wait of the tests may take


def wait_until(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """The first true value of ``condition()``; fails the test after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what}"
        time.sleep(0.01)
    return value


def gone(pid: int) -> bool:
    """Whether the process has ended; one that only waits to be reaped has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def open_files() -> dict[int, str]:
    """What this process holds open, by descriptor; what is only left to the collector has gone first."""
    gc.collect()
    held = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since: the listing's own among them
            held[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return held


def no_more_files_than(before: dict[int, str], limit: float = 10.0) -> None:
    """Fails the test unless no more is open than ``before`` (`open_files`), within ``limit`` seconds.

    Others in this process (a Ray driver, a thread that ends) open and close files of their own meanwhile, so it is
    the number that must come back, not each one; the message names what is new.
    """
    deadline = time.monotonic() + limit
    while len(held := open_files()) > len(before):
        new = sorted(f"{fd} -> {link}" for fd, link in held.items() if before.get(fd) != link)
        assert time.monotonic() < deadline, f"{len(held) - len(before)} more open than before; new: {new}"
        time.sleep(0.05)

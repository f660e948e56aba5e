"""Worker classes for the contract tests: no torch, no model, only behaviour that can be observed from outside."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path


class ContractWorker:
    """Records what is asked of it."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self._busy = threading.Lock()
        self.overlaps = 0

    def echo(self, value: object) -> object:
        return value

    def pid(self) -> int:
        return os.getpid()

    def getenv(self, name: str) -> str | None:
        return os.environ.get(name)

    def append(self, value: object) -> int:
        """Notes an overlap if another call is running at the same time."""
        if not self._busy.acquire(blocking=False):
            self.overlaps += 1
            return -1
        try:
            time.sleep(0.001)
            self.log.append(value)
            return len(self.log)
        finally:
            self._busy.release()

    def read_log(self) -> tuple[list[object], int]:
        return self.log, self.overlaps

    def boom(self, text: str) -> None:
        raise ValueError(text)

    def touch_and_hang(self, path: str, seconds: float = 60.0) -> None:
        Path(path).touch()
        time.sleep(seconds)

    def kill_yourself(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def exit_yourself(self, code: int) -> None:
        sys.exit(code)

    def sample_tokens(self, grammar: object) -> tuple[str, object]:
        return ("sampled", grammar)

    def check_health(self) -> None:
        """Well."""


class FailsToStart:
    def __init__(self) -> None:
        raise RuntimeError("no such device")


class HangsAtStart:
    def __init__(self) -> None:
        time.sleep(60)

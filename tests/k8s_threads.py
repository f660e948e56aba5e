"""A worker class that tells which thread it is used in."""

from __future__ import annotations

import atexit
import threading
from pathlib import Path


class Threads:
    def __init__(self) -> None:
        self._constructed_in = threading.get_ident()

    def constructed_in(self) -> int:
        return self._constructed_in

    def thread(self) -> int:
        return threading.get_ident()

    def touch_at_exit(self, path: str) -> None:
        atexit.register(Path(path).touch)

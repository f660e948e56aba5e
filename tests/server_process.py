"""Servers in processes of their own, for tests: started, found by the URL that they print, and always ended."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from waiting import LIMIT, wait_until

HERE = Path(__file__).parent
URL = re.compile(r"(?:https?://|unix:)\S+?(?=;|\s|$)")


class ServerProcess:
    """A started server, and what it has printed so far."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=env,
            start_new_session=True,  # so that a test can signal the whole group as a terminal does
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lines.extend, args=(pipe,), daemon=True)
            for pipe, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def url(self) -> str:
        """Where it listens; waits until it says so."""
        return wait_until(lambda: self.seen(URL.pattern), "the server prints its URL")

    def seen(self, pattern: str) -> str | None:
        """What matches in its output."""
        if self.process.poll() is not None:
            for reader in self._readers:
                reader.join(LIMIT)
        found = re.search(pattern, "".join([*self.out, *self.err]))
        if found is None:
            assert self.process.poll() is None, f"it has ended with {self.process.returncode}: {self.text}"
        return found and found[0]

    def ready(self) -> str:
        """The URL, once the model is loaded."""
        wait_until(lambda: self.seen(r"(?m)^ready"), "the server is ready")
        return self.url

    @property
    def text(self) -> str:
        return "".join([*self.out, *self.err])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit status."""
        status = self.process.wait(limit)
        for reader in self._readers:
            reader.join(limit)
        return status


@contextlib.contextmanager
def started(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    server = ServerProcess(command, env)
    try:
        yield server
    finally:
        children = server.children() if server.process.poll() is None else []
        server.process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        server.wait()
        for pipe in (server.process.stdout, server.process.stderr):
            assert pipe is not None
            pipe.close()


def scripted(**given: Any) -> contextlib.AbstractContextManager[ServerProcess]:
    """``scripted_server.py``, which says what it can be given."""
    return started([sys.executable, str(HERE / "scripted_server.py"), json.dumps(given)])

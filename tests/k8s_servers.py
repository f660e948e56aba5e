"""For the tests of the Kubernetes backend: servers as users start them, and a bare gRPC client."""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import LIMIT, wait_until

WORKER = "contract_worker:ContractWorker"
TESTS = str(Path(__file__).parent)


def write_token(folder: Path) -> str:
    """A token file as the documentation says to make one; its path."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_urlsafe(32) + "\n")
    return str(path)


def session_stub(channel: Any) -> Any:
    """Session with its messages as messages, not as bytes."""
    from lightvllm.backends.k8s import wire
    from lightvllm.proto import worker_pb2 as pb

    return channel.stream_stream(f"/{wire.SERVICE}/Session", pb.Call.SerializeToString, pb.Reply.FromString)


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports that nobody has, below those that the system gives out by itself."""
    for first in random.sample(range(12_000, 32_000, count), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError(f"no {count} consecutive ports are free")


class WorkerCommand:
    """``lightvllm worker`` as a child process, in a process group of its own.

    Attributes:
        lines: what it has printed so far, stdout and stderr together.
    """

    def __init__(self, *options: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from lightvllm.cli.main import run; run()", "worker", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self.lines.extend(iter_lines(stream))

    def find(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Wait for the ``count``-th line in which ``pattern`` is found."""

        def search() -> re.Match[str] | None:
            found = [match for line in list(self.lines) if (match := re.search(pattern, line))]
            if len(found) < count:
                assert self.process.poll() is None or self._reader.is_alive(), f"it has ended: {self.lines}"
                return None
            return found[count - 1]

        return wait_until(search, f"{pattern!r} in what it prints: {self.lines}")  # type: ignore[no-any-return]

    def address(self, count: int = 1) -> str:
        return self.find(r"listening on (\S+)", count)[1]

    def server_pid(self, count: int = 1) -> int:
        """Process id of the ``count``-th server process."""
        return int(self.find(r"(?:listening|ready).*\(process (\d+)\)", count)[1])

    def end(self, number: int = signal.SIGTERM, limit: float = LIMIT) -> int:
        """Send a signal; its exit status."""
        self.process.send_signal(number)
        return self.wait(limit)

    def wait(self, limit: float = LIMIT) -> int:
        status = self.process.wait(limit)
        self._reader.join(limit)
        return status


def iter_lines(stream: Any) -> Iterator[str]:
    for line in stream:
        yield line.rstrip("\n")


@contextlib.contextmanager
def worker_command(*options: str, env: dict[str, str] | None = None) -> Iterator[WorkerCommand]:
    command = WorkerCommand(*options, env=env)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.end(signal.SIGKILL)


@contextlib.contextmanager
def script(code: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python program as a child process, in a process group of its own; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **options.pop("env", {})},
        **options,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()

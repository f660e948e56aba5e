"""``lightvllm worker``: keeps worker servers running at their addresses, a fresh process for each driver.

The parent imports neither torch nor grpc and holds no state; all that a driver has done to a worker (memory, process
groups, a stuck collective) ends with the child that served it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.reflection import require as require_reflection
from lightvllm.backends.k8s.security import LAST_PORT, Tls, Token, check_address, split_address
from lightvllm.errors import ConfigError, MissingExtra

_LISTEN_SECONDS = 60.0  # for a child to import what it needs and to listen
_END_SECONDS = 1.0  # from hanging up to SIGKILL


def supervise(
    listen: str,
    token: Token,
    tls: Tls | None,
    max_message_bytes: int,
    say: Callable[[str], None],
    *,
    workers: int = 1,
    reflection: bool = False,
) -> NoReturn:
    """Serve at ``listen`` ("host:port", port 0 for a free one) until an exception, such as KeyboardInterrupt, ends it;
    no process is left then.

    ``workers`` servers listen at as many consecutive ports, or free ones, each for a driver of its own. ``say`` is told
    the addresses, in this order, once they can be connected to, and of every restart. ``reflection`` has the servers
    answer server reflection, to those who show the token.

    Raises:
        ConfigError: an address is malformed, occupied, or not loopback while ``tls`` is None.
        PlacementError: a server process cannot be started.
        MissingExtra: a package is not installed.
    """
    check_address(listen, tls)
    addresses = _addresses(listen, workers)
    for module, package in (("grpc", "grpcio"), ("grpc_health", "grpcio-health-checking")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(package, "k8s", "lightvllm worker")
    if reflection:
        require_reflection()
    start = functools.partial(
        WorkerProcess,
        token=token,
        max_message_bytes=max_message_bytes,
        tls=tls,
        reflection=reflection,
        env=os.environ,
        capture=False,
    )
    servers = [_Server(address, start) for address in addresses]
    told: queue.SimpleQueue[tuple[str, str | BaseException]] = queue.SimpleQueue()
    try:
        for server in servers:
            server.start()
        for server in servers:
            say(f"listening on {server.wait_listening()} (process {server.pid})")
        for server in servers:
            server.keep_running(told.put)
        while True:
            address, event = told.get()
            if isinstance(event, BaseException):
                raise event
            say(event if workers == 1 else f"{address}: {event}")
    finally:
        for server in servers:
            server.hang_up()
        deadline = time.monotonic() + _END_SECONDS
        for server in servers:
            server.end(deadline)


def _addresses(listen: str, workers: int) -> list[str]:
    """Where each of ``workers`` servers listens. Raises ConfigError if there are not so many ports."""
    if workers < 1:
        raise ConfigError(f"workers={workers}; use 1 or more")
    _, first = split_address(listen)
    last = first + workers - 1 if first else 0
    if last > LAST_PORT:
        raise ConfigError(
            f"{workers} workers from {listen} on need the ports {first} to {last}; expected {LAST_PORT} at most: use "
            f"port {LAST_PORT - workers + 1} or a lower one"
        )
    ports = range(first, last + 1) if first else [0] * workers
    return [f"{listen.rpartition(':')[0]}:{port}" for port in ports]


class _Server:
    """One address, and the process that serves it at present."""

    def __init__(self, listen: str, start: Callable[[str], WorkerProcess]) -> None:
        self._listen = listen
        self._start = start
        self._process: WorkerProcess | None = None
        self._lock = threading.Lock()  # no process is started once there is to be none
        self._closed = False

    @property
    def pid(self) -> int:
        return self._current.pid

    @property
    def _current(self) -> WorkerProcess:
        assert self._process is not None  # start comes first
        return self._process

    def start(self) -> bool:
        """Start a process; False if there is to be none any more. Raises PlacementError."""
        with self._lock:
            if not self._closed:
                self._process = self._start(self._listen)
            return not self._closed

    def wait_listening(self) -> str:
        """The address, which stays the same from now on. Raises ConfigError and PlacementError."""
        self._listen = self._current.wait_listening(_LISTEN_SECONDS)
        return self._listen

    def keep_running(self, tell: Callable[[tuple[str, str | BaseException]], None]) -> None:
        """From now on start a fresh process when one has ended. ``tell`` is told of it, and of what makes it fail, with
        the address; it is called in another thread."""
        thread = threading.Thread(target=self._run, args=(tell,), name=f"lightvllm-serve-{self._listen}", daemon=True)
        thread.start()

    def _run(self, tell: Callable[[tuple[str, str | BaseException]], None]) -> None:
        try:
            while True:
                ended = self._current
                ended.exited.wait()
                if not self.start():
                    return
                tell((self._listen, f"process {ended.pid} {ended.reason()}; starting a fresh one"))
                self.wait_listening()
                tell((self._listen, f"ready (process {self.pid})"))
        except BaseException as error:  # noqa: BLE001  raised in the thread that serves
            tell((self._listen, error))

    def hang_up(self) -> None:
        with self._lock:
            self._closed = True
        if self._process is not None:
            self._process.hang_up()

    def end(self, deadline: float) -> None:
        """See ``WorkerProcess.end``."""
        if self._process is not None:
            self._process.end(deadline)

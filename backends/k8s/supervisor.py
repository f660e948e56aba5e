"""``lightvllm worker``: keeps one worker server running at an address, a fresh process for each driver.

The parent imports neither torch nor grpc and holds no state; all that a driver has done to a worker (memory, process
groups, a stuck collective) ends with the child that served it.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import NoReturn

from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.reflection import require as require_reflection
from lightvllm.backends.k8s.security import Tls, Token, check_address
from lightvllm.errors import MissingExtra

_LISTEN_SECONDS = 60.0  # for a child to import what it needs and to listen
_END_SECONDS = 1.0  # from hanging up to SIGKILL


def supervise(
    listen: str,
    token: Token,
    tls: Tls | None,
    max_message_bytes: int,
    say: Callable[[str], None],
    *,
    reflection: bool = False,
) -> NoReturn:
    """Serve at ``listen`` ("host:port", port 0 for a free one) until an exception, such as KeyboardInterrupt, ends it;
    no process is left then.

    ``say`` is told the address once it can be connected to, and of every restart. ``reflection`` has the server answer
    server reflection, to those who show the token.

    Raises:
        ConfigError: the address is malformed, occupied, or not loopback while ``tls`` is None.
        PlacementError: the server process cannot be started.
        MissingExtra: a package is not installed.
    """
    check_address(listen, tls)
    for module, package in (("grpc", "grpcio"), ("grpc_health", "grpcio-health-checking")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(package, "k8s", "lightvllm worker")
    if reflection:
        require_reflection()
    started = False
    while True:
        process = WorkerProcess(
            listen,
            token,
            max_message_bytes=max_message_bytes,
            tls=tls,
            reflection=reflection,
            env=os.environ,
            capture=False,
        )
        try:
            listen = process.wait_listening(_LISTEN_SECONDS)
            say(f"listening on {listen} (process {process.pid})" if not started else f"ready (process {process.pid})")
            started = True
            process.exited.wait()
            say(f"process {process.pid} {process.reason()}; starting a fresh one")
        finally:
            process.end(time.monotonic() + _END_SECONDS)

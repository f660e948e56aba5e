"""Where the workers are: started here, or already running at addresses that were given. Talks to nobody itself."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightvllm.backends.base import Placement
from lightvllm.backends.k8s import devices
from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.security import LAST_PORT, Tls, Token, check_address, split_address
from lightvllm.errors import ConfigError, PlacementError, Shutdown

_SOCKET_PATH_BYTES = 100  # the system's limit is 108, some of which are gRPC's


@dataclass(frozen=True)
class Endpoint:
    """A worker server to connect to.

    Attributes:
        id: names the worker in messages.
        target: where it will listen, ``"unix:/path"`` or ``"host:port"``.
        process: if it is a child of this process.
    """

    id: str
    target: str
    token: Token
    tls: Tls | None = None
    process: WorkerProcess | None = None


class Discovery(Protocol):
    def find(self, request: Placement, on_exit: Callable[[int], None]) -> list[Endpoint]:
        """``world_size`` endpoints, without waiting for them. ``on_exit(index)`` is called when a child ends."""

    def connected(self) -> None:
        """Every endpoint has been connected to; what served only for that may go."""

    def close(self, deadline: float) -> None:
        """Undo ``find``, whether it has returned or not: what still runs at ``deadline`` (monotonic) is killed."""


class LocalProcesses:
    """One child process per worker, each listening on a Unix socket in a directory that only this user can enter."""

    def __init__(self, max_message_bytes: int, gpus: Sequence[str] | None = None, *, show_output: bool = False) -> None:
        """``gpus`` are dealt out to the workers; None for all that this process sees. Raises ConfigError for what is no
        list of GPUs. ``show_output``: see ``WorkerProcess``."""
        if gpus is not None:
            devices.check_ids("local_gpus", gpus)
        self._gpus = gpus
        self._show_output = show_output
        self._max_message_bytes = max_message_bytes
        self._directory: Path | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._started: list[WorkerProcess] = []

    def find(self, request: Placement, on_exit: Callable[[int], None]) -> list[Endpoint]:
        if request.strategy == "STRICT_SPREAD" and request.world_size > 1:
            raise PlacementError(
                f"0 of {request.world_size} workers: STRICT_SPREAD needs as many nodes, local workers have one; "
                "use PACK or SPREAD, or give k8s_workers on different nodes"
            )
        env = {**request.env, **os.environ, **request.env_overrides}
        gpus = devices.own_gpus(env) if self._gpus is None else list(self._gpus)
        whose = "this machine has" if self._gpus is None else "local_gpus names"
        shares = devices.deal_gpus(gpus, request.world_size, request.gpus_per_worker, whose)
        token = Token.new()
        directory = self._directory = private_directory()
        endpoints = []
        for index, share in enumerate(shares):
            listen = f"unix:{directory}/{index}.sock"
            own = {devices.VISIBLE: ",".join(share)} if share else {}
            with self._lock:
                if self._closed:
                    raise Shutdown("the backend has been shut down")
                process = WorkerProcess(
                    listen,
                    token,
                    max_message_bytes=self._max_message_bytes,
                    env={**env, **own},
                    show_output=self._show_output,
                    on_exit=functools.partial(on_exit, index),
                )
                self._started.append(process)
            endpoints.append(Endpoint(f"local-{index}", listen, token, process=process))
        return endpoints

    def connected(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def close(self, deadline: float) -> None:
        with self._lock:
            self._closed = True
        for process in self._started:
            process.hang_up()
        for process in self._started:
            process.end(deadline)
        self.connected()


class StaticAddresses:
    """Servers that somebody has started with ``lightvllm worker``."""

    def __init__(self, addresses: tuple[str, ...], token: Token, tls: Tls | None, gpus_per_pod: int = 1) -> None:
        """``gpus_per_pod`` servers are at each address, at consecutive ports from the one that is named.

        Raises ConfigError for a malformed or repeated address, and for one that the token must not be sent to.
        """
        for address in addresses:
            check_address(address, tls)
        self._pods, self._gpus_per_pod = len(addresses), gpus_per_pod
        self._addresses = _expand(addresses, gpus_per_pod)
        self._token, self._tls = token, tls

    def find(self, request: Placement, on_exit: Callable[[int], None]) -> list[Endpoint]:
        """The first ``world_size`` addresses, so that one list serves every layout."""
        if len(self._addresses) < request.world_size:
            pods, each = self._pods, self._gpus_per_pod
            have = f"{pods} workers" if each == 1 else f"{pods} pods of {each} workers, {pods * each} in all"
            how = "lightvllm worker" if each == 1 else f"lightvllm worker --workers {each}"
            raise ConfigError(
                f"k8s_workers names {have}, this layout needs {request.world_size}; start more with: {how}"
            )
        return [Endpoint(address, address, self._token, self._tls) for address in self._addresses[: request.world_size]]

    def connected(self) -> None:
        """Nothing to do."""

    def close(self, deadline: float) -> None:
        """Nothing to do: others started them."""


def _expand(pods: tuple[str, ...], gpus_per_pod: int) -> list[str]:
    """The addresses of all workers, pod by pod, port by port. Raises ConfigError for a port that cannot be, and for an
    address that stands for two workers."""
    if gpus_per_pod < 1:
        raise ConfigError(f"k8s_gpus_per_pod={gpus_per_pod}; use 1 or more")
    pod_of: dict[str, str] = {}  # by worker
    for pod in pods:
        _, first = split_address(pod)
        last = first + gpus_per_pod - 1
        if first == 0 or last > LAST_PORT:
            ports = f"ports {first} to {last} ({gpus_per_pod} workers)" if gpus_per_pod > 1 else f"port {first}"
            raise ConfigError(f"k8s_workers: {pod} stands for {ports}; a worker's port is one of 1 to {LAST_PORT}")
        for port in range(first, last + 1):
            worker = f"{pod.rpartition(':')[0]}:{port}"
            if (other := pod_of.get(worker)) == pod:
                raise ConfigError(f"k8s_workers names {pod} more than once; a worker has one driver")
            if other is not None:
                raise ConfigError(
                    f"k8s_workers: {other} and {pod} both stand for {worker} (each for {gpus_per_pod} consecutive "
                    "ports); name the first port of each pod"
                )
            pod_of[worker] = pod
    return list(pod_of)


def private_directory() -> Path:
    """A new directory with mode 0700, with a path short enough for a socket in it."""
    directory = Path(tempfile.mkdtemp(prefix="lightvllm-"))
    if len(os.fsencode(directory)) > _SOCKET_PATH_BYTES - len("/99999.sock.direct"):
        with contextlib.suppress(OSError):
            directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="lightvllm-", dir="/tmp"))
    return directory

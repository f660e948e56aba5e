"""Where the workers are: started here, already running at addresses that were given, or in a headless Service's pods.

Talks to no worker itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lightvllm.backends.base import Placement
from lightvllm.backends.k8s import devices, names
from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.security import LAST_PORT, Tls, Token, check_address, split_address
from lightvllm.errors import ConfigError, PlacementError, Shutdown

if TYPE_CHECKING:
    from dns.resolver import Resolver

_SOCKET_PATH_BYTES = 100  # the system's limit is 108, some of which are gRPC's
_SRV_SECONDS = (2.0, 5.0)  # for one look at a Service's SRV records; between two
_LASTING_SECONDS = 5.0  # NXDOMAIN is no more a pod's first moments after so long

Locate = Callable[[float], list[str]]
"""Addresses ``"ip:port"`` of a worker as they are now, looked up within so many seconds; raises names.Unresolved."""


@dataclass(frozen=True)
class Endpoint:
    """A worker server to connect to.

    Attributes:
        id: names the worker in messages.
        target: where it will listen, ``"unix:/path"`` or ``"host:port"``; its certificate is for that host.
        process: if it is a child of this process.
        locate: if the host is to be looked up here, anew at each attempt to connect.
    """

    id: str
    target: str
    token: Token
    tls: Tls | None = None
    process: WorkerProcess | None = None
    locate: Locate | None = None


class Discovery(Protocol):
    def decision(self, request: Placement) -> str:
        """For progress, once ``find`` has succeeded: which workers are taken."""

    def find(self, request: Placement, on_exit: Callable[[int], None]) -> list[Endpoint]:
        """``world_size`` endpoints, without waiting for them. ``on_exit(index)`` is called when a child ends."""

    def remarks(self, final: bool = False) -> list[str]:
        """What is known of why workers are missing, or looks wrong, each in a line. ``final``: the time is up."""

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

    def decision(self, request: Placement) -> str:
        return f"workers: {request.world_size} process{'es' * (request.world_size > 1)} on this machine"

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

    def remarks(self, final: bool = False) -> list[str]:
        return []

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

    def decision(self, request: Placement) -> str:
        return f"workers: the first {request.world_size} of {len(self._addresses)} behind k8s_workers"

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

    def remarks(self, final: bool = False) -> list[str]:
        return []

    def connected(self) -> None:
        """Nothing to do."""

    def close(self, deadline: float) -> None:
        """Nothing to do: others started them."""


class ServicePods:
    """Pods ``PREFIX-0``, ``PREFIX-1``, … of a headless Service, found by DNS; ranks go by a pod's index."""

    def __init__(
        self,
        service: str,
        token: Token,
        tls: Tls | None,
        gpus_per_pod: int = 1,
        pod_prefix: str | None = None,
        first_pod: int = 0,
        resolver: Resolver | None = None,
    ) -> None:
        """Asks no name server yet.

        Args:
            service: ``NAME[.NAMESPACE[.svc[.DOMAIN]]][:PORT]``.
            gpus_per_pod: servers in each pod, at as many consecutive ports.
            pod_prefix: the StatefulSet's name, if it is not the Service's without ``-headless``.
            first_pod: index of the first pod that is used.
            resolver: asked in place of the system's name servers.

        Raises:
            ConfigError: the name is malformed or its namespace unknown, a port cannot be, TLS is missing.
            MissingExtra: dnspython is not installed.
        """
        self._service = names.ServiceName.parse(service)
        default = self._service.default_pod_prefix
        self._prefix = names.check_pod_prefix(default if pod_prefix is None else pod_prefix)
        if tls is None:
            raise ConfigError(
                f"k8s_service={service!r} needs mutual TLS, for the token would cross the network in the clear: give "
                "k8s_tls_cert, k8s_tls_key and k8s_tls_ca"
            )
        if gpus_per_pod < 1:
            raise ConfigError(f"k8s_gpus_per_pod={gpus_per_pod}; use 1 or more")
        if (last := self._service.port + gpus_per_pod - 1) > LAST_PORT:
            raise ConfigError(
                f"k8s_service={service!r} with k8s_gpus_per_pod={gpus_per_pod} stands for ports {self._service.port} "
                f"to {last}; the last port is {LAST_PORT}"
            )
        self._token, self._tls, self._gpus_per_pod, self._first = token, tls, gpus_per_pod, first_pod
        self._dns = names.ServiceDns(self._service, resolver)
        self._pods = range(0)
        self._lock = threading.Lock()  # guards what follows
        self._missing: dict[str, float] = {}  # pods whose names are not there, and since when
        self._srv_says = ""
        self._next_srv = 0.0

    def decision(self, request: Placement) -> str:
        pods = self._pods
        which = f"pod {self._prefix}-{pods[0]}"
        if len(pods) > 1:
            which = f"pods {self._prefix}-{pods[0]} to {self._prefix}-{pods[-1]}"
        each = f", {self._gpus_per_pod} workers in each" if self._gpus_per_pod > 1 else ""
        named = " or ".join(self._dns.names)
        return f"workers: {which} of headless Service {named}, by DNS, port {self._service.port}{each}"

    def find(self, request: Placement, on_exit: Callable[[int], None]) -> list[Endpoint]:
        self._pods = self._indices(request)
        endpoints = []
        for index in self._pods:
            pod = f"{self._prefix}-{index}"
            endpoints += [
                Endpoint(
                    id=pod if self._gpus_per_pod == 1 else f"{pod}:{port}",
                    target=f"{pod}.{self._service.text}:{port}",
                    token=self._token,
                    tls=self._tls,
                    locate=functools.partial(self._locate, pod, port),
                )
                for port in range(self._service.port, self._service.port + self._gpus_per_pod)
            ]
        return endpoints

    def remarks(self, final: bool = False) -> list[str]:
        with self._lock:
            said = [self._srv_says] if self._srv_says else []
            now = time.monotonic()
            lasting = [pod for pod, since in self._missing.items() if final or now - since >= _LASTING_SECONDS]
        if lasting:
            said.append(
                f"there is no name {lasting[0]}.{self._dns.names[0]}: is there a pod {lasting[0]}, is serviceName of "
                f"its StatefulSet {self._service.name}, and has that Service publishNotReadyAddresses: true? (A name "
                "server may repeat an old answer for half a minute.)"
            )
        return said

    def connected(self) -> None:
        """Nothing to do."""

    def close(self, deadline: float) -> None:
        """Nothing to do: others started them."""

    def _indices(self, request: Placement) -> range:
        pods, left = divmod(request.world_size, self._gpus_per_pod)
        if left:
            raise ConfigError(
                f"k8s_gpus_per_pod={self._gpus_per_pod} does not divide the {request.world_size} workers of this "
                "layout; use a layout that fills the pods"
            )
        return range(self._first, self._first + pods)

    def _locate(self, pod: str, port: int, timeout: float) -> list[str]:
        try:
            addresses = self._dns.addresses(pod, timeout)
        except names.Unresolved as error:
            with self._lock:
                if isinstance(error, names.NoSuchName):
                    self._missing.setdefault(pod, time.monotonic())
                else:
                    self._missing.pop(pod, None)
            if isinstance(error, names.NoSuchName):
                self._cross_check()
            raise
        with self._lock:
            self._missing.pop(pod, None)
        self._cross_check()
        return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses]

    def _cross_check(self) -> None:
        """Now and then: the Service's SRV records against what is expected. The name server has just answered."""
        limit, pause = _SRV_SECONDS
        with self._lock:
            if time.monotonic() < self._next_srv:
                return
            self._next_srv = time.monotonic() + pause
        try:
            says = names.disagreement(self._dns.srv(limit), self._prefix, self._pods, self._service.port)
        except names.Unresolved as error:
            says = f"SRV records: {error}"
        with self._lock:
            self._srv_says = says


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

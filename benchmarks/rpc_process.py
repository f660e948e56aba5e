"""The parent's end of the contenders of ``rpc.py``: their processes, what CPU time they use, what all of them share."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import secrets
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import psutil

if TYPE_CHECKING:
    from rich.console import Console

_ANSWER_SECONDS = 120.0  # beyond the burst itself
_END_SECONDS = 20.0
_CHILD = Path(__file__).with_name("rpc_child.py")

VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "ERROR"}


class ContenderFailed(Exception):
    """A contender did not start, ended, or did not answer; the text says which and why."""


@dataclass(frozen=True)
class Burst:
    """One burst's calls: microseconds, in order."""

    times: list[float]

    @property
    def p50(self) -> float:
        return statistics.median(self.times)

    @property
    def p99(self) -> float:
        ordered = sorted(self.times)
        return ordered[-(-99 * len(ordered) // 100) - 1]


@dataclass(frozen=True)
class CpuSeconds:
    """User and system time, seconds: of the driver's process, of all its other processes, and of Ray's daemons."""

    driver: float = 0.0
    workers: float = 0.0
    daemons: float = 0.0

    def __sub__(self, other: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(
            self.driver - other.driver, self.workers - other.workers, max(0.0, self.daemons - other.daemons)
        )

    def __add__(self, other: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(self.driver + other.driver, self.workers + other.workers, self.daemons + other.daemons)


class ChildProcess:
    """A process that answers each line of JSON on its standard input with one on its standard output.

    Attributes:
        about: the version of what it measures, as it says itself.
    """

    start_seconds = 240.0
    """Limit for its start, with other processes on the same cores."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        freeze: bool,
        cluster: RayCluster | None,
        output: int | IO[bytes] | None,
        hint: str,
    ) -> None:
        """Start it; ``wait_ready`` waits for it.

        ``freeze``: its workers use the CPU when idle, and are stopped between its bursts.
        ``cluster``: the Ray cluster that it uses, the daemons of which count among its processes.
        ``output``: where its standard error goes; ``hint``: for the error's text if it ends, where that can be read.
        """
        self.name = name
        self.about = ""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # a terminal's Ctrl-C is for the parent, which ends them in order
            env=environment,
        )
        self._freeze, self._cluster, self._hint = freeze, cluster, hint
        self._said = b""
        self._ready = self._frozen = False
        self._workers: list[int] = []
        self._others: list[psutil.Process] = []
        self._driver = psutil.Process(self.process.pid)

    def wait_ready(self) -> dict[str, Any]:
        """What it says when it is ready; its workers are stopped then, if they are to be."""
        answer = self._read(self.start_seconds, "start")
        self.about = answer["about"]
        self._workers = self.find_workers(answer)
        try:
            others = {process.pid: process for process in self._driver.children(recursive=True)}
            for pid in self._workers:  # Ray's are not its children
                others.setdefault(pid, psutil.Process(pid))
                others.update({child.pid: child for child in others[pid].children(recursive=True)})
        except psutil.NoSuchProcess as gone:
            raise ContenderFailed(f"{self.name}: process {gone.pid} ended while it was starting") from None
        self._others = list(others.values())
        self._ready = True
        self.freeze()
        return answer

    def find_workers(self, answer: dict[str, Any]) -> list[int]:
        """Process ids of its workers, given what it has said when it was ready."""
        workers: list[int] = answer["workers"]
        return workers

    def ask(self, order: dict[str, Any], timeout: float, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading tells how it ended
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        return self._read(timeout, what)

    def cpu_seconds(self) -> CpuSeconds:
        """Since the processes began."""
        return CpuSeconds(
            cpu_seconds_of(self.name, [self._driver]),
            cpu_seconds_of(self.name, self._others),
            self._cluster.cpu_seconds() if self._cluster else 0.0,
        )

    @property
    def freezes(self) -> bool:
        """Whether its workers are stopped between its bursts."""
        return self._freeze

    def freeze(self) -> None:
        if self._freeze:
            self._signal_workers(signal.SIGSTOP)
            self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            self._signal_workers(signal.SIGCONT)
            self._frozen = False

    def _signal_workers(self, number: int) -> None:
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _read(self, timeout: float, what: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._said:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ContenderFailed(f"{self.name} did not {what} within {timeout:.0f} s")
            more = os.read(self.process.stdout.fileno(), 2**20)
            if not more:
                raise ContenderFailed(f"{self.name} ended with status {self.process.wait()}{self._hint}")
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(f"{self.name}: {answer['error']}")
        return answer

    def hang_up(self) -> None:
        """Have it end; ``close`` waits for that."""
        self.thaw()
        if not self._ready:  # it does not read its standard input yet
            self.process.terminate()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self) -> None:
        """End it, with force where it does not end by itself; idempotent."""
        self.hang_up()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind
        if self.process.stdout is not None:
            self.process.stdout.close()


class ContenderProcess(ChildProcess):
    """A running contender of ``rpc.py``."""

    def __init__(
        self, name: str, spec: dict[str, Any], python: str, *, freeze: bool, cluster: RayCluster | None, debug: bool
    ) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | VLLM_ENVIRONMENT
        environment["VLLM_RPC_BASE_PATH"] = spec["folder"]  # for its sockets' files, some of which it leaves behind
        if cluster is not None:
            environment |= cluster.environment
        super().__init__(
            name,
            [python, str(_CHILD), json.dumps(spec)],
            environment,
            freeze=freeze,
            cluster=cluster,
            output=None if debug else subprocess.DEVNULL,
            hint="" if debug else "; run again with --debug to see why",
        )

    def burst(self, payload: int, seconds: float, least: int, most: int, warm: int) -> tuple[Burst, CpuSeconds]:
        """``warm`` calls that are not counted, then a burst (``rpc_child.run_burst``) and the CPU time that it took."""
        self.thaw()
        self._run_calls({"payload": payload, "seconds": 0.0, "least": warm, "most": warm})
        before = self.cpu_seconds()
        times = self._run_calls({"payload": payload, "seconds": seconds, "least": least, "most": most})
        used = self.cpu_seconds() - before
        self.freeze()
        return Burst([ns / 1000 for ns in times]), used

    def _run_calls(self, order: dict[str, Any]) -> list[int]:
        limit = order["seconds"] + _ANSWER_SECONDS
        times: list[int] = self.ask(order, limit, f"run a burst with {order['payload']} bytes")["times"]
        return times


def cpu_seconds_of(name: str, processes: Iterable[psutil.Process]) -> float:
    """User and system time since they began. Raises ContenderFailed if one of contender ``name``'s has ended."""
    try:
        return sum(map(_used, processes))
    except psutil.NoSuchProcess as gone:
        raise ContenderFailed(f"{name}: process {gone.pid} has ended") from None


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class RayCluster:
    """A small local Ray for all contenders that need one; its own processes are ended with this one.

    Attributes:
        address: ``host:port``.
        temp_dir: its folder.
        environment: variables that whoever connects needs.
    """

    def __init__(self, num_gpus: int | None = None) -> None:
        """``num_gpus``: to count with; None for those that Ray finds."""
        from lightvllm.backends.ray.cluster import LocalCluster, LocalClusterConfig

        self._local = LocalCluster(LocalClusterConfig(object_store_memory=200 * 2**20, num_gpus=num_gpus))
        self.environment = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"), "RAY_USAGE_STATS_ENABLED": "0"}
        self.temp_dir = self._local.temp_dir
        self._daemons: list[psutil.Process] = []
        try:
            self._local.wait_ready(Future())
            self.address = Path(self.temp_dir, "ray_current_cluster").read_text().strip()
            self.find_daemons()
        except BaseException:
            self.close()
            raise

    def find_daemons(self) -> None:
        """Take those that run now; to be called while no contender has its workers here."""
        self._daemons = [psutil.Process(pid) for pid in self.members()]

    def members(self) -> list[int]:
        """The process ids of its daemons and of all workers that run in it now."""
        from lightvllm.backends.ray.head import session_members

        return session_members(self._local.session)

    def cpu_seconds(self) -> float:
        used = 0.0
        for process in self._daemons:
            with contextlib.suppress(psutil.NoSuchProcess):
                used += _used(process)
        return used

    def close(self) -> None:
        self._local.stop()


# ------------------------------------------------------------------------------ what proves who is who


def write_secrets(folder: Path) -> None:
    """A token, a certificate authority, and certificates of a driver and of workers at 127.0.0.1, valid for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def write(name: str, content: bytes) -> None:
        path = folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)

    def sign(name: str, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=False)
            .sign(authority, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    write("token", secrets.token_urlsafe(32).encode() + b"\n")
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark-ca")])
    write("ca.pem", sign("benchmark-ca", authority.public_key(), x509.BasicConstraints(ca=True, path_length=None)))
    for name in ("driver", "worker"):
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        write(f"{name}-cert.pem", sign(name, key.public_key(), names))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write(f"{name}-key.pem", private)


def describe_machine(versions: Sequence[str]) -> dict[str, Any]:
    """Cores, processor, memory, load, kernel, Python, and the versions of ``versions`` that are installed."""
    import platform
    from importlib import metadata

    found = {}
    for package in versions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": model or platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}",
        "versions": found,
    }


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB, {machine['system']}, "
        f"load {machine['load'][0]}\n{machine['python']}, {versions}"
    )


# --------------------------------------------------------------------------------------- being broken off


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not break off the ending of processes, which takes a limited time."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_interrupt(*_: object) -> NoReturn:
    """A handler: SIGTERM ends a benchmark as Ctrl-C does."""
    raise KeyboardInterrupt

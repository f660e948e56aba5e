"""Which Ray cluster this process talks to, and who ends it.

Ray allows a process one connection, so it is shared: the first ``connect`` makes it, the last ``Lease.release`` ends
what was begun here and nothing else. Three cases: this process uses Ray already (then that is used and left alone);
an address is given, or RAY_ADDRESS is set (attach, and detach at the end); neither (a small local cluster, see
``head.py``, which is ended with the last lease).

Only the modules of this package import ray, and only when a worker is to be placed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import lightvllm
from lightvllm.backends.ray import head
from lightvllm.errors import ConfigError, MissingExtra, PlacementError, Shutdown

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DETACH_SECONDS = 2.0
_LONGEST_TEMP_ROOT = 20  # characters; Ray puts sockets some 80 characters deeper, and their paths end at 107


class LocalClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster that is started where none is given.

    Attributes:
        object_store_memory: shared memory for payloads over 100 KB, bytes; more spills to disk.
        logical_cpus: what Ray counts with. Nothing is pinned or limited by it, and Ray starts no more processes for it;
            it is large so that any number of workers and engines of one process fit.
        num_gpus: GPUs to count with; None for those that Ray finds.
        log_to_driver: have the workers' standard output and error appear on the driver's.
    """

    object_store_memory: int = 200 * 2**20
    logical_cpus: int = 1024
    num_gpus: int | None = None
    log_to_driver: bool = False


def import_ray() -> Any:
    """The real ray, or MissingExtra."""
    try:
        import ray
    except ModuleNotFoundError as missing:
        if missing.name != "ray":
            raise
        raise MissingExtra("ray", "ray", "--executor ray") from None
    except ImportError as error:
        if "lightvllm" not in str(error):
            raise
        raise ConfigError(str(error)) from None
    return ray


def one_line(error: BaseException, limit: int = 300) -> str:
    """A foreign error's text on one line: the last line of a traceback, or the whole of a message, up to a limit."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if not lines:
        return type(error).__name__
    text = lines[-1] if any(line.startswith(("Traceback", 'File "')) for line in lines) else " ".join(lines)
    return text if len(text) <= limit else text[:limit] + " …"


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in a thread of its own, so that waiting for it can have an end."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised where the future is looked at
            future.set_exception(error)

    threading.Thread(target=run, name="lightvllm-ray-work", daemon=True).start()
    return future


def require_ray() -> None:
    """MissingExtra unless ray is installed; without the half second that importing it takes."""
    if "ray" not in sys.modules and importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", "ray", "--executor ray")


def _in_use() -> bool:
    """Whether this process is connected to Ray, by us or by others."""
    return "ray" in sys.modules and bool(import_ray().is_initialized())


class Lease:
    """A share in this process's connection to Ray."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._released = False
        self.is_local = connection.local is not None

    @property
    def ends_cluster(self) -> bool:
        """Whether releasing it ends every process of the cluster."""
        return self.is_local and self._connection.users == 1

    def release(self) -> None:
        """Give the share back; idempotent. The last share of a connection made here ends it."""
        with _guard:
            if self._released:
                return
            self._released = True
            self._connection.users -= 1
            if self._connection.users == 0:
                self._connection.end()


class _Connection:
    def __init__(self, address: str, local: LocalCluster | None, made_here: bool) -> None:
        self.address = address
        self.local = local
        self.made_here = made_here
        self.users = 0

    def end(self) -> None:
        global _current
        mine, _current = _current is self, None if _current is self else _current
        if mine and self.made_here:
            # Without the cluster's GCS it would go on trying for a minute; the processes are to be gone long before.
            detaching = threading.Thread(target=import_ray().shutdown, name="lightvllm-ray-detach", daemon=True)
            detaching.start()
            detaching.join(_DETACH_SECONDS)
        if self.local is not None:
            self.local.stop()


_guard = threading.Lock()  # held while the connection is made, shared or ended
_current: _Connection | None = None


def connect(address: str | None, config: LocalClusterConfig, closing: Future[None]) -> Lease:
    """Take a share in this process's connection to Ray, making it first if there is none.

    Blocks until Ray answers, however long that takes, so it is run in a thread of its own; when ``closing`` is done
    it gives up and undoes what it has begun. Raises PlacementError, ConfigError, MissingExtra or Shutdown.
    """
    global _current
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address and "://" in address:
        raise ConfigError(f"ray address {address!r}: Ray Client is not supported; give host:port or auto")
    with _guard:
        _check_open(closing)
        if _current is None or not _in_use():
            _current = _make(address, config, closing)
        elif address not in (None, "auto", _current.address):
            raise PlacementError(
                f"this process is connected to Ray at {_current.address} already, and Ray allows it one cluster; "
                f"use that one, or another process for {address}"
            )
        _current.users += 1
        lease = Lease(_current)
    if closing.done():
        lease.release()
    _check_open(closing)
    return lease


def _check_open(closing: Future[None]) -> None:
    if closing.done():
        raise Shutdown("the backend has been shut down while it was connecting to Ray")


def _make(address: str | None, config: LocalClusterConfig, closing: Future[None]) -> _Connection:
    if _in_use():
        there = _address()
        if address not in (None, "auto", there):
            raise PlacementError(f"this process uses Ray at {there} already; use that one, or another process")
        return _Connection(there, None, made_here=False)
    if address is not None:
        if address != "auto":
            _check_answers(address)
        _init(address, config)
        return _Connection(_address(), None, made_here=True)
    local = LocalCluster(config)
    try:
        import_ray()  # while the cluster starts
        # It may be ended only now: if it went away under ray.init, that would go on trying.
        local.wait_ready(closing)
        _init("auto", config, _temp_dir=local.temp_dir)
    except BaseException:
        local.stop()
        raise
    return _Connection(_address(), local, made_here=True)


def _address() -> str:
    return str(import_ray().get_runtime_context().gcs_address)


def _init(address: str, config: LocalClusterConfig, **options: str) -> None:
    """``ray.init``, without its talk, and without trying for 20 s where it is refused."""
    ray = import_ray()
    changed = {"RAY_ADDRESS": None, "RAY_gcs_server_port_wait_time_s": "5"}  # the former would override ``auto``
    kept = {name: _set_env(name, value) for name, value in changed.items()}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            address=address,
            namespace=f"lightvllm-{uuid.uuid4().hex[:12]}",
            log_to_driver=config.log_to_driver,
            logging_level=logging.ERROR,
            **options,
        )
    except Exception as error:
        ray.shutdown()
        refused = "AuthToken" in f"{error} {error.__cause__}"
        hint = "; it wants a token: set RAY_AUTH_MODE=token in this program's environment" if refused else ""
        raise PlacementError(
            f"no Ray cluster to use at {address!r}: {one_line(error)}{hint}; "
            "start one with 'ray start --head', or give no address for a local one"
        ) from error
    finally:
        for name, value in kept.items():
            _set_env(name, value)
    if not config.log_to_driver:
        _silence_raylet(ray)


def _set_env(name: str, value: str | None) -> str | None:
    """Set or remove a variable; its value until now."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    return before


def _silence_raylet(ray: Any) -> None:
    """Ray prints a paragraph about each dead worker to standard output, which is the program's own: log it instead.

    Each death is reported once, as WorkerDied. This is no interface of Ray's: where it is missing there is only noise.
    """
    module = ray._private.worker
    printing = getattr(module, "print_to_stdstream", None)
    if printing is None or hasattr(printing, "of_lightvllm"):
        return

    def to_log(data: dict[str, Any], **options: Any) -> None:
        if data.get("pid") == "raylet":
            logger.debug("raylet: %s", " ".join(data["lines"]))
        else:
            printing(data, **options)

    to_log.of_lightvllm = True  # type: ignore[attr-defined]
    module.print_to_stdstream = to_log


def _check_answers(address: str, timeout: float = 5.0) -> None:
    """Ray itself would try for twenty seconds and more."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"ray address {address!r} is malformed; expected host:port or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except (OSError, OverflowError) as error:
        raise PlacementError(
            f"no Ray cluster answers at {address}: {error}; start one there with 'ray start --head', "
            "or give no address for a local one"
        ) from None


class LocalCluster:
    """A Ray head on this machine, in a session of its own, with a temporary folder of its own."""

    def __init__(self, config: LocalClusterConfig) -> None:
        root = tempfile.gettempdir()
        self.temp_dir = tempfile.mkdtemp(
            prefix="lightvllm-ray-",
            dir=root if len(root) <= _LONGEST_TEMP_ROOT else "/tmp",  # noqa: S108
        )
        self._stopping = threading.Lock()
        self._stopped = False
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                head.__file__,
                "hold",
                self.temp_dir,
                "--port=0",
                "--dashboard-agent-listen-port=0",
                "--include-dashboard=false",
                f"--include-log-monitor={config.log_to_driver}",
                "--no-monitor",
                "--disable-usage-stats",
                f"--num-cpus={config.logical_cpus}",
                f"--object-store-memory={config.object_store_memory}",
                f"--temp-dir={self.temp_dir}",
                *([] if config.num_gpus is None else [f"--num-gpus={config.num_gpus}"]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=self._environment(),
        )

    @property
    def session(self) -> int:
        """The session that all of its processes are in."""
        return self._process.pid

    @staticmethod
    def _environment() -> dict[str, str]:
        """The driver's, as for any child of it; with lightvllm importable and Ray's connections authenticated."""
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        env.setdefault("RAY_AUTH_MODE", "token")
        package_root = str(Path(lightvllm.__file__).parent.parent)
        env["PYTHONPATH"] = os.pathsep.join([*filter(None, [env.get("PYTHONPATH")]), package_root])
        return env

    def wait_ready(self, closing: Future[None]) -> None:
        """Return when the cluster runs; raise PlacementError with Ray's last words if it does not come up."""
        up = threading.Event()
        closing.add_done_callback(lambda _: None if up.is_set() else self.stop())
        assert self._process.stdout is not None
        with self._process.stdout as said:
            answer = said.readline().decode(errors="replace").strip()
        up.set()
        if answer != head.READY:
            self.stop()
            _check_open(closing)
            raise PlacementError(f"a local Ray cluster could not be started: {answer or 'it ended without a word'}")

    def stop(self, limit: float = 3.0) -> None:
        """End all of it and remove its folder; idempotent, from any thread."""
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                cleaned = self._process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                cleaned = False
            if not cleaned or Path(self.temp_dir).exists():  # it was killed before it could do its work
                head.end_session(self.session)
                shutil.rmtree(self.temp_dir, ignore_errors=True)

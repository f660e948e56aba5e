"""The local Ray cluster: nothing of it outlives its driver, however that ends; and clusters that are not there."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="the ray extra is not installed")

from waiting import LIMIT, wait_until

from lightvllm.backends.base import Placement
from lightvllm.backends.ray import cluster, head
from lightvllm.backends.ray.backend import RayBackend
from lightvllm.errors import ConfigError, MissingExtra, PlacementError, Shutdown

WORKER = "contract_worker:ContractWorker"


class Driver:
    """A running tests/ray_driver.py and the local cluster that it has started."""

    def __init__(self, worker_class: str, flag: Path) -> None:
        self.flag = flag
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_driver.py")), worker_class, str(flag)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.session = 0
        self.temp_dir = Path()

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        pytest.fail(f"the driver ended without {text!r}")

    def find_cluster(self) -> None:
        """The holding process; its command line names the folder."""

        def find() -> bool:
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    line = child.cmdline()
                    if "hold" in line:
                        self.session, self.temp_dir = child.pid, Path(line[line.index("hold") + 1])
                        return True
            return False

        wait_until(find, "the cluster's first process")

    def nothing_left(self) -> bool:
        return not head.session_members(self.session) and not self.temp_dir.exists()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Callable[[str], Driver]]:
    made: list[Driver] = []

    def make(worker_class: str) -> Driver:
        made.append(Driver(worker_class, tmp_path / f"flag-{len(made)}"))
        return made[-1]

    yield make
    for driver in made:
        driver.end()


@pytest.mark.ray
class TestTheEndOfADriver:
    @pytest.mark.parametrize(
        ("worker_class", "moment", "processes"),
        [
            (WORKER, "waiting for Ray to start", 0),
            (WORKER, "waiting for Ray to start", 2),  # `ray start` and the first that it started
            ("contract_worker:HangsAtStart", "workers 0/1 ready", 2),
            (WORKER, "calling", 2),
        ],
        ids=["starting", "half started", "loading", "calling"],
    )
    def test_ctrl_c_ends_everything_within_three_seconds(
        self, drivers: Callable[[str], Driver], worker_class: str, moment: str, processes: int
    ) -> None:
        driver = drivers(worker_class)
        driver.read_until(moment)
        driver.find_cluster()
        wait_until(lambda: len(head.session_members(driver.session)) >= processes, "Ray's processes")
        if moment == "calling":
            wait_until(driver.flag.exists, "the call to begin")
        started = time.monotonic()
        driver.process.send_signal(signal.SIGINT)
        driver.read_until("interrupted")
        driver.process.wait(LIMIT)
        assert time.monotonic() - started < 3.0
        assert driver.nothing_left()

    def test_sigkill_of_the_driver_leaves_nothing(self, drivers: Callable[[str], Driver]) -> None:
        driver = drivers(WORKER)
        driver.find_cluster()
        wait_until(driver.flag.exists, "the call to begin")
        assert head.session_members(driver.session)
        driver.process.kill()
        wait_until(driver.nothing_left, "the cluster to be gone", 5.0)

    def test_sigkill_of_the_holding_process_is_made_up_for_by_the_driver(
        self, drivers: Callable[[str], Driver]
    ) -> None:
        driver = drivers(WORKER)
        driver.find_cluster()
        wait_until(driver.flag.exists, "the call to begin")
        os.kill(driver.session, signal.SIGKILL)
        driver.process.send_signal(signal.SIGINT)
        driver.read_until("interrupted")
        driver.process.wait(LIMIT)
        assert driver.nothing_left()

    def test_a_cluster_whose_gcs_has_died_is_ended_all_the_same(self, drivers: Callable[[str], Driver]) -> None:
        driver = drivers(WORKER)
        driver.find_cluster()
        wait_until(driver.flag.exists, "the call to begin")
        for pid in head.session_members(driver.session):
            if psutil.Process(pid).name() == "gcs_server":
                os.kill(pid, signal.SIGKILL)
        driver.process.send_signal(signal.SIGINT)
        driver.read_until("interrupted")
        driver.process.wait(10.0)
        assert driver.nothing_left()

    def test_two_processes_at_once_have_a_cluster_each(self, drivers: Callable[[str], Driver]) -> None:
        one, other = drivers(WORKER), drivers(WORKER)
        for driver in (one, other):
            wait_until(driver.flag.exists, "the call to begin")
            driver.find_cluster()
        assert one.temp_dir != other.temp_dir
        one.process.send_signal(signal.SIGINT)
        one.process.wait(LIMIT)
        assert one.nothing_left()
        assert other.process.poll() is None
        assert head.session_members(other.session)


@pytest.mark.ray
def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing() -> None:
    too_little = cluster.LocalCluster(cluster.LocalClusterConfig(object_store_memory=1))
    with pytest.raises(PlacementError, match=r"could not be started: .*object store memory"):
        too_little.wait_ready(Future())
    assert not Path(too_little.temp_dir).exists()
    assert not head.session_members(too_little.session)


ATTACH = """
import sys, psutil
from lightvllm.backends.base import Placement
from lightvllm.backends.ray.backend import RayBackend
from lightvllm.errors import PlacementError
placement = Placement(world_size=1, worker_class="contract_worker:ContractWorker")
for address in (sys.argv[1], None):  # None: RAY_ADDRESS
    backend = RayBackend(address)
    (worker,) = backend.place(placement, lambda *_: None, 60.0)
    assert psutil.pid_exists(worker.pid)
    try:
        RayBackend("127.0.0.1:1").place(placement, lambda *_: None, 60.0)
    except PlacementError as error:
        print(error)
    backend.shutdown()
    print("gone", not psutil.pid_exists(worker.pid) or psutil.Process(worker.pid).status() == psutil.STATUS_ZOMBIE)
"""


@pytest.mark.ray
def test_a_running_cluster_is_used_and_left_running() -> None:
    running = cluster.LocalCluster(cluster.LocalClusterConfig())
    try:
        running.wait_ready(Future())
        address = Path(running.temp_dir, "ray_current_cluster").read_text()
        before = set(head.session_members(running.session))
        without_token = run_python(ATTACH, address, RAY_AUTH_MODE="disabled")
        assert "no Ray cluster to use" in without_token
        assert "set RAY_AUTH_MODE=token" in without_token
        said = run_python(ATTACH, address, RAY_AUTH_MODE="token", RAY_ADDRESS=address)
        assert said.count(f"this process is connected to Ray at {address} already") == 2
        assert said.count("gone True") == 2
        # The GCS, the raylet and the agents are there; Ray comes and goes with idle workers as it likes.
        assert len(before & set(head.session_members(running.session))) >= 4
    finally:
        running.stop()
    assert not head.session_members(running.session)
    assert not Path(running.temp_dir).exists()


def unused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_an_address_where_nobody_listens_fails_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"no Ray cluster answers at 127.0.0.1:\d+: .*refused.*ray start --head"):
        RayBackend(unused_address()).place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, LIMIT)
    assert time.monotonic() - started < 5.0


@pytest.mark.ray
def test_a_listener_that_is_not_ray_fails_within_the_timeout() -> None:
    """In a process of its own, since Ray goes on trying there."""
    script = (
        "import socket, sys\n"
        "from lightvllm.backends.base import Placement\n"
        "from lightvllm.backends.ray.backend import RayBackend\n"
        "from lightvllm.errors import PlacementError\n"
        "deaf = socket.create_server(('127.0.0.1', 0))\n"
        "backend = RayBackend('127.0.0.1:%d' % deaf.getsockname()[1])\n"
        "try:\n"
        "    backend.place(Placement(world_size=1, worker_class='x:Y'), lambda *_: None, 2.0)\n"
        "except PlacementError as error:\n"
        "    print(error, flush=True)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert "0 of 1 workers within 2 s; still waiting to connect to Ray at 127.0.0.1" in done.stdout
    assert time.monotonic() - started < 20.0


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "nonsense", "host:", "host:port"])
def test_an_address_that_is_none_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError, match="ray address"):
        RayBackend(address).place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, LIMIT)


def test_a_backend_that_is_closing_does_not_connect() -> None:
    closing: Future[None] = Future()
    closing.set_result(None)
    with pytest.raises(Shutdown):
        cluster.connect(None, cluster.LocalClusterConfig(), closing)


def run_python(code: str, *arguments: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env=os.environ | env,
    )
    return done.stdout + done.stderr


def test_without_ray_the_install_command_is_given() -> None:
    code = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class WithoutRay:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return None if name == 'ray' else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutRay()\n"
        "from lightvllm.backends.ray.backend import RayBackend\n"
        "from lightvllm.errors import MissingExtra\n"
        "try: RayBackend()\n"
        "except MissingExtra as error: print('got', error)"
    )
    assert "got --executor ray needs the package 'ray'" in run_python(code)
    assert issubclass(MissingExtra, ConfigError)


def test_our_own_folder_in_rays_place_is_explained() -> None:
    backends = Path(cluster.__file__).resolve().parents[1]
    code = (
        "from lightvllm.backends.ray.cluster import import_ray\n"
        "from lightvllm.errors import ConfigError\n"
        "try: import_ray()\n"
        "except ConfigError as error: print('got', error)"
    )
    assert "got the folder 'backends/' is on sys.path" in run_python(code, PYTHONPATH=str(backends))


def test_the_backend_is_imported_without_ray() -> None:
    code = "import sys, lightvllm.backends.ray.backend; print('ray' in sys.modules, 'torch' in sys.modules)"
    assert run_python(code).strip() == "False False"


def test_one_line_of_a_foreign_error() -> None:
    assert cluster.one_line(ValueError("a\n  b\n")) == "a b"
    assert (
        cluster.one_line(ValueError("Traceback (most recent call last):\n  File x\nKeyError: 'k'")) == "KeyError: 'k'"
    )
    assert cluster.one_line(ValueError()) == "ValueError"
    assert len(cluster.one_line(ValueError("x" * 1000))) < 310

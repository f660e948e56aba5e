"""Placement, calls and deaths on one local Ray that these tests share, as two engines in one process do.

What every backend must do is in test_backend_contract.py; the life and death of the cluster in test_ray_cluster.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the ray extra is not installed")

import ray
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.base import Placement, WorkerRef
from lightvllm.backends.ray import cluster
from lightvllm.backends.ray.backend import SHARED_PAYLOAD_BYTES, RayBackend
from lightvllm.errors import ConfigError, LightvllmError, PlacementError, Shutdown, WorkerDied
from lightvllm.messages import decode_reply, encode_call

pytestmark = pytest.mark.ray
WORKER = "contract_worker:ContractWorker"


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """Two GPUs are counted, none is needed."""
    lease = cluster.connect(None, cluster.LocalClusterConfig(num_gpus=2), Future())
    yield
    lease.release()
    assert not ray.is_initialized()


@pytest.fixture
def backends(shared_ray: None) -> Iterator[Callable[[], RayBackend]]:
    made: list[RayBackend] = []

    def make() -> RayBackend:
        made.append(RayBackend())
        return made[-1]

    yield make
    for backend in made:
        backend.shutdown()
    assert living_groups() == []
    assert ray.is_initialized()


def living_groups() -> list[str]:
    return [
        name
        for name, group in ray.util.placement_group_table().items()
        if group["state"] not in ("REMOVED", "INFEASIBLE")
    ]


def place(backend: RayBackend, on_failure: Any = None, **placement: Any) -> list[WorkerRef]:
    request = Placement(**({"world_size": 1, "worker_class": WORKER} | placement))
    return list(backend.place(request, on_failure or (lambda *_: None), LIMIT))


def ask(backend: RayBackend, worker: WorkerRef, method: Any, *args: Any) -> Any:
    name, payload = encode_call(method, args, None)
    return decode_reply(name, backend.call(worker, name, payload).result(LIMIT))


class TestPlacement:
    def test_gpus_are_dealt_out_and_visible(self, backends: Callable[[], RayBackend]) -> None:
        backend = backends()
        workers = place(backend, world_size=2, gpus_per_worker=1)
        assert sorted(worker.device_ids for worker in workers) == [("0",), ("1",)]
        for worker in workers:
            assert ask(backend, worker, "getenv", "CUDA_VISIBLE_DEVICES") == worker.device_ids[0]

    def test_more_gpus_than_there_are_fail_at_once(self, backends: Callable[[], RayBackend]) -> None:
        started = time.monotonic()
        with pytest.raises(
            PlacementError,
            match=r"0 of 4 workers; no room: PACK needs 4 bundles of \{CPU: 1, GPU: 1\}; "
            r"the cluster has 1 node with \{CPU: .* free, GPU: .* of 2 free\}",
        ):
            place(backends(), world_size=4, gpus_per_worker=1)
        assert time.monotonic() - started < 5.0

    def test_two_nodes_where_there_is_one_fail_at_once(self, backends: Callable[[], RayBackend]) -> None:
        with pytest.raises(PlacementError, match=r"STRICT_SPREAD needs 2 bundles .* each on a node of its own"):
            place(backends(), world_size=2, strategy="STRICT_SPREAD")

    @pytest.mark.parametrize("strategy", ["PACK", "SPREAD", "STRICT_PACK"])
    def test_the_other_strategies_fit_one_node(self, backends: Callable[[], RayBackend], strategy: str) -> None:
        backend = backends()
        assert {worker.node for worker in place(backend, world_size=2, strategy=strategy)} == {backend.driver_node}
        (group,) = living_groups()
        assert ray.util.placement_group_table()[group]["strategy"] == strategy

    def test_gpus_that_another_engine_holds_are_waited_for_and_named(self, backends: Callable[[], RayBackend]) -> None:
        place(backends(), world_size=1, gpus_per_worker=2)
        request = Placement(world_size=1, worker_class=WORKER, gpus_per_worker=1)
        with pytest.raises(PlacementError, match=r"0 of 1 workers within 2 s; no room: .*GPU: 0 of 2 free"):
            backends().place(request, lambda *_: None, 2.0)

    def test_gpus_are_not_dealt_by_two(self, backends: Callable[[], RayBackend]) -> None:
        """With a variable of the user's, every actor would see the same ones, whatever Ray has reserved."""
        with pytest.raises(ConfigError, match="Ray deals the GPUs out by CUDA_VISIBLE_DEVICES itself"):
            place(backends(), gpus_per_worker=1, env_overrides={"CUDA_VISIBLE_DEVICES": "0,1"})
        backend = backends()
        (worker,) = place(backend, env_overrides={"CUDA_VISIBLE_DEVICES": ""})  # none is reserved, none is to be seen
        assert ask(backend, worker, "getenv", "CUDA_VISIBLE_DEVICES") == ""

    def test_nothing_to_reserve_is_a_config_error(self, backends: Callable[[], RayBackend]) -> None:
        with pytest.raises(ConfigError, match="cpus_per_worker=0"):
            place(backends(), cpus_per_worker=0)

    def test_placing_twice_is_refused_and_harms_nothing(self, backends: Callable[[], RayBackend]) -> None:
        backend = backends()
        (worker,) = place(backend)
        with pytest.raises(LightvllmError, match="called already"):
            place(backend)
        assert ask(backend, worker, "echo", 1) == 1

    def test_progress_is_told(self, backends: Callable[[], RayBackend]) -> None:
        said: list[str] = []
        backends().place(Placement(world_size=2, worker_class=WORKER), lambda *_: None, LIMIT, said.append)
        assert said[0] == "waiting for Ray to start"
        assert said[1] == "workers 0/2 ready"
        assert said[-1] == "workers 2/2 ready"

    def test_only_the_list_is_propagated(
        self, backends: Callable[[], RayBackend], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LIGHTVLLM_TEST_DRIVER_ONLY", "1")  # after the cluster has been started
        backend = backends()
        (worker,) = place(backend, env={"LIGHTVLLM_TEST_LISTED": "2"})
        assert ask(backend, worker, "getenv", "LIGHTVLLM_TEST_LISTED") == "2"
        assert ask(backend, worker, "getenv", "LIGHTVLLM_TEST_DRIVER_ONLY") is None

    def test_shutdown_from_another_thread_ends_a_placement(self, backends: Callable[[], RayBackend]) -> None:
        backend, said = backends(), threading.Event()
        caught: list[BaseException] = []

        def place_and_catch() -> None:
            request = Placement(world_size=1, worker_class="contract_worker:HangsAtStart")
            try:
                backend.place(request, lambda *_: None, LIMIT, lambda text: said.set() if "0/1" in text else None)
            except BaseException as error:  # noqa: BLE001  looked at below
                caught.append(error)

        thread = threading.Thread(target=place_and_catch)
        thread.start()
        assert said.wait(LIMIT)
        backend.shutdown()
        thread.join(LIMIT)
        assert [type(error) for error in caught] == [Shutdown]
        with pytest.raises(Shutdown):
            place(backend)


class TestCalls:
    def test_every_kind_of_buffer_and_size_arrives(self, backends: Callable[[], RayBackend]) -> None:
        backend = backends()
        workers = place(backend, world_size=2)
        for size in (0, 10, SHARED_PAYLOAD_BYTES + 1):
            name, payload = encode_call("echo", (os.urandom(size),), None)
            replies = [
                backend.call(worker, name, kind(payload)).result(LIMIT)
                for kind in (bytes, bytearray, memoryview)
                for worker in workers
            ]
            assert {bytes(reply) for reply in replies} == {bytes(replies[0])}
            assert len(replies[0]) >= size

    def test_one_large_payload_is_shared_by_the_workers_calls(self, backends: Callable[[], RayBackend]) -> None:
        backend = backends()
        place(backend, world_size=2)
        large, small = bytes(SHARED_PAYLOAD_BYTES), b"x"
        assert backend._argument(large) is backend._argument(large)
        assert backend._argument(bytearray(large)) is not backend._argument(bytearray(large))
        assert backend._argument(small) == small

    def test_a_callback_may_call_ray_again(self, backends: Callable[[], RayBackend]) -> None:
        """Ray's own callbacks run on its I/O thread, where this would never return."""
        backend = backends()
        (worker,) = place(backend)
        second: Future[Any] = Future()
        name, payload = encode_call("echo", (os.urandom(2 * SHARED_PAYLOAD_BYTES),), None)
        backend.call(worker, name, payload).add_done_callback(
            lambda _: second.set_result(backend.call(worker, name, payload))
        )
        assert len(second.result(LIMIT).result(LIMIT)) > SHARED_PAYLOAD_BYTES


class TestDeath:
    def test_an_idle_worker_that_is_killed_is_reported_once_and_soon(self, backends: Callable[[], RayBackend]) -> None:
        backend, reported = backends(), threading.Event()
        reports: list[tuple[WorkerRef, WorkerDied]] = []

        def on_failure(worker: WorkerRef, died: WorkerDied) -> None:
            reports.append((worker, died))
            reported.set()

        dying, well = place(backend, on_failure, world_size=2)
        os.kill(dying.pid, signal.SIGKILL)
        assert reported.wait(1.0)
        with pytest.raises(WorkerDied, match=rf"ray-0 died: process {dying.pid} on .* killed"):
            ask(backend, dying, "echo", 1)
        assert ask(backend, well, "echo", 1) == 1
        backend.shutdown()
        assert [worker for worker, _ in reports] == [dying]

    def test_an_exit_status_is_told(self, backends: Callable[[], RayBackend]) -> None:
        backend = backends()
        (worker,) = place(backend)
        with pytest.raises(WorkerDied, match="exited with status 3"):
            ask(backend, worker, "exit_yourself", 3)

    def test_a_worker_that_dies_while_it_is_constructed_is_a_placement_error(
        self, backends: Callable[[], RayBackend], tmp_path: Path
    ) -> None:
        (tmp_path / "dies_at_start.py").write_text(
            "import os, signal\nclass Dies:\n    def __init__(self): os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        with pytest.raises(PlacementError, match="0 of 1 workers; worker ray-0 died: its process is gone"):
            place(backends(), worker_class="dies_at_start:Dies", env={"PYTHONPATH": str(tmp_path)})

    def test_on_failure_may_shut_down(self, backends: Callable[[], RayBackend]) -> None:
        backend, returned = backends(), threading.Event()

        def on_failure(*_: object) -> None:
            backend.shutdown()
            returned.set()

        dying, well = place(backend, on_failure, world_size=2)
        os.kill(dying.pid, signal.SIGKILL)
        assert returned.wait(10.0)
        assert gone(well.pid)

    def test_an_on_failure_that_raises_is_logged(
        self, backends: Callable[[], RayBackend], caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = backends()

        def on_failure(*_: object) -> None:
            raise RuntimeError("bad callback")

        dying, well = place(backend, on_failure, world_size=2)
        os.kill(dying.pid, signal.SIGKILL)
        wait_until(lambda: "bad callback" in caplog.text, "the log")
        assert ask(backend, well, "echo", 1) == 1

    def test_nothing_of_rays_is_printed(
        self, backends: Callable[[], RayBackend], capfd: pytest.CaptureFixture[str]
    ) -> None:
        backend, reported = backends(), threading.Event()
        (worker,) = place(backend, lambda *_: reported.set())
        capfd.readouterr()
        os.kill(worker.pid, signal.SIGKILL)
        assert reported.wait(5.0)
        backend.shutdown()
        assert capfd.readouterr() == ("", "")


def test_shutdown_takes_the_workers_and_leaves_the_other_engines(backends: Callable[[], RayBackend]) -> None:
    one, other = backends(), backends()
    mine, theirs = place(one, world_size=2), place(other)
    one.shutdown()
    assert all(gone(worker.pid) for worker in mine)
    assert ask(other, theirs[0], "echo", 1) == 1

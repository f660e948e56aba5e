"""The contract of ``backends/base.py``, the same tests on every backend.

Backends whose workers are processes are also held to the tests that kill one; the in-process backend ends a worker by
SystemExit instead.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.base import Backend, Placement, WorkerRef
from lightvllm.backends.inprocess import InProcessBackend
from lightvllm.config import ParallelConfig
from lightvllm.errors import ConfigError, LightvllmError, PlacementError, Shutdown, WorkerDied, WorkerError
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.messages import Deferred, decode_reply, encode_call

WORKER = "contract_worker:ContractWorker"
_numbers = itertools.count()  # a module's name is imported once in a process


def make_inprocess() -> Backend:
    return InProcessBackend()


def make_k8s() -> Backend:
    pytest.importorskip("grpc", reason="the k8s extra is not installed")
    from lightvllm.backends.k8s.backend import KubernetesBackend

    return KubernetesBackend()


def make_k8s_grpc() -> Backend:
    """With the calls on the session's stream, instead of the direct connection beside it."""
    pytest.importorskip("grpc", reason="the k8s extra is not installed")
    from lightvllm.backends.k8s.backend import KubernetesBackend

    return KubernetesBackend(transport="grpc")


def make_ray() -> Backend:
    pytest.importorskip("ray", reason="the ray extra is not installed")
    from lightvllm.backends.ray.backend import RayBackend

    return RayBackend()


BACKENDS = {"uniproc": make_inprocess, "k8s": make_k8s, "k8s-grpc": make_k8s_grpc, "ray": make_ray}
MARKS = {"ray": [pytest.mark.ray]}
ALL = [pytest.param(name, marks=MARKS.get(name, [])) for name in BACKENDS]
PROCESSES = [pytest.param(name, marks=MARKS.get(name, [])) for name in ("k8s", "k8s-grpc", "ray")]


class Failures:
    """Collects ``on_failure`` reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[WorkerRef, WorkerDied]] = []
        self.arrived = threading.Event()

    def __call__(self, worker: WorkerRef, died: WorkerDied) -> None:
        self.reports.append((worker, died))
        self.arrived.set()


def send(backend: Backend, worker: WorkerRef, method: str | Callable[..., Any], *args: Any) -> Future[Any]:
    return backend.call(worker, *encode_call(method, args, None))


def ask(backend: Backend, worker: WorkerRef, method: str | Callable[..., Any], *args: Any) -> Any:
    name = method if isinstance(method, str) else "<callable>"
    return decode_reply(name, send(backend, worker, method, *args).result(LIMIT))


@pytest.fixture
def failures() -> Failures:
    return Failures()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    made = BACKENDS[request.param]()
    yield made
    made.shutdown(0.5)


@pytest.fixture
def placed(backend: Backend, failures: Failures) -> list[WorkerRef]:
    return list(backend.place(Placement(world_size=2, worker_class=WORKER), failures, LIMIT))


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """``os.environ`` and ``sys.path`` are put back afterwards: the in-process worker's are ours."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("LIGHTVLLM_TEST_OWN", "LIGHTVLLM_TEST_NEW", "OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # has its absence restored, too
    return monkeypatch


SECRETS = {"env": {"A": "s3cret-a"}, "env_overrides": {"B": "s3cret-b"}}


def test_a_placement_shows_names_of_variables_and_no_values() -> None:
    shown = repr(Placement(world_size=2, worker_class=WORKER, **SECRETS))
    assert shown.startswith(f"Placement(world_size=2, worker_class={WORKER!r}, ")
    assert "env=['A'], env_overrides=['B']" in shown
    assert "s3cret" not in shown


@pytest.mark.parametrize("field", SECRETS)
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"A": "s3cret\0"}, "the value of A contains NUL"),
        ({"A": "s3cret\udc80"}, "the value of A contains NUL or is no valid UTF-8"),
        ({"A": 53}, "the value of A is of type int; expected str"),
        ({"A=s3cret": "x"}, "'A' is no name of a variable"),
        ({"": "s3cret"}, "'' is no name of a variable"),
        ({1: "s3cret"}, "'int' is no name of a variable"),
    ],
)
def test_a_variable_that_cannot_be_is_named_without_its_value(field: str, variable: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: {message}") as caught:
        Placement(world_size=1, worker_class=WORKER, **{field: variable})
    assert "s3cret" not in str(caught.value)
    assert "53" not in str(caught.value)


@pytest.mark.parametrize("backend", ALL, indirect=True)
class TestEveryBackend:
    def test_placed_workers_answer_and_are_told_apart(self, backend: Backend, placed: list[WorkerRef]) -> None:
        assert len(placed) == 2
        assert len({worker.id for worker in placed}) == 2
        assert sorted(worker.index for worker in placed) == [0, 1]
        assert {worker.node for worker in placed} == {backend.driver_node}
        for worker in placed:
            assert ask(backend, worker, "echo", {"a": [1, b"\x00"]}) == {"a": [1, b"\x00"]}
            assert ask(backend, worker, "pid") == worker.pid

    def test_calls_run_one_at_a_time_in_the_order_sent(self, backend: Backend, placed: list[WorkerRef]) -> None:
        futures = [(worker, send(backend, worker, "append", i)) for i in range(100) for worker in placed]
        for _, future in futures:
            future.result(LIMIT)
        for worker in placed:
            assert ask(backend, worker, "read_log") == (list(range(100)), 0)

    def test_what_is_sent_is_answered_once_with_the_reply_or_the_error(
        self, backend: Backend, placed: list[WorkerRef]
    ) -> None:
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for value in (1, 2, 3):
            backend.send(placed[0], *encode_call("echo", (value,), None), told.put)
        assert [decode_reply("echo", told.get(timeout=LIMIT)) for _ in range(3)] == [1, 2, 3]
        backend.send(placed[0], *encode_call("exit_yourself", (1,), None), told.put)
        assert isinstance(told.get(timeout=LIMIT), WorkerDied)
        backend.send(placed[0], *encode_call("echo", (4,), None), told.put)
        assert isinstance(told.get(timeout=LIMIT), WorkerDied)
        assert told.empty()

    def test_an_error_is_the_replys_and_the_worker_goes_on(self, backend: Backend, placed: list[WorkerRef]) -> None:
        with pytest.raises(WorkerError, match="ValueError: no good") as caught:
            ask(backend, placed[0], "boom", "no good")
        assert caught.value.kind == "ValueError"
        assert "in boom" in caught.value.remote_traceback
        with pytest.raises(WorkerError, match="has no attribute 'no_such_method'"):
            ask(backend, placed[0], "no_such_method")
        assert ask(backend, placed[0], "echo", 1) == 1

    def test_a_callable_gets_the_worker(self, backend: Backend, placed: list[WorkerRef]) -> None:
        assert ask(backend, placed[1], lambda worker, x: (type(worker).__name__, x), 7) == ("ContractWorker", 7)

    def test_a_large_payload_arrives_whole(self, backend: Backend, placed: list[WorkerRef]) -> None:
        blob = os.urandom(1 << 20) * 24
        assert ask(backend, placed[0], "echo", blob) == blob

    def test_a_constructor_that_raises_is_a_placement_error(self, backend: Backend, failures: Failures) -> None:
        with pytest.raises(PlacementError, match="no such device"):
            backend.place(Placement(world_size=2, worker_class="contract_worker:FailsToStart"), failures, LIMIT)

    @pytest.mark.parametrize("name", ["contract_worker:Missing", "no_such_module:Worker", "malformed"])
    def test_a_class_that_cannot_be_had_is_named(self, backend: Backend, failures: Failures, name: str) -> None:
        with pytest.raises((PlacementError, ConfigError), match=name):
            backend.place(Placement(world_size=2, worker_class=name), failures, LIMIT)

    def test_placement_that_takes_too_long_is_undone(
        self, request: pytest.FixtureRequest, backend: Backend, failures: Failures
    ) -> None:
        enough = {"uniproc": 1.0, "ray": 8.0}.get(request.node.callspec.params["backend"], 4.0)  # to begin to hang
        started = time.monotonic()
        with pytest.raises(PlacementError, match="0 of 1 workers"):
            backend.place(Placement(world_size=1, worker_class="contract_worker:HangsAtStart"), failures, enough)
        assert time.monotonic() - started < 30

    def test_environment_reaches_workers_but_overwrites_nothing(
        self, backend: Backend, failures: Failures, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("LIGHTVLLM_TEST_NEW", raising=False)
        env = {"LIGHTVLLM_TEST_NEW": "there", "PATH": "/nowhere"}
        (worker,) = backend.place(Placement(world_size=1, worker_class=WORKER, env=env), failures, LIMIT)
        assert ask(backend, worker, "getenv", "LIGHTVLLM_TEST_NEW") == "there"
        assert ask(backend, worker, "getenv", "PATH") not in (None, "/nowhere")
        os.environ.pop("LIGHTVLLM_TEST_NEW", None)  # the in-process worker's environment is ours

    def test_explicit_variables_win_over_the_workers_own(
        self, backend: Backend, failures: Failures, environ: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """And are there when the worker's class is imported, which is found by one of them."""
        name = f"looks_at_import_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(
            "import os\nfrom contract_worker import ContractWorker\n"
            "class Worker(ContractWorker):\n    at_import = os.environ['LIGHTVLLM_TEST_OWN']\n"
            "    def seen(self):\n        return self.at_import\n"
        )
        environ.setenv("LIGHTVLLM_TEST_OWN", "own")
        overrides = {
            "LIGHTVLLM_TEST_OWN": "explicit",
            "LIGHTVLLM_TEST_NEW": "explicit",
            "OMP_NUM_THREADS": "7",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]),
        }
        (worker,) = backend.place(
            Placement(
                world_size=1,
                worker_class=f"{name}:Worker",
                env={"LIGHTVLLM_TEST_OWN": "given", "LIGHTVLLM_TEST_NEW": "given"},
                env_overrides=overrides,
            ),
            failures,
            LIMIT,
        )
        assert ask(backend, worker, "seen") == "explicit"
        for variable in ("LIGHTVLLM_TEST_OWN", "LIGHTVLLM_TEST_NEW", "OMP_NUM_THREADS"):
            assert ask(backend, worker, "getenv", variable) == overrides[variable]
        assert str(tmp_path) in ask(backend, worker, "getenv", "PYTHONPATH").split(os.pathsep)

    def test_no_error_shows_a_value(self, backend: Backend, failures: Failures, environ: pytest.MonkeyPatch) -> None:
        request = Placement(
            world_size=1, worker_class="contract_worker:FailsToStart", env_overrides={"LIGHTVLLM_TEST_NEW": "s3cret"}
        )
        with pytest.raises(PlacementError) as caught:
            backend.place(request, failures, LIMIT)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))

    def test_shutdown_fails_what_is_pending_and_can_be_repeated(
        self, backend: Backend, placed: list[WorkerRef], failures: Failures, tmp_path: Path
    ) -> None:
        flag = tmp_path / "running"
        running = send(backend, placed[0], "touch_and_hang", str(flag))
        queued = send(backend, placed[0], "echo", 1)
        wait_until(flag.exists, "the call to begin")
        backend.shutdown(0.5)
        backend.shutdown(0.5)
        for future in (running, queued, send(backend, placed[0], "echo", 1)):
            with pytest.raises(Shutdown):
                future.result(LIMIT)
        assert failures.reports == []

    def test_a_worker_that_exits_is_reported_once(
        self, backend: Backend, placed: list[WorkerRef], failures: Failures
    ) -> None:
        dying, well = placed
        future = send(backend, dying, "exit_yourself", 3)
        with pytest.raises(WorkerDied):
            future.result(LIMIT)
        assert failures.arrived.wait(LIMIT)
        with pytest.raises(WorkerDied):
            send(backend, dying, "echo", 1).result(LIMIT)
        assert ask(backend, well, "echo", 1) == 1
        backend.shutdown()
        assert [(worker.id, died.worker) for worker, died in failures.reports] == [(dying.id, dying.id)]

    def test_shutdown_from_another_thread_ends_a_wait(
        self, backend: Backend, placed: list[WorkerRef], tmp_path: Path
    ) -> None:
        flag = tmp_path / "running"
        future = send(backend, placed[0], "touch_and_hang", str(flag))
        wait_until(flag.exists, "the call to begin")
        thread = threading.Thread(target=backend.shutdown, args=(0.5,))
        thread.start()
        with pytest.raises(Shutdown):
            future.result(LIMIT)
        thread.join(LIMIT)
        assert not thread.is_alive()

    def test_only_our_own_exceptions_come_out(self, backend: Backend, placed: list[WorkerRef]) -> None:
        seen: list[BaseException] = []
        for method, args in (("boom", ("x",)), ("no_such_method", ()), ("echo", (1, 2, 3)), ("exit_yourself", (1,))):
            try:
                ask(backend, placed[0], method, *args)
            except BaseException as error:  # noqa: BLE001  the point of the test
                seen.append(error)
        assert len(seen) == 4
        for error in seen:
            assert isinstance(error, LightvllmError)
            assert type(error).__module__ == "lightvllm.errors"


@pytest.fixture
def go(tmp_path: Path) -> Iterator[Path]:
    """The file for which deferred replies wait; it is there at the end, for whoever still waits."""
    path = tmp_path / "go"
    yield path
    path.touch()


def reply(method: str, future: Future[Any]) -> Any:
    return decode_reply(method, future.result(LIMIT))


@pytest.mark.parametrize("backend", ALL, indirect=True)
class TestDeferredReplies:
    def test_the_worker_goes_on_and_the_reply_comes_when_it_is_there(
        self, backend: Backend, placed: list[WorkerRef], go: Path
    ) -> None:
        late = send(backend, placed[0], "later", str(go), "late", {"a": b"\x00"})
        for value in range(20):
            assert ask(backend, placed[0], "append", value) == value + 1
        assert not late.done()
        go.touch()
        assert reply("later", late) == {"a": b"\x00"}
        assert ask(backend, placed[0], "read_log") == ([*range(20), "late"], 0)

    def test_it_comes_while_the_worker_is_in_another_call(
        self, backend: Backend, placed: list[WorkerRef], go: Path, tmp_path: Path
    ) -> None:
        late = send(backend, placed[0], "later", str(go), "late", 1)
        running = send(backend, placed[0], "wait_for_file", str(tmp_path / "end"))
        go.touch()
        assert reply("later", late) == 1
        assert not running.done()
        (tmp_path / "end").touch()
        assert reply("wait_for_file", running) == "gone on"

    def test_they_are_finished_in_order_in_a_thread_of_their_own(
        self, backend: Backend, placed: list[WorkerRef], go: Path, tmp_path: Path
    ) -> None:
        (there := tmp_path / "there").touch()
        names = [str(number) for number in range(20)]
        first = send(backend, placed[0], "later", str(go), "first")
        rest = [send(backend, placed[0], "later", str(there), name, name) for name in names]
        assert ask(backend, placed[0], "read_log") == ([], 0)
        assert not any(future.done() for future in (first, *rest))
        go.touch()
        assert [reply("later", future) for future in (first, *rest)] == [None, *names]
        assert ask(backend, placed[0], "read_log") == (["first", *names], 0)
        assert ask(backend, placed[0], "later_thread") is False

    def test_an_error_at_the_end_is_the_replys_and_the_worker_goes_on(
        self, backend: Backend, placed: list[WorkerRef]
    ) -> None:
        with pytest.raises(WorkerError, match="ValueError: too late") as caught:
            ask(backend, placed[0], "later_boom", "too late")
        assert "in boom" in caught.value.remote_traceback
        assert ask(backend, placed[0], "later_thread") is False
        assert ask(backend, placed[0], "echo", 1) == 1

    def test_of_a_callable(self, backend: Backend, placed: list[WorkerRef], go: Path) -> None:
        late = send(backend, placed[0], lambda worker, path: Deferred(lambda: worker.wait_for_file(path)), str(go))
        assert ask(backend, placed[0], "echo", 1) == 1
        assert not late.done()
        go.touch()
        assert reply("<callable>", late) == "gone on"

    def test_large_ones_and_the_others_do_not_mix(self, backend: Backend, placed: list[WorkerRef], go: Path) -> None:
        blobs = [bytes([number]) * (3 << 20) for number in range(8)]
        late = [send(backend, placed[0], "later", str(go), "", blob) for blob in blobs]
        ask(backend, placed[0], "echo", 1)
        go.touch()
        others = [send(backend, placed[0], "echo", blob) for blob in reversed(blobs)]
        assert [reply("later", future) for future in late] == blobs
        assert [reply("echo", future) for future in others] == blobs[::-1]

    def test_what_is_sent_without_a_future_is_answered_once(
        self, backend: Backend, placed: list[WorkerRef], go: Path
    ) -> None:
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        backend.send(placed[0], *encode_call("later", (str(go), "late", "late"), None), told.put)
        backend.send(placed[0], *encode_call("echo", ("soon",), None), told.put)
        assert decode_reply("echo", told.get(timeout=LIMIT)) == "soon"
        go.touch()
        assert decode_reply("later", told.get(timeout=LIMIT)) == "late"
        assert told.empty()

    def test_death_in_another_call_fails_it_at_once(
        self, backend: Backend, placed: list[WorkerRef], failures: Failures, go: Path
    ) -> None:
        late = [send(backend, placed[0], "later", str(go), "late") for _ in range(2)]
        exiting = send(backend, placed[0], "exit_yourself", 3)
        for future in (exiting, *late):
            with pytest.raises(WorkerDied):
                future.result(5.0)  # far below the 60 s that it would have waited
        assert failures.arrived.wait(LIMIT)
        assert ask(backend, placed[1], "later_thread") is False
        backend.shutdown()
        assert [worker.id for worker, _ in failures.reports] == [placed[0].id]

    def test_an_exit_at_the_end_is_the_workers_death(
        self, backend: Backend, placed: list[WorkerRef], failures: Failures, go: Path
    ) -> None:
        late = [send(backend, placed[0], "later_exit", str(go), 3), send(backend, placed[0], "later", str(go), "late")]
        assert ask(backend, placed[0], "echo", 1) == 1
        go.touch()
        for future in late:
            with pytest.raises(WorkerDied):
                future.result(LIMIT)
        assert failures.arrived.wait(LIMIT)
        with pytest.raises(WorkerDied):
            send(backend, placed[0], "echo", 1).result(LIMIT)
        backend.shutdown()
        assert [worker.id for worker, _ in failures.reports] == [placed[0].id]

    def test_shutdown_fails_it_and_does_not_wait_for_it(
        self, backend: Backend, placed: list[WorkerRef], failures: Failures, go: Path
    ) -> None:
        late = [send(backend, placed[0], "later", str(go), "late") for _ in range(2)]
        assert ask(backend, placed[0], "echo", 1) == 1
        started = time.monotonic()
        backend.shutdown(0.5)
        assert time.monotonic() - started < 30  # it would have waited for 60 s
        for future in late:
            with pytest.raises(Shutdown):
                future.result(LIMIT)
        assert failures.reports == []
        if placed[0].pid != os.getpid():
            wait_until(lambda: all(gone(worker.pid) for worker in placed), "the workers to be gone", 5.0)

    def test_through_an_executor_one_ranks_reply_when_all_have_finished(self, backend: Backend, tmp_path: Path) -> None:
        placement = Placement(world_size=2, worker_class=WORKER)
        executor = DistributedExecutor(backend, placement, ParallelConfig(tensor_parallel_size=2), rpc_timeout=LIMIT)
        for rank, worker in enumerate(executor.workers):
            ask(backend, worker, "append", rank)
        future = executor.collective_rpc(
            lambda worker, folder: worker.later(f"{folder}/{worker.log[0]}", "late", worker.log[0]),
            args=(str(tmp_path),),
            non_block=True,
            unique_reply_rank=1,
        )
        assert executor.collective_rpc("echo", args=(1,)) == [1, 1]
        (tmp_path / "1").touch()
        wait_until(lambda: executor.collective_rpc("read_log")[1][0] == [1, "late"], "rank 1 to finish")
        assert not future.done()
        (tmp_path / "0").touch()
        assert future.result() == 1
        executor.shutdown()


@pytest.mark.parametrize("backend", PROCESSES, indirect=True)
class TestProcessBackends:
    def test_sigkill_in_mid_call_fails_pending_futures_at_once(
        self, backend: Backend, placed: list[WorkerRef], failures: Failures, tmp_path: Path
    ) -> None:
        dying, well = placed
        flag = tmp_path / "running"
        running = send(backend, dying, "touch_and_hang", str(flag))
        queued = [send(backend, dying, "echo", i) for i in range(3)]
        wait_until(flag.exists, "the call to begin")
        os.kill(dying.pid, signal.SIGKILL)
        for future in (running, *queued):
            with pytest.raises(WorkerDied):
                future.result(5.0)  # far below the 60 s that the call would have taken
        assert failures.arrived.wait(5.0)
        assert ask(backend, well, "echo", 1) == 1
        backend.shutdown()
        assert [worker.id for worker, _ in failures.reports] == [dying.id]

    def test_sigkill_of_an_idle_worker_is_noticed(
        self, backend: Backend, placed: list[WorkerRef], failures: Failures
    ) -> None:
        os.kill(placed[1].pid, signal.SIGKILL)
        assert failures.arrived.wait(5.0)
        assert failures.reports[0][0].id == placed[1].id

    def test_shutdown_leaves_no_process_even_of_a_hung_call(
        self, backend: Backend, placed: list[WorkerRef], tmp_path: Path
    ) -> None:
        flag = tmp_path / "running"
        send(backend, placed[0], "touch_and_hang", str(flag))
        wait_until(flag.exists, "the call to begin")
        backend.shutdown(0.5)
        wait_until(lambda: all(gone(worker.pid) for worker in placed), "the workers to be gone", 5.0)

    def test_failed_placement_leaves_no_process(self, backend: Backend, failures: Failures) -> None:
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        with pytest.raises(PlacementError):
            backend.place(Placement(world_size=2, worker_class="contract_worker:FailsToStart"), failures, LIMIT)
        backend.shutdown()

        def left_over() -> set[int]:
            now = {child.pid for child in psutil.Process().children(recursive=True) if not gone(child.pid)}
            return now - before

        wait_until(lambda: not left_over(), f"no process left: {left_over()}", 10.0)

    def test_two_backends_at_once_do_not_disturb_each_other(
        self, backend: Backend, placed: list[WorkerRef], request: pytest.FixtureRequest
    ) -> None:
        other = BACKENDS[request.node.callspec.params["backend"]]()
        try:
            others = other.place(Placement(world_size=2, worker_class=WORKER), Failures(), LIMIT)
            assert not {worker.pid for worker in others} & {worker.pid for worker in placed}
            futures = [send(b, w, "append", 1) for b, ws in ((backend, placed), (other, others)) for w in ws]
            for future in futures:
                future.result(LIMIT)
        finally:
            other.shutdown()
        assert [ask(backend, worker, "append", 2) for worker in placed] == [2, 2]

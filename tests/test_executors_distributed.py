"""``DistributedExecutor`` over the in-process backend and over a backend that the test steers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import pytest

from lightvllm.backends.base import BackendGraph, Graph, OnFailure, OnReply, Placement, Progress, WorkerRef, tell
from lightvllm.backends.inprocess import InProcessBackend
from lightvllm.config import ParallelConfig
from lightvllm.errors import LightvllmError, PlacementError, RpcTimeout, Shutdown, WorkerDied, WorkerError
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.messages import Buffer, encode_failure, invoke

LIMIT = 30.0
LAYOUT = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)


class SteeredBackend:
    """Hands out futures and lets the test decide when and how each is answered."""

    name = "steered"
    driver_node = "here"

    def __init__(self) -> None:
        self.calls: list[tuple[WorkerRef, str, Buffer, Future[Buffer]]] = []
        self.on_failure: OnFailure
        self.shutdowns = 0

    def place(
        self, request: Placement, on_failure: OnFailure, timeout: float, progress: Progress | None = None
    ) -> Sequence[WorkerRef]:
        self.on_failure = on_failure
        self.refs = [WorkerRef(f"w{i}", "here", index=i) for i in range(request.world_size)]
        return self.refs

    def send(self, worker: WorkerRef, method: str, payload: Buffer, on_reply: OnReply) -> None:
        self.call(worker, method, payload).add_done_callback(functools.partial(tell, on_reply))

    def call(self, worker: WorkerRef, method: str, payload: Buffer) -> Future[Buffer]:
        future: Future[Buffer] = Future()
        self.calls.append((worker, method, payload, future))
        return future

    def wait(self, future: Future[Any], timeout: float) -> None:
        futures.wait((future,), timeout)

    def compile(self, graph: Graph, timeout: float) -> BackendGraph:
        raise AssertionError("no test here compiles a graph")

    def answer(self, index: int, value: object) -> None:
        _, method, payload, future = self.calls[index]
        worker = type("W", (), {method: lambda self, *a: value})()
        future.set_result(invoke(worker, method, payload))

    def shutdown(self, timeout: float = 5.0) -> None:
        self.shutdowns += 1


@pytest.fixture
def backend() -> SteeredBackend:
    return SteeredBackend()


@pytest.fixture
def executor(backend: SteeredBackend) -> Iterator[DistributedExecutor]:
    made = DistributedExecutor(backend, Placement(world_size=4, worker_class="x:y"), LAYOUT, rpc_timeout=LIMIT)
    yield made
    made.shutdown()


def test_results_come_in_rank_order_whatever_the_order_of_replies(
    executor: DistributedExecutor, backend: SteeredBackend
) -> None:
    future = executor.collective_rpc("echo", args=(1,), non_block=True)
    assert len({id(payload) for _, _, payload, _ in backend.calls}) == 1, "encoded once"
    for index in (2, 0, 3, 1):
        assert not future.done()
        backend.answer(index, f"r{index}")
    assert future.result() == ["r0", "r1", "r2", "r3"]


def test_execute_model_replies_with_the_output_rank(executor: DistributedExecutor, backend: SteeredBackend) -> None:
    assert executor.output_rank == 2
    assert executor.max_concurrent_batches == 2
    future = executor.sample_tokens("grammar", non_block=True)
    for index in range(4):
        backend.answer(index, f"r{index}")
    assert future.result() == "r2"


def test_the_first_error_of_any_rank_is_raised_without_waiting_for_the_rest(
    executor: DistributedExecutor, backend: SteeredBackend
) -> None:
    future = executor.collective_rpc("echo", non_block=True, unique_reply_rank=0)
    backend.answer(0, "fine")
    backend.calls[3][3].set_result(encode_failure(ValueError("bad")))
    with pytest.raises(WorkerError, match="rank 3 failed in echo: ValueError: bad") as caught:
        future.result()
    assert caught.value.rank == 3
    assert not executor.is_failed


def test_a_call_under_another_name_is_told_as_that(executor: DistributedExecutor, backend: SteeredBackend) -> None:
    future = executor.begin_rpc("run", ("execute_model", 1), unique_reply_rank=2, told_as="execute_model")
    assert {method for _, method, _, _ in backend.calls} == {"run"}
    backend.calls[3][3].set_result(encode_failure(ValueError("out of memory")))
    with pytest.raises(WorkerError, match="rank 3 failed in execute_model: ValueError: out of memory"):
        future.result()


def test_an_abandoned_call_fails_at_once_and_its_replies_are_of_no_account(
    executor: DistributedExecutor, backend: SteeredBackend
) -> None:
    future = executor.begin_rpc("run", ())
    executor.abandon(future, ValueError("the first half failed"))
    for index in range(4):
        backend.answer(index, None)
    with pytest.raises(ValueError, match="the first half failed"):
        future.result()
    done = executor.begin_rpc("run", ())
    for index in range(4, 8):
        backend.answer(index, index)
    executor.abandon(done, ValueError("too late"))
    assert done.result() == [4, 5, 6, 7]


def test_time_out_names_the_ranks_that_did_not_answer(executor: DistributedExecutor, backend: SteeredBackend) -> None:
    future = executor.collective_rpc("echo", 0.05, non_block=True)
    backend.answer(1, None)
    with pytest.raises(RpcTimeout, match=r"echo: no reply from rank 0, 2, 3 within 0.05 s"):
        future.result()
    with pytest.raises(TimeoutError):
        future.result(0.01)


def test_a_death_fails_what_is_pending_calls_back_once_and_stays(
    executor: DistributedExecutor, backend: SteeredBackend
) -> None:
    called: list[str] = []
    executor.register_failure_callback(lambda: called.append("first"))
    future = executor.collective_rpc("echo", non_block=True)
    backend.on_failure(backend.refs[1], WorkerDied("w1", "killed by SIGKILL"))
    with pytest.raises(WorkerDied, match=r"worker w1 \(rank 1\) died: killed by SIGKILL"):
        future.result()
    assert executor.is_failed
    with pytest.raises(WorkerDied):
        executor.collective_rpc("echo")
    with pytest.raises(WorkerDied):
        executor.check_health()
    backend.on_failure(backend.refs[2], WorkerDied("w2", "killed by SIGKILL"))
    executor.register_failure_callback(lambda: called.append("late"))
    assert called == ["first", "late"]


def test_shutdown_fails_what_is_pending_and_calls_nobody_back(
    executor: DistributedExecutor, backend: SteeredBackend
) -> None:
    called: list[str] = []
    executor.register_failure_callback(lambda: called.append("no"))
    future = executor.collective_rpc("echo", non_block=True)
    executor.shutdown()
    with pytest.raises(Shutdown):
        future.result()
    with pytest.raises(Shutdown):
        executor.collective_rpc("echo")
    assert called == []
    assert not executor.is_failed


def test_a_reply_that_cannot_be_read_does_not_leave_the_caller_waiting(
    executor: DistributedExecutor, backend: SteeredBackend
) -> None:
    future = executor.collective_rpc("echo", non_block=True)
    backend.calls[0][3].set_result(b"p not a pickle")
    with pytest.raises(LightvllmError, match="rank 0: the reply to echo cannot be read"):
        future.result()


def test_a_failed_start_shuts_the_backend_down() -> None:
    class Refuses(SteeredBackend):
        def place(self, *args: Any, **kwargs: Any) -> Sequence[WorkerRef]:
            raise PlacementError("2 of 4 workers")

    backend = Refuses()
    with pytest.raises(PlacementError):
        DistributedExecutor(backend, Placement(world_size=4, worker_class="x:y"), LAYOUT)
    assert backend.shutdowns == 1


def test_calls_of_two_threads_reach_all_workers_in_one_order() -> None:
    placement = Placement(world_size=4, worker_class="contract_worker:ContractWorker")
    executor = DistributedExecutor(InProcessBackend(), placement, LAYOUT)
    try:

        def many(name: str) -> None:
            for i in range(100):
                executor.collective_rpc("append", args=((name, i),), non_block=True)

        threads = [threading.Thread(target=many, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        logs = executor.collective_rpc("read_log", LIMIT)
        assert len(logs[0][0]) == 200
        assert all(log == logs[0] for log in logs)
        executor.check_health()
        assert executor.collective_rpc(lambda worker: type(worker).__name__) == ["ContractWorker"] * 4
        assert executor.scatter_rpc("echo", {3: ["c"], 1: ["a"]}) == ["c", "a"]
    finally:
        executor.shutdown()

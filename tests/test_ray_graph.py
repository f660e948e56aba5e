"""Compiled graphs on Ray: turns, patience, clean-up. What every backend's must do is in test_graph_contract.py."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import LIMIT, wait_until

from lightvllm.backends.base import Graph, GraphInput, GraphNode, GraphResult, Placement
from lightvllm.backends.ray import cluster, head
from lightvllm.backends.ray.graph import MAX_GRAPHS
from lightvllm.backends.ray.host import Program, Turns, WorkerHost
from lightvllm.config import ParallelConfig
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout, WorkerDied
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.executors.graph import InputNode, MultiOutputNode
from lightvllm.messages import decode_reply, decode_value, encode_call, encode_value


class TestTurns:
    def test_calls_run_in_the_order_of_their_numbers(self) -> None:
        turns, ran = Turns(), list[int]()

        def call(number: int) -> None:
            assert turns.wait(number)
            ran.append(number)
            turns.done()

        threads = [threading.Thread(target=call, args=(number,)) for number in reversed(range(20))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert ran == list(range(20))

    def test_skipped_ones_are_not_waited_for_and_do_not_run(self) -> None:
        turns = Turns()
        turns.skip(range(2, 4))
        turns.skip(range(0, 1))
        turns.skip(range(5, 6))
        assert not turns.wait(0)
        assert turns.wait(1)
        turns.done()
        assert not turns.wait(3)
        assert turns.wait(4)
        turns.done()
        assert turns.wait(6)

    def test_one_that_runs_comes_to_its_end_before_the_next_begins(self) -> None:
        turns, next_began = Turns(), threading.Event()
        assert turns.wait(0)
        turns.skip(range(0, 3))

        def follow() -> None:
            turns.wait(3)
            next_began.set()

        thread = threading.Thread(target=follow)
        thread.start()
        assert not next_began.wait(0.1)
        turns.done()
        assert next_began.wait(LIMIT)
        thread.join(LIMIT)

    def test_skipping_wakes_who_waits_behind(self) -> None:
        turns, began = Turns(), threading.Event()
        thread = threading.Thread(target=lambda: turns.wait(2) and began.set())
        thread.start()
        turns.skip(range(0, 2))
        assert began.wait(LIMIT)
        thread.join(LIMIT)


class Joiner:
    def join(self, *parts: object) -> str:
        return "".join(map(str, parts))


def test_a_program_keeps_what_is_used_again_and_no_longer() -> None:
    node = GraphNode("w1", "join", (GraphInput(),))
    graph = Graph(
        nodes=(
            node,
            GraphNode("w1", "join", (GraphResult(0), GraphInput())),
            GraphNode("w1", "join", (GraphResult(0), GraphResult(1))),
        ),
        outputs=(1, 2),
    )
    program, header = Program(graph, "w1", 1, 16), (7).to_bytes(8, "little") + (40).to_bytes(8, "little")
    given = header + encode_value("x")
    assert [program.number(index, header) for index in range(3)] == [40, 41, 42]
    worker = Joiner()
    assert program.run(worker, 0, header, (given,)) == header
    assert decode_value(program.run(worker, 1, header, (header, given))[16:]) == "xx"
    assert decode_value(program.run(worker, 2, header, (header, header))[16:]) == "xxx"
    assert program._kept == {}


def test_a_host_runs_calls_by_their_numbers() -> None:
    host = WorkerHost()
    host._worker = Joiner()
    method, payload = encode_call("join", ("a", 1), None)
    host.skip([range(0, 2)])
    assert decode_reply(method, host.call(2, method, payload)) == "a1"


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """Its end leaves nothing in shared memory."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    lease = cluster.connect(None, cluster.LocalClusterConfig(), Future())
    assert cluster._current is not None
    assert cluster._current.local is not None
    members = set(head.session_members(cluster._current.local.session))
    yield
    made = [path for pid in members for path in Path("/dev/shm").glob(f"sem.*{pid}-*")]
    assert made, "the graphs of these tests have semaphores, named after a process of the cluster"
    lease.release()
    assert not any(path.exists() for path in made)


@pytest.fixture
def executor(shared_ray: None) -> Iterator[DistributedExecutor]:
    from lightvllm.backends.ray.backend import RayBackend

    made = DistributedExecutor(
        RayBackend(),
        Placement(world_size=2, worker_class="graph_worker:GraphWorker"),
        ParallelConfig(tensor_parallel_size=2),
        rpc_timeout=LIMIT,
        step_timeout=LIMIT,
    )
    yield made
    made.shutdown()


def fan_out(executor: DistributedExecutor) -> Any:
    with InputNode() as inp:
        return MultiOutputNode([handle.echo.bind(inp) for handle in executor.handles])


def proxies() -> int:
    """Processes that Ray starts for the driver's end of each compiled graph, and that are still there."""
    assert cluster._current is not None
    assert cluster._current.local is not None
    found = 0
    for pid in head.session_members(cluster._current.local.session):
        with contextlib.suppress(psutil.Error):
            found += "DAGDriverProxyActor" in " ".join(psutil.Process(pid).cmdline())
    return found


@pytest.mark.ray
class TestOnRay:
    def test_an_idle_graph_costs_next_to_nothing(self, executor: DistributedExecutor) -> None:
        """Ray's own channels take a whole core for each worker."""
        graph = fan_out(executor).experimental_compile()
        for i in range(10):
            assert [ref.get() for ref in graph.execute(i)] == [i, i]
        processes = [psutil.Process(worker.pid) for worker in executor.workers]

        def cpu() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        deadline, before = time.monotonic() + 4.0, cpu()
        wait_until(lambda: time.monotonic() > deadline, "four seconds")
        assert cpu() - before < 0.25 * 4.0 * len(processes)
        assert [ref.get() for ref in graph.execute(1)] == [1, 1]
        graph.teardown()

    def test_rays_own_time_outs_do_not_count(
        self, executor: DistributedExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ray.dag import DAGContext

        for setting in ("get_timeout", "submit_timeout"):
            monkeypatch.setattr(DAGContext.get_current(), setting, 0)
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = executor.handles[0].touch_and_wait.bind(inp, str(begun), str(go))
        graph = node.experimental_compile()
        ref = graph.execute(1)
        with pytest.raises(RpcTimeout):
            ref.get(timeout=0.5)
        go.touch()
        assert ref.get() == 1
        graph.teardown()

    def test_a_death_is_told_long_before_any_time_out(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        begun = tmp_path / "begun"
        with InputNode() as inp:
            node = executor.handles[1].echo.bind(executor.handles[0].hang.bind(inp, str(begun)))
        graph = node.experimental_compile()
        ref, other = graph.execute(1), graph.execute(2)
        wait_until(begun.exists, "the step to begin")
        threading.Timer(0.3, os.kill, (executor.workers[0].pid, signal.SIGKILL)).start()
        started = time.monotonic()
        for pending in (ref, other):
            with pytest.raises(WorkerDied):
                pending.get()
        assert time.monotonic() - started < 0.3 + 1.0

    def test_nothing_of_ray_is_left_of_a_graph(self, executor: DistributedExecutor) -> None:
        graphs = [fan_out(executor).experimental_compile() for _ in range(3)]
        wait_until(lambda: proxies() == 3, "a proxy for each graph")
        for graph in graphs:
            graph.teardown()
        wait_until(lambda: proxies() == 0, "the end of the proxies")
        left = fan_out(executor).experimental_compile()
        executor.shutdown()
        wait_until(lambda: proxies() == 0, "the end of the last proxy")
        left.teardown()

    def test_a_worker_is_part_of_so_many_graphs_at_most(self, executor: DistributedExecutor) -> None:
        from lightvllm.backends.ray import backend

        actors = executor.backend._actors.values()  # type: ignore[attr-defined]
        graphs = [fan_out(executor).experimental_compile() for _ in range(3)]
        for i, graph in enumerate(graphs):
            assert [ref.get() for ref in graph.execute(i)] == [i, i]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(backend, "MAX_GRAPHS", 3)
            with pytest.raises(ConfigError, match="is part of 3 compiled graphs already"):
                fan_out(executor).experimental_compile()
            graphs.pop().teardown()
            graphs.append(fan_out(executor).experimental_compile())
        assert MAX_GRAPHS > 3
        assert all(len(actor.graphs) >= 3 for actor in actors)
        for graph in graphs:
            graph.teardown()

    def test_buffers_are_of_the_size_asked_for_and_grow(self, executor: DistributedExecutor) -> None:
        graph = fan_out(executor).experimental_compile(_buffer_size_bytes=5000, _max_inflight_executions=2)
        channel = graph._graph._readers[0]  # type: ignore[attr-defined]
        buffers = next(iter(channel._channels))._buffers
        assert len(buffers) == 2
        assert {buffer._typ.buffer_size_bytes for buffer in buffers} == {5000}
        for size in (10, 4000, 300_000, 5):
            assert [ref.get() for ref in graph.execute(b"x" * size)] == [b"x" * size] * 2
        graph.teardown()

    def test_a_worker_that_is_busy_cannot_learn_a_graph(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        call = executor.collective_rpc("touch_and_wait", args=(1, str(begun), str(go)), non_block=True)
        wait_until(begun.exists, "the call to begin")
        graph = Graph(nodes=(GraphNode(executor.workers[0].id, "echo", (GraphInput(),)),), outputs=(0,))
        with pytest.raises(RpcTimeout, match=r"did not learn it within 0\.3 s; are they busy"):
            executor.backend.compile(graph, 0.3)
        go.touch()
        assert call.result() == [1, 1]
        wait_until(lambda: not executor.backend._graphs, "the belated graph to be undone")  # type: ignore[attr-defined]

    @pytest.mark.parametrize("transport", ["nccl", "gloo", "grpc", "shared"])
    def test_what_ray_does_not_offer_is_refused(self, executor: DistributedExecutor, transport: Any) -> None:
        with InputNode() as inp:
            node = executor.handles[0].echo.bind(inp).with_tensor_transport(transport)
        with pytest.raises(ConfigError, match=f"'{transport}'.*'auto'"):
            executor.handles[1].echo.bind(node).experimental_compile()
        with pytest.raises(ConfigError, match="_overlap_gpu_communication"):
            fan_out(executor).experimental_compile(_overlap_gpu_communication=True)

    def test_a_channel_that_fails_ends_the_graph_and_not_the_workers(self, executor: DistributedExecutor) -> None:
        graph = fan_out(executor).experimental_compile()
        assert [ref.get() for ref in graph.execute(1)] == [1, 1]
        attempts: list[Callable[[], Any]] = [lambda: [ref.get() for ref in graph.execute(2)], lambda: graph.execute(3)]
        for _, channel in graph._graph._writers:  # type: ignore[attr-defined]
            channel.close()
        for attempt in attempts:
            with pytest.raises(LightvllmError, match="Ray's channel of the graph failed"):
                attempt()
        assert executor.collective_rpc("echo", args=(4,)) == [4, 4]
        graph.teardown()

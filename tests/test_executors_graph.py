"""What the authoring surface of compiled graphs refuses, and the bounds it keeps, over a backend that the test steers.

What graphs do is in test_graph_contract.py.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lightvllm.backends.base import (
    Graph,
    GraphConstant,
    GraphInput,
    GraphNode,
    GraphResult,
    OnFailure,
    OnReply,
    Placement,
    Progress,
    WorkerRef,
    tell,
)
from lightvllm.backends.inprocess import InProcessBackend
from lightvllm.config import ParallelConfig
from lightvllm.errors import (
    ConfigError,
    GraphCapacityExceeded,
    LightvllmError,
    RpcTimeout,
    Shutdown,
    WorkerDied,
    WorkerError,
)
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.executors.graph import InputNode, MultiOutputNode
from lightvllm.messages import Buffer, decode_value, encode_failure, encode_value

LIMIT = 30.0


class SteeredGraph:
    def __init__(self) -> None:
        self.inputs: list[Mapping[int | str | None, bytes]] = []
        self.futures: list[Future[list[Buffer]]] = []
        self.teardowns: list[float] = []

    def execute(self, inputs: Mapping[int | str | None, bytes]) -> Future[list[Buffer]]:
        self.inputs.append(inputs)
        self.futures.append(Future())
        return self.futures[-1]

    def answer(self, index: int, *values: object) -> None:
        self.futures[index].set_result([encode_value(value) for value in values])

    def teardown(self, timeout: float) -> None:
        self.teardowns.append(timeout)


class SteeredBackend:
    """Shows what it is given to compile, and lets the test answer. ``wait`` does not wait."""

    name = "steered"
    driver_node = "here"

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.compiled: list[SteeredGraph] = []
        self.refuses: LightvllmError | None = None
        self.waits: list[float] = []

    def place(
        self, request: Placement, on_failure: OnFailure, timeout: float, progress: Progress | None = None
    ) -> Sequence[WorkerRef]:
        self.on_failure = on_failure
        self.refs = [WorkerRef(f"w{i}", "here", index=i) for i in range(request.world_size)]
        return self.refs

    def send(self, worker: WorkerRef, method: str, payload: Buffer, on_reply: OnReply) -> None:
        self.call(worker, method, payload).add_done_callback(functools.partial(tell, on_reply))

    def call(self, worker: WorkerRef, method: str, payload: Buffer) -> Future[Buffer]:
        raise AssertionError("no test here makes a plain call")

    def wait(self, future: Future[Any], timeout: float) -> None:
        self.waits.append(timeout)

    def compile(self, graph: Graph, timeout: float) -> SteeredGraph:
        if self.refuses is not None:
            raise self.refuses
        self.graphs.append(graph)
        self.compiled.append(SteeredGraph())
        return self.compiled[-1]

    def shutdown(self, timeout: float = 5.0) -> None:
        pass


@pytest.fixture
def backend() -> SteeredBackend:
    return SteeredBackend()


@pytest.fixture
def executor(backend: SteeredBackend) -> Iterator[DistributedExecutor]:
    layout = ParallelConfig(tensor_parallel_size=2)
    made = DistributedExecutor(backend, Placement(world_size=2, worker_class="x:y"), layout, step_timeout=7.0)
    yield made
    made.shutdown()


@pytest.fixture
def handles(executor: DistributedExecutor) -> list[Any]:
    return executor.handles


class TestWhatTheBackendIsGiven:
    def test_nodes_in_the_order_written(self, handles: list[Any], backend: SteeredBackend) -> None:
        a, b = handles
        with InputNode() as inp:
            first = a.one.bind(inp[1], 5, key=inp.name)
            second = b.two.bind(first, first).with_tensor_transport("gloo")
            third = a.three.bind(inp["name"], x=second)
            MultiOutputNode([third, first, third]).experimental_compile(
                _max_inflight_executions=3, _buffer_size_bytes=4096, _overlap_gpu_communication=True
            )
        (graph,) = backend.graphs
        assert graph == Graph(
            nodes=(
                GraphNode("w0", "one", (GraphInput(1), GraphConstant(encode_value(5))), {"key": GraphInput("name")}),
                GraphNode("w1", "two", (GraphResult(0), GraphResult(0)), transport="gloo"),
                GraphNode("w0", "three", (GraphInput("name"),), {"x": GraphResult(1)}),
            ),
            outputs=(2, 0, 2),
            max_inflight_executions=3,
            buffer_size_bytes=4096,
            overlap_gpu_communication=True,
            step_timeout=7.0,
        )

    def test_an_encoded_value_for_each_key(self, handles: list[Any], backend: SteeredBackend) -> None:
        with InputNode() as inp:
            graph = handles[0].one.bind(inp[1], inp.name).experimental_compile()
        graph.execute("unused", "used", name=3)
        (inputs,) = backend.compiled[0].inputs
        assert {key: decode_value(value) for key, value in inputs.items()} == {1: "used", "name": 3}

    def test_handles_are_in_rank_order(self, handles: list[Any]) -> None:
        assert [handle.rank for handle in handles] == [0, 1]
        assert repr(handles[1]) == "<worker of rank 1>"
        with pytest.raises(AttributeError):
            _ = handles[0]._private


class TestRefused:
    def bad(self, node: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            node.experimental_compile()

    def test_no_input(self, handles: list[Any]) -> None:
        self.bad(handles[0].one.bind(1), "<one of rank 0> takes neither the input nor the result of another node")

    def test_a_node_without_an_input_among_others(self, handles: list[Any]) -> None:
        a, b = handles
        self.bad(a.two.bind(InputNode(), b.one.bind(1)), "<one of rank 1> takes neither")

    def test_two_inputs(self, handles: list[Any]) -> None:
        self.bad(handles[0].one.bind(InputNode(), InputNode()), "has 2 InputNodes; it needs exactly one")

    def test_the_input_as_a_whole_and_in_parts(self, handles: list[Any]) -> None:
        inp = InputNode()
        self.bad(handles[0].one.bind(inp, inp[0]), "both as a whole and by its arguments")

    def test_an_attribute_that_is_not_used(self, handles: list[Any]) -> None:
        inp = InputNode()
        _ = inp.forgotten
        self.bad(handles[0].one.bind(inp[0]), r"InputNode\(\)\['forgotten'\]> is not used")

    def test_a_result_that_nobody_sees(self, handles: list[Any]) -> None:
        inp = InputNode()
        first = handles[0].one.bind(inp)
        handles[1].leaf.bind(first)
        self.bad(handles[1].two.bind(first), "nobody would see whether <leaf of rank 1> failed")

    def test_an_output_inside_the_graph(self, handles: list[Any]) -> None:
        first = handles[0].one.bind(InputNode())
        self.bad(handles[1].two.bind(MultiOutputNode([first])), "another <MultiOutputNode>")
        second = handles[0].one.bind(InputNode())
        MultiOutputNode([second])
        self.bad(second, "another <MultiOutputNode> than the node that is compiled")

    def test_outputs_that_are_none(self, handles: list[Any]) -> None:
        self.bad(MultiOutputNode([]), "has no outputs")
        with pytest.raises(ConfigError, match=r"MultiOutputNode holds <InputNode>; expected what bind\(\) returned"):
            MultiOutputNode([InputNode()])
        with pytest.raises(ConfigError, match="MultiOutputNode holds 3"):
            MultiOutputNode([3])  # type: ignore[list-item]

    def test_nodes_inside_other_objects(self, handles: list[Any]) -> None:
        inp = InputNode()
        first = handles[0].one.bind(inp)
        with pytest.raises(ConfigError, match=r"<one of rank 0> stands for a value .* not inside another object"):
            handles[1].two.bind(inp, [first])
        with pytest.raises(ConfigError, match="<InputNode> stands for a value"):
            handles[1].two.bind(inp, key={"x": (inp,)})
        with pytest.raises(ConfigError, match="cannot be pickled or copied"):
            copy.deepcopy(first)

    def test_a_constant_that_cannot_be_pickled(self, handles: list[Any]) -> None:
        with pytest.raises(ConfigError, match="<one of rank 0>: a constant generator cannot be pickled"):
            handles[0].one.bind(InputNode(), (x for x in ()))

    def test_workers_of_two_executors(self, handles: list[Any]) -> None:
        other = DistributedExecutor(SteeredBackend(), Placement(world_size=1, worker_class="x:y"), ParallelConfig())
        self.bad(other.handles[0].two.bind(handles[0].one.bind(InputNode())), "workers of several executors")
        other.shutdown()

    @pytest.mark.parametrize("key", [-1, 1.5, None, True, slice(0, 2)])
    def test_keys_of_the_input(self, key: Any) -> None:
        with pytest.raises(ConfigError, match="give the position"):
            _ = InputNode()[key]

    def test_unpacking_the_input(self) -> None:
        with pytest.raises(ConfigError, match="cannot be unpacked"):
            _, _ = InputNode()

    def test_a_transport_that_is_none(self, handles: list[Any]) -> None:
        with pytest.raises(ConfigError, match="transport='shm'; use one of 'auto', 'grpc', 'nccl', 'gloo', 'shared'"):
            handles[0].one.bind(InputNode()).with_tensor_transport("shm")

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("_submit_timeout", -2),
            ("_buffer_size_bytes", 0),
            ("_max_inflight_executions", 0),
            ("_max_inflight_executions", 2.5),
            ("_max_buffered_results", -1),
        ],
    )
    def test_options(self, handles: list[Any], option: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=f"{option}={value}; expected"):
            handles[0].one.bind(InputNode()).experimental_compile(**{option: value})

    @pytest.mark.parametrize("option", [{"_buffer_size_bytes": 1000}, {"_overlap_gpu_communication": True}])
    def test_options_that_would_do_nothing(self, option: dict[str, Any]) -> None:
        executor = DistributedExecutor(
            InProcessBackend(), Placement(world_size=1, worker_class="graph_worker:GraphWorker"), ParallelConfig()
        )
        try:
            with pytest.raises(ConfigError, match=next(iter(option))):
                executor.handles[0].echo.bind(InputNode()).experimental_compile(**option)
        finally:
            executor.shutdown()

    def test_what_was_refused_can_be_compiled_after_all(self, handles: list[Any], backend: SteeredBackend) -> None:
        node = handles[0].one.bind(InputNode())
        backend.refuses = ConfigError("not this")
        self.bad(node, "not this")
        backend.refuses = None
        node.experimental_compile()
        self.bad(node, "was called on this node before")


class TestBounds:
    def test_in_flight_is_what_was_not_got_and_not_passed_by(self, handles: list[Any], backend: SteeredBackend) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile(_max_inflight_executions=2)
        refs = [graph.execute(i) for i in range(2)]
        (steered,) = backend.compiled
        for index in range(2):
            steered.answer(index, index)
        with pytest.raises(GraphCapacityExceeded):  # done, but not got
            graph.execute(2)
        assert len(steered.futures) == 2
        assert refs[1].get() == 1
        refs += [graph.execute(2), graph.execute(3)]
        with pytest.raises(GraphCapacityExceeded):
            graph.execute(4)
        assert refs[0].get() == 0

    def test_a_get_that_timed_out_changes_nothing(self, handles: list[Any], backend: SteeredBackend) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile(_max_inflight_executions=1)
        ref = graph.execute(1)
        for timeout, limit in ((None, 7.0), (0, 0), (0.5, 0.5)):
            with pytest.raises(RpcTimeout, match=f"no result of one within {limit:g} s"):
                ref.get(timeout)
            assert backend.waits[-1] == limit
        with pytest.raises(GraphCapacityExceeded):
            graph.execute(2)
        backend.compiled[0].answer(0, "late")
        assert ref.get() == "late"

    def test_dropped_runs_are_forgotten(self, handles: list[Any], backend: SteeredBackend) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile(_max_inflight_executions=2)
        (steered,) = backend.compiled
        for i in range(50):
            graph.execute(i)
            gc.collect()
            steered.answer(i, i)
        assert graph.execute(50) is not None
        assert len(graph._runs) <= 2

    def test_no_room_within_the_submit_time_out(self, handles: list[Any], backend: SteeredBackend) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile(_max_inflight_executions=1, _submit_timeout=0)
        graph.execute(1)
        with pytest.raises(RpcTimeout, match="refs that were dropped, did not end within 0 s"):
            graph.execute(2)

    def test_a_cancelled_await_can_be_repeated(self, handles: list[Any], backend: SteeredBackend) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile(enable_asyncio=True)

        async def use() -> None:
            future = await graph.execute_async(1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(_value(future), 0.05)
            backend.compiled[0].answer(0, "late")
            assert await future == "late"

        asyncio.run(use())


async def _value(future: Any) -> Any:
    return await future


class TestEnds:
    def test_a_death_gets_its_rank(self, handles: list[Any], backend: SteeredBackend) -> None:
        graph = handles[1].one.bind(InputNode()).experimental_compile()
        ref = graph.execute(1)
        backend.compiled[0].futures[0].set_exception(WorkerDied("w1", "killed by SIGKILL"))
        with pytest.raises(WorkerDied, match=r"worker w1 \(rank 1\) died: killed by SIGKILL"):
            ref.get()

    def test_a_dead_executor_is_not_asked(
        self, handles: list[Any], backend: SteeredBackend, executor: DistributedExecutor
    ) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile()
        backend.on_failure(backend.refs[1], WorkerDied("w1", "gone"))
        for attempt in (lambda: graph.execute(1), handles[0].one.bind(InputNode()).experimental_compile):
            with pytest.raises(WorkerDied, match="rank 1"):
                attempt()
        assert backend.compiled[0].futures == []

    def test_a_shut_down_executor_is_not_asked(self, handles: list[Any], executor: DistributedExecutor) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile()
        executor.shutdown()
        with pytest.raises(Shutdown):
            graph.execute(1)

    def test_teardown_is_given_a_time_and_can_be_repeated(
        self, handles: list[Any], backend: SteeredBackend, executor: DistributedExecutor
    ) -> None:
        graph = handles[0].one.bind(InputNode()).experimental_compile()
        ref = graph.execute(1)
        graph.teardown()
        graph.teardown()
        assert backend.compiled[0].teardowns == [executor.rpc_timeout] * 2
        backend.compiled[0].answer(0, 1)
        assert ref.get() == 1

    def test_what_cannot_be_read_is_an_error_that_names_its_node(
        self, handles: list[Any], backend: SteeredBackend
    ) -> None:
        graph = handles[1].one.bind(InputNode()).experimental_compile()
        ref = graph.execute(1)
        backend.compiled[0].futures[0].set_result([b"p no pickle"])
        with pytest.raises(LightvllmError, match="the result of one of rank 1 cannot be read"):
            ref.get()

    def test_the_users_own_mistake_stays_one(self, handles: list[Any], backend: SteeredBackend) -> None:
        graph = handles[1].one.bind(InputNode()).experimental_compile()
        ref = graph.execute(1)
        backend.compiled[0].futures[0].set_result([encode_failure(ConfigError("use another model"), 0)])
        with pytest.raises(ConfigError, match="use another model"):
            ref.get()

    def test_refs_say_what_they_are(self, handles: list[Any]) -> None:
        graph = MultiOutputNode([handles[0].one.bind(InputNode())]).experimental_compile()
        (ref,) = graph.execute(1)
        assert repr(ref) == "<CompiledDAGRef of execution 0, output 0>"
        with pytest.raises(ConfigError, match="cannot be pickled"):
            pickle.dumps([ref])


def test_a_worker_that_does_not_come_to_an_end_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    executor = DistributedExecutor(
        InProcessBackend(),
        Placement(world_size=2, worker_class="graph_worker:GraphWorker"),
        ParallelConfig(tensor_parallel_size=2),
        step_timeout=0.1,
    )
    a, b = executor.handles
    begun, go = tmp_path / "begun", tmp_path / "go"
    try:
        with InputNode() as inp:
            node = b.echo.bind(a.touch_and_wait.bind(inp, str(begun), str(go)))
        graph = node.experimental_compile()
        with pytest.raises(WorkerError, match=r"rank 1 failed in echo: RpcTimeout: touch_and_wait .* within 0\.1 s"):
            graph.execute(1).get(timeout=LIMIT)
        go.touch()
        assert graph.execute(2).get(timeout=LIMIT) == 2
    finally:
        executor.shutdown()

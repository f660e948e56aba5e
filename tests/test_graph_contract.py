"""The contract of compiled graphs, the same tests on every backend: the semantics of Ray's, and the waist's own.

What the authoring surface refuses before a backend is asked is in test_executors_graph.py. A module's tests share one
executor per backend, unless they end a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT, wait_until

from lightvllm.backends.base import Backend, Placement
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
from lightvllm.executors.graph import CompiledDAG, InputNode, MultiOutputNode
from lightvllm.messages import decode_reply, encode_call

WORLD = 3


def make_inprocess() -> Backend:
    return InProcessBackend()


def make_k8s() -> Backend:
    pytest.importorskip("grpc", reason="the k8s extra is not installed")
    from lightvllm.backends.k8s.backend import KubernetesBackend

    return KubernetesBackend()


def make_ray() -> Backend:
    pytest.importorskip("ray", reason="the ray extra is not installed")
    from lightvllm.backends.ray.backend import RayBackend

    return RayBackend()


BACKENDS = {"uniproc": make_inprocess, "k8s": make_k8s, "ray": make_ray}
MARKS = {"ray": [pytest.mark.ray]}
ALL = [pytest.param(name, marks=MARKS.get(name, [])) for name in BACKENDS]
PROCESSES = [pytest.param(name, marks=MARKS.get(name, [])) for name in ("k8s", "ray")]


@contextlib.contextmanager
def running(name: str) -> Iterator[DistributedExecutor]:
    made = DistributedExecutor(
        BACKENDS[name](),
        Placement(world_size=WORLD, worker_class="graph_worker:GraphWorker"),
        ParallelConfig(tensor_parallel_size=WORLD),
        start_timeout=LIMIT,
        rpc_timeout=LIMIT,
        step_timeout=LIMIT,
        shutdown_timeout=0.5,
    )
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[DistributedExecutor]:
    with running(request.param) as executor:
        yield executor


@pytest.fixture
def executor(shared: DistributedExecutor) -> Iterator[DistributedExecutor]:
    """The workers are well after each test, and no two calls have run at a time."""
    yield shared
    assert shared.collective_rpc("echo", LIMIT, args=(1,)) == [1] * WORLD
    assert [overlaps for _, overlaps in shared.collective_rpc("read_log")] == [0] * WORLD


@pytest.fixture
def fresh(request: pytest.FixtureRequest) -> Iterator[DistributedExecutor]:
    """An executor that the test may end."""
    with running(request.param) as executor:
        yield executor


@contextlib.contextmanager
def compiled(node: Any, **options: Any) -> Iterator[CompiledDAG]:
    graph = node.experimental_compile(**options)
    try:
        yield graph
    finally:
        graph.teardown()


def chain(executor: DistributedExecutor, *, method: str = "extend") -> Any:
    """Each worker in turn appends its rank to the list that it is given."""
    with InputNode() as inp:
        value: Any = inp
        for handle in executor.handles:
            value = getattr(handle, method).bind(value, handle.rank)
    return value


def plain_call(executor: DistributedExecutor, rank: int, method: str, *args: Any) -> Future[Any]:
    """A call of one worker, whatever has become of the others."""
    return executor.backend.call(executor.workers[rank], *encode_call(method, args, None))


def identity(executor: DistributedExecutor, rank: int = 0) -> Any:
    with InputNode() as inp:
        return executor.handles[rank].echo.bind(inp)


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestShapes:
    def test_a_chain_across_workers(self, executor: DistributedExecutor) -> None:
        with compiled(chain(executor)) as graph:
            for i in range(20):
                assert graph.execute([i]).get() == [i, 0, 1, 2]

    def test_fan_out(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = MultiOutputNode([handle.join.bind(inp, handle.rank) for handle in executor.handles])
        with compiled(node) as graph:
            for i in range(20):
                assert [ref.get() for ref in graph.execute(f"x{i}-")] == [f"x{i}-0", f"x{i}-1", f"x{i}-2"]

    def test_a_diamond_which_fans_in(self, executor: DistributedExecutor) -> None:
        a, b, c = executor.handles
        with InputNode() as inp:
            top = a.join.bind(inp, "a")
            node = a.join.bind(b.join.bind(top, "b"), c.join.bind(top, "c"), top)
        with compiled(node) as graph:
            for i in range(20):
                assert graph.execute(i).get() == f"{i}ab{i}ac{i}a"

    def test_a_worker_that_is_used_again_and_again(self, executor: DistributedExecutor) -> None:
        a, b, _ = executor.handles
        with InputNode() as inp:
            value = inp
            for number, handle in enumerate((a, b, a, a, b, b, a)):
                value = handle.extend.bind(value, number)
        with compiled(value) as graph:
            refs = [graph.execute([]) for _ in range(5)]
            assert [ref.get() for ref in refs] == [[0, 1, 2, 3, 4, 5, 6]] * 5

    def test_a_value_that_is_used_twice_and_also_a_result(self, executor: DistributedExecutor) -> None:
        a, b, _ = executor.handles
        with InputNode() as inp:
            first = a.echo.bind(inp)
            node = MultiOutputNode([first, b.join.bind(first, first), first, a.join.bind(first, "!")])
        with compiled(node) as graph:
            assert [ref.get() for ref in graph.execute("x")] == ["x", "xx", "x", "x!"]

    def test_constants_and_keywords(self, executor: DistributedExecutor) -> None:
        a, b, _ = executor.handles
        with InputNode() as inp:
            first = a.join.bind("<", inp, ">", sep="|")
            node = b.join.bind(1, first, {"k": [2]}, sep=a.echo.bind(inp))
        with compiled(node) as graph:
            assert graph.execute("-").get() == "1-<|-|>-{'k': [2]}"
            assert graph.execute("+").get() == "1+<|+|>+{'k': [2]}"

    def test_arguments_by_position_and_by_name(self, executor: DistributedExecutor) -> None:
        a, b, c = executor.handles
        with InputNode() as inp:
            node = c.join.bind(a.join.bind(inp[1], inp.left), b.join.bind(inp["right"], inp.left), inp[0])
        with compiled(node) as graph:
            assert graph.execute("0", "1", left="l", right="r").get() == "1lrl0"
            with pytest.raises(
                ConfigError, match=r"given 1 positional, left=; .* asks for 2 positional .*left=, right="
            ):
                graph.execute("0", left="l")
            with pytest.raises(ConfigError, match="other="):
                graph.execute("0", "1", left="l", right="r", other=1)
            assert graph.execute("a", "b", left="c", right="d").get() == "bcdca"

    def test_a_position_that_is_not_used_must_be_given_all_the_same(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = executor.handles[0].echo.bind(inp[1])
        with compiled(node) as graph:
            assert graph.execute("unused", "used").get() == "used"
            with pytest.raises(ConfigError, match="1 positional"):
                graph.execute("used")

    def test_one_output_in_a_list(self, executor: DistributedExecutor) -> None:
        with compiled(MultiOutputNode([identity(executor)])) as graph:
            (ref,) = graph.execute(1)
            assert ref.get() == 1


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestValues:
    def test_values_of_many_megabytes(self, executor: DistributedExecutor) -> None:
        blob = os.urandom(1 << 20)
        with compiled(chain(executor)) as graph:
            for size in (8, 0, 8, 16, 1):
                refs = [graph.execute([blob * size, i]) for i in range(3)]
                for i, ref in enumerate(refs):
                    assert ref.get() == [blob * size, i, 0, 1, 2]

    def test_none_and_false_are_values(self, executor: DistributedExecutor) -> None:
        with compiled(identity(executor)) as graph:
            assert [graph.execute(value).get() for value in (None, False, 0, b"", ())] == [None, False, 0, b"", ()]

    @pytest.mark.parametrize(
        ("dtype", "shape"),
        [
            ("float32", (64, 33)),
            ("bfloat16", (64, 33)),
            ("float16", (7, 5, 3)),
            ("float8_e4m3fn", (256, 2)),
            ("float8_e5m2", (256, 2)),
            ("int8", (3,)),
            ("bfloat16", ()),
            ("bfloat16", (0, 16)),
            ("bfloat16", (1024, 2048)),
        ],
    )
    def test_tensors_cross_bit_by_bit(self, executor: DistributedExecutor, dtype: str, shape: tuple[int, ...]) -> None:
        pytest.importorskip("torch")
        a, b, _ = executor.handles
        with InputNode() as inp:
            tensor = a.tensor.bind(inp, shape)
            node = MultiOutputNode([a.digest.bind(tensor), b.digest.bind(tensor)])
        with compiled(node) as graph:
            for _ in range(2):
                here, there = (ref.get() for ref in graph.execute(dtype))
                assert here == there
                assert here[:2] == (f"torch.{dtype}", shape)

    def test_tensors_inside_other_objects(self, executor: DistributedExecutor) -> None:
        pytest.importorskip("torch")
        a, b, _ = executor.handles
        with InputNode() as inp:
            pair = a.pair.bind(a.tensor.bind(inp, (6, 4)))
            node = MultiOutputNode([a.first_row.bind(pair), b.first_row.bind(pair)])
        with compiled(node) as graph:
            here, there = (ref.get() for ref in graph.execute("bfloat16"))
            assert here == there
            assert here[1] == (4,)

    def test_what_stays_on_a_worker_need_not_be_pickled(self, executor: DistributedExecutor) -> None:
        a, _, _ = executor.handles
        with InputNode() as inp:
            node = a.is_my_lock.bind(a.lock.bind(inp))
        with compiled(node) as graph:
            assert graph.execute(1).get() is True

    def test_what_cannot_be_pickled_is_an_error_of_the_node_that_made_it(self, executor: DistributedExecutor) -> None:
        a, b, _ = executor.handles
        with InputNode() as inp:
            node = MultiOutputNode([b.echo.bind(a.unpicklable.bind(inp)), a.echo.bind(inp)])
        with compiled(node) as graph:
            bad, good = graph.execute(1)
            with pytest.raises(WorkerError, match=r"rank 0 failed in unpicklable: TypeError: .*pickle"):
                bad.get()
            assert good.get() == 1
            with pytest.raises(ConfigError, match=r"argument of execute cannot be pickled: .*lock"):
                graph.execute(threading.Lock())


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestRefs:
    def test_results_can_be_got_in_any_order(self, executor: DistributedExecutor) -> None:
        with compiled(chain(executor)) as graph:
            refs = [graph.execute([i]) for i in range(10)]
            for i in (7, 2, 9, 0, 1, 8, 3, 5, 4, 6):
                assert refs[i].get() == [i, 0, 1, 2]

    def test_the_outputs_of_one_execution_can_be_got_apart(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = MultiOutputNode([handle.join.bind(inp, handle.rank) for handle in executor.handles])
        with compiled(node) as graph:
            first, second = graph.execute("a"), graph.execute("b")
            assert (second[2].get(), first[1].get(), first[0].get()) == ("b2", "a1", "a0")
            assert (second[0].get(), first[2].get(), second[1].get()) == ("b0", "a2", "b1")

    def test_a_result_can_be_got_once(self, executor: DistributedExecutor) -> None:
        with compiled(identity(executor)) as graph:
            ref = graph.execute(1)
            assert ref.get() == 1
            with pytest.raises(ConfigError, match="got already, which can be done once; keep the result"):
                ref.get()

    def test_refs_cannot_be_copied_or_pickled(self, executor: DistributedExecutor) -> None:
        with compiled(identity(executor)) as graph:
            ref = graph.execute(1)
            for attempt, what in ((copy.copy, "copied"), (copy.deepcopy, "deep copied"), (pickle.dumps, "pickled")):
                with pytest.raises(ConfigError, match=f"CompiledDAGRef cannot be {what}"):
                    attempt(ref)
            with pytest.raises(ConfigError, match="CompiledDAGRef cannot be pickled"):
                executor.collective_rpc("echo", args=(ref,))
            assert ref.get() == 1

    def test_a_time_out_of_zero_looks_and_does_not_wait(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = executor.handles[0].touch_and_wait.bind(inp, str(begun), str(go))
        with compiled(node) as graph:
            ref = graph.execute("x")
            wait_until(begun.exists, "the step to begin")
            with pytest.raises(RpcTimeout, match="no result of touch_and_wait within 0 s"):
                ref.get(timeout=0)
            go.touch()

            def poll() -> Any:
                with contextlib.suppress(RpcTimeout):
                    return ref.get(timeout=0)

            assert wait_until(poll, "the result") == "x"

    def test_a_get_that_timed_out_can_be_repeated(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = executor.handles[1].touch_and_wait.bind(inp, str(begun), str(go))
        with compiled(node) as graph:
            ref, later = graph.execute("x"), graph.execute("y")
            with pytest.raises(RpcTimeout, match=r"within 0\.2 s"):
                ref.get(timeout=0.2)
            with pytest.raises(TimeoutError):
                later.get(timeout=0.1)
            go.touch()
            assert (later.get(), ref.get(timeout=-1)) == ("y", "x")
            with pytest.raises(ConfigError, match="timeout=-2"):
                graph.execute("z").get(timeout=-2)

    def test_several_threads_can_get(self, executor: DistributedExecutor) -> None:
        with compiled(chain(executor)) as graph:
            refs = [graph.execute([i]) for i in range(10)]
            got: dict[int, Any] = {}

            def get(index: int) -> None:
                got[index] = refs[index].get()

            threads = [threading.Thread(target=get, args=(i,)) for i in reversed(range(10))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
            assert got == {i: [i, 0, 1, 2] for i in range(10)}


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestBounds:
    def test_executions_in_flight_are_bounded(self, executor: DistributedExecutor) -> None:
        with compiled(identity(executor), _max_inflight_executions=2) as graph:
            refs = [graph.execute(0), graph.execute(1)]
            with pytest.raises(GraphCapacityExceeded, match=r"2 executions are in flight.*_max_inflight_executions"):
                graph.execute(2)
            assert refs[0].get() == 0
            refs.append(graph.execute(3))
            with pytest.raises(GraphCapacityExceeded):
                graph.execute(4)
            assert [refs[2].get(), refs[1].get()] == [3, 1]

    def test_ten_by_default(self, executor: DistributedExecutor) -> None:
        with compiled(identity(executor)) as graph:
            refs = [graph.execute(i) for i in range(10)]
            with pytest.raises(GraphCapacityExceeded):
                graph.execute(10)
            assert [ref.get() for ref in refs] == list(range(10))

    def test_getting_a_later_result_makes_room_and_leaves_the_earlier_ones(self, executor: DistributedExecutor) -> None:
        with compiled(identity(executor), _max_inflight_executions=3) as graph:
            refs = []
            for i in range(15):
                refs.append(graph.execute(i))
                if i % 3 == 2:
                    assert refs[i].get() == i
            assert [refs[i].get() for i in range(15) if i % 3 != 2] == [i for i in range(15) if i % 3 != 2]

    def test_results_left_behind_are_bounded(self, executor: DistributedExecutor) -> None:
        with compiled(identity(executor), _max_buffered_results=2) as graph:
            refs = [graph.execute(i) for i in range(4)]
            assert refs[1].get() == 1
            with pytest.raises(GraphCapacityExceeded, match="2 earlier results have not been got"):
                refs[3].get()
            assert [refs[i].get() for i in (0, 3, 2)] == [0, 3, 2]

    def test_dropped_refs_make_room(self, executor: DistributedExecutor) -> None:
        with compiled(chain(executor), _max_inflight_executions=2) as graph:
            for i in range(25):
                graph.execute([i])
            assert graph.execute([25]).get() == [25, 0, 1, 2]

    def test_a_list_of_refs_makes_room_when_all_are_got_or_dropped(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = MultiOutputNode([handle.echo.bind(inp) for handle in executor.handles[:2]])
        with compiled(node, _max_inflight_executions=1) as graph:
            first, second = graph.execute(1)
            with pytest.raises(GraphCapacityExceeded):
                graph.execute(2)
            del first
            with pytest.raises(GraphCapacityExceeded):
                graph.execute(2)
            del second
            third, fourth = graph.execute(3)
            assert (third.get(), fourth.get()) == (3, 3)

    def test_dropped_refs_whose_execution_lasts_are_waited_for(
        self, executor: DistributedExecutor, tmp_path: Path
    ) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = executor.handles[0].touch_and_wait.bind(inp, str(begun), str(go))
        with compiled(node, _max_inflight_executions=1, _submit_timeout=0.1) as graph:
            graph.execute(1)
            with pytest.raises(RpcTimeout, match=r"dropped, did not end within 0\.1 s"):
                graph.execute(2)
            go.touch()
            ref = wait_until(lambda: _unless_late(lambda: graph.execute(2)), "room")
            assert ref.get() == 2


def _unless_late(attempt: Callable[[], Any]) -> Any:
    with contextlib.suppress(RpcTimeout):
        return attempt()
    return None


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestErrors:
    def test_an_exception_is_the_refs_and_the_graph_goes_on(self, executor: DistributedExecutor) -> None:
        a, b, c = executor.handles
        with InputNode() as inp:
            node = c.echo.bind(b.negative.bind(a.echo.bind(inp)))
        with compiled(node) as graph:
            refs = [graph.execute(value) for value in (1, -2, 3, -4)]
            assert refs[0].get() == 1
            with pytest.raises(WorkerError, match="rank 1 failed in negative: ValueError: -2 is negative") as caught:
                refs[1].get()
            assert (caught.value.rank, caught.value.method, caught.value.kind) == (1, "negative", "ValueError")
            assert "in negative" in caught.value.remote_traceback
            assert refs[2].get() == 3
            with pytest.raises(WorkerError, match="-4 is negative"):
                refs[3].get()
            with pytest.raises(ConfigError, match="got already"):
                refs[3].get()
            assert graph.execute(5).get() == 5

    def test_only_the_refs_that_depend_on_it_raise(self, executor: DistributedExecutor) -> None:
        a, b, c = executor.handles
        with InputNode() as inp:
            bad, good = a.negative.bind(inp), b.echo.bind(inp)
            node = MultiOutputNode([bad, good, c.join.bind(good, bad), c.echo.bind(good), b.echo.bind(bad)])
        with compiled(node) as graph:
            for _ in range(2):
                refs = graph.execute(-1)
                for index in (0, 2, 4):
                    with pytest.raises(WorkerError, match="rank 0 failed in negative: ValueError: -1 is negative"):
                        refs[index].get()
                assert (refs[1].get(), refs[3].get()) == (-1, -1)
                assert [ref.get() for ref in graph.execute(1)] == [1, 1, "11", 1, 1]

    def test_what_is_put_off_is_finished_at_once(self, executor: DistributedExecutor) -> None:
        a, b, _ = executor.handles
        with InputNode() as inp:
            kept = a.put_off.bind(inp)
            node = MultiOutputNode([a.extend.bind(kept, "a"), b.extend.bind(kept, "b"), a.put_off_and_fail.bind(inp)])
        with compiled(node) as graph:
            refs = graph.execute(7)
            assert [ref.get() for ref in refs[:2]] == [[7, True, "a"], [7, True, "b"]]
            with pytest.raises(WorkerError, match="rank 0 failed in put_off_and_fail: ValueError: too late"):
                refs[2].get()

    def test_a_method_that_does_not_exist(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = executor.handles[2].no_such_method.bind(inp)
        with compiled(node) as graph, pytest.raises(WorkerError, match="rank 2 failed in no_such_method: Attribute"):
            graph.execute(1).get()

    def test_compiling_twice(self, executor: DistributedExecutor) -> None:
        node = chain(executor)
        graph = node.experimental_compile()
        with pytest.raises(ConfigError, match="experimental_compile was called on this node before"):
            node.experimental_compile()
        assert graph.execute([]).get() == [0, 1, 2]
        graph.teardown()
        with pytest.raises(ConfigError, match="called on this node before"):
            node.experimental_compile()

    def test_a_transport_that_the_backend_has_not_is_refused(self, executor: DistributedExecutor) -> None:
        """NCCL needs GPUs, and these workers have none."""
        with InputNode() as inp:
            node = executor.handles[0].echo.bind(inp).with_tensor_transport("nccl")
            result = executor.handles[1].echo.bind(node)
        with pytest.raises(ConfigError, match="nccl"):
            result.experimental_compile()
        assert executor.collective_rpc("echo", args=(2,)) == [2] * WORLD

    def test_auto_is_what_there_is(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = executor.handles[0].tensor.bind(inp, (3, 4)).with_tensor_transport()
            result = executor.handles[1].digest.bind(node)
        with compiled(result) as graph:
            assert graph.execute("float16").get()[:2] == ("torch.float16", (3, 4))


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestOrder:
    def test_graph_calls_and_plain_ones_share_each_workers_order(self, executor: DistributedExecutor) -> None:
        a, b, c = executor.handles
        with InputNode() as inp:
            node = MultiOutputNode([b.join.bind(inp, "x"), c.join.bind(b.join.bind(a.join.bind(inp, "a"), "b"), "c")])
        expected: list[list[Any]] = [[], [], []]
        before = [len(log) for log, _ in executor.collective_rpc("read_log")]
        with compiled(node) as graph:
            kept: list[Any] = []
            for i in range(60):
                if i % 3 == 1 or i % 7 == 0:
                    kept.append(executor.collective_rpc("append", args=(("plain", i),), non_block=True))
                    for log in expected:
                        log.append(("plain", i))
                else:
                    kept += graph.execute(i)
                    expected[0].append((i, "a"))
                    expected[1] += [(i, "x"), (f"{i}a", "b")]
                    expected[2].append((f"{i}ab", "c"))
                if i % 8 == 7:
                    kept = [ref.get() if hasattr(ref, "get") else ref for ref in kept]
            for result in kept:
                if hasattr(result, "get"):
                    result.get()
            logs = executor.collective_rpc("read_log")
        assert [log[count:] for (log, _), count in zip(logs, before, strict=True)] == expected

    def test_a_plain_call_waits_for_the_execution_before_it(
        self, executor: DistributedExecutor, tmp_path: Path
    ) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = executor.handles[0].touch_and_wait.bind(inp, str(begun), str(go))
        with compiled(node) as graph:
            ref = graph.execute(1)
            wait_until(begun.exists, "the step to begin")
            call = executor.collective_rpc("echo", args=("plain",), non_block=True)
            with pytest.raises(RpcTimeout, match="no reply from rank 0 within"):
                call.result(0.3)
            go.touch()
            assert call.result() == ["plain"] * WORLD
            assert ref.get() == 1

    def test_an_execution_waits_for_the_plain_call_before_it(
        self, executor: DistributedExecutor, tmp_path: Path
    ) -> None:
        begun, go, ran = tmp_path / "begun", tmp_path / "go", tmp_path / "ran"
        with InputNode() as inp:
            node = executor.handles[1].touch.bind(executor.handles[0].echo.bind(inp), str(ran))
        with compiled(node) as graph:
            call = plain_call(executor, 1, "touch_and_wait", "plain", str(begun), str(go))
            wait_until(begun.exists, "the call to begin")
            ref = graph.execute(1)
            with pytest.raises(RpcTimeout):
                ref.get(0.3)
            assert not ran.exists()
            go.touch()
            assert ref.get() == 1
            assert decode_reply("touch_and_wait", call.result(LIMIT)) == "plain"

    def test_workers_wait_only_for_what_was_sent_to_themselves(
        self, executor: DistributedExecutor, tmp_path: Path
    ) -> None:
        """Rank 1's step waits for a plain call of rank 0, sent later; rank 0's own step is done by then."""
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = executor.handles[1].touch_and_wait.bind(executor.handles[0].echo.bind(inp), str(begun), str(go))
        with compiled(node) as graph:
            ref = graph.execute(1)
            wait_until(begun.exists, "the step to begin")
            assert executor.scatter_rpc("touch", {0: ["plain", str(go)]}) == ["plain"]
            assert ref.get() == 1

    def test_executions_overlap_at_different_workers(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        """The first execution's second step and the second one's first step end only when both have begun."""
        a, b, _ = executor.handles
        with InputNode() as inp:
            node = b.touch_and_wait.bind(a.touch_and_wait.bind(inp[0], inp[1], inp[2]), inp[3], inp[4])
        free = tmp_path / "free"
        free.touch()
        upper, lower = str(tmp_path / "a2"), str(tmp_path / "b1")
        with compiled(node) as graph:
            first = graph.execute(1, str(tmp_path / "a1"), str(free), lower, upper)
            second = graph.execute(2, upper, lower, str(tmp_path / "b2"), str(free))
            assert (first.get(), second.get()) == (1, 2)

    def test_two_graphs_on_the_same_workers(self, executor: DistributedExecutor) -> None:
        """Each in the other's direction, so that only one order at every worker lets them end."""
        a, b, c = executor.handles
        with InputNode() as inp:
            up = c.join.bind(b.join.bind(a.join.bind(inp, "a"), "b"), "c")
        with InputNode() as inp:
            down = a.join.bind(b.join.bind(c.join.bind(inp, "c"), "b"), "a")
        with compiled(up) as first, compiled(down) as second, compiled(chain(executor)) as third:
            for _ in range(5):
                refs = [graph.execute(i) for i in range(4) for graph in (first, second)]
                others = [third.execute([i]) for i in range(4)]
                got = [ref.get() for ref in refs]
                assert got == [text for i in range(4) for text in (f"{i}abc", f"{i}cba")]
                assert [ref.get() for ref in others] == [[i, 0, 1, 2] for i in range(4)]
            first.teardown()
            assert second.execute("x").get() == "xcba"

    def test_graphs_of_several_threads(self, executor: DistributedExecutor) -> None:
        results: dict[int, list[Any]] = {}

        def use(number: int, graph: CompiledDAG) -> None:
            results[number] = [graph.execute([number, i]).get() for i in range(20)]

        with compiled(chain(executor)) as first, compiled(chain(executor)) as second:
            threads = [threading.Thread(target=use, args=(n, graph)) for n, graph in enumerate((first, second, second))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
        assert results == {n: [[n, i, 0, 1, 2] for i in range(20)] for n in range(3)}


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestTeardown:
    def test_workers_are_usable_after_it_and_it_can_be_repeated(self, executor: DistributedExecutor) -> None:
        for _ in range(3):
            graph = chain(executor).experimental_compile()
            assert graph.execute([]).get() == [0, 1, 2]
            graph.teardown()
            graph.teardown()
            assert graph.is_teardown
            with pytest.raises(ConfigError, match="torn down"):
                graph.execute([])
            assert executor.collective_rpc("echo", args=(1,)) == [1] * WORLD

    def test_of_a_graph_that_was_never_executed(self, executor: DistributedExecutor) -> None:
        chain(executor).experimental_compile().teardown()

    def test_what_is_in_flight_comes_to_its_end(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        a, b, _ = executor.handles
        with InputNode() as inp:
            node = b.echo.bind(a.touch_and_wait.bind(inp, str(begun), str(go)))
        graph = node.experimental_compile()
        refs = [graph.execute(i) for i in range(5)]
        wait_until(begun.exists, "the first step to begin")
        tearing = threading.Thread(target=graph.teardown)
        tearing.start()
        wait_until(lambda: graph.is_teardown, "the tear-down to begin")
        with pytest.raises(ConfigError, match="torn down"):
            graph.execute(5)
        go.touch()
        tearing.join(LIMIT)
        assert not tearing.is_alive()
        assert [ref.get(timeout=0) for ref in refs] == list(range(5))


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestAsyncio:
    def test_results_are_awaited(self, executor: DistributedExecutor) -> None:
        async def use(graph: CompiledDAG) -> None:
            futures = [await graph.execute_async([i]) for i in range(10)]
            with pytest.raises(GraphCapacityExceeded):
                await graph.execute_async([10])
            assert await futures[9] == [9, 0, 1, 2]
            assert await asyncio.gather(*map(_value, futures[:9])) == [[i, 0, 1, 2] for i in range(9)]
            with pytest.raises(ConfigError, match="awaited already, which can be done once"):
                await futures[9]
            with pytest.raises(ConfigError, match="CompiledDAGFuture cannot be pickled"):
                pickle.dumps(futures[0])
            for i in range(25):
                await graph.execute_async([i])

        with compiled(chain(executor), enable_asyncio=True) as graph:
            asyncio.run(asyncio.wait_for(use(graph), LIMIT))
            with pytest.raises(ConfigError, match="use execute_async"):
                graph.execute([])

    def test_errors_and_lists(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = MultiOutputNode([executor.handles[0].negative.bind(inp), executor.handles[1].echo.bind(inp)])

        async def use(graph: CompiledDAG) -> None:
            bad, good = await graph.execute_async(-1)
            with pytest.raises(WorkerError, match="rank 0 failed in negative"):
                await bad
            assert await good == -1

        with compiled(node, enable_asyncio=True) as graph:
            asyncio.run(asyncio.wait_for(use(graph), LIMIT))

    def test_it_must_be_asked_for(self, executor: DistributedExecutor) -> None:
        with compiled(chain(executor)) as graph, pytest.raises(ConfigError, match="use execute"):
            asyncio.run(graph.execute_async([]))


async def _value(future: Any) -> Any:
    return await future


@pytest.mark.parametrize("shared", ALL, indirect=True)
class TestTheWaist:
    """``Backend.compile`` and ``Backend.wait``, without the executor's part."""

    def test_a_future_gets_done_whether_anybody_waits_or_not(self, executor: DistributedExecutor) -> None:
        with compiled(chain(executor)) as graph:
            told: Future[Any] = Future()
            ref = graph.execute([1])
            graph._future(0).add_done_callback(told.set_result)
            told.result(LIMIT)
            assert ref.get(timeout=0) == [1, 0, 1, 2]

    def test_waiting_ends_with_the_future_or_with_the_time(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = executor.handles[0].touch_and_wait.bind(inp, str(begun), str(go))
        with compiled(node) as graph:
            ref = graph.execute(1)
            future = graph._future(0)
            started = time.monotonic()
            executor.backend.wait(future, 0.2)
            assert not future.done()
            assert 0.2 <= time.monotonic() - started < 5.0
            go.touch()
            executor.backend.wait(future, LIMIT)
            assert future.done()
            assert ref.get(timeout=0) == 1

    def test_plain_futures_are_waited_for_too(self, executor: DistributedExecutor) -> None:
        future = executor.collective_rpc("echo", args=(1,), non_block=True)
        executor.backend.wait(future, LIMIT)
        assert future.done()


@pytest.mark.parametrize("fresh", ALL, indirect=True)
class TestEnds:
    def test_shutdown_fails_pending_refs(self, fresh: DistributedExecutor, tmp_path: Path) -> None:
        begun = tmp_path / "begun"
        with InputNode() as inp:
            node = fresh.handles[1].echo.bind(
                fresh.handles[0].touch_and_wait.bind(inp, str(begun), "/no/such/file", 20.0)
            )
        graph = node.experimental_compile()
        refs = [graph.execute(i) for i in range(3)]
        wait_until(begun.exists, "the step to begin")
        caught: list[BaseException] = []

        def get() -> None:
            try:
                refs[0].get()
            except BaseException as error:  # noqa: BLE001  the point of the test
                caught.append(error)

        getting = threading.Thread(target=get)
        getting.start()
        fresh.shutdown()
        getting.join(LIMIT)
        assert [type(error) for error in caught] == [Shutdown]
        for ref in refs[1:]:
            with pytest.raises(Shutdown):
                ref.get()
        with pytest.raises(Shutdown):
            graph.execute(3)
        graph.teardown()
        with pytest.raises(Shutdown):
            chain(fresh).experimental_compile()

    def test_a_worker_that_exits_in_a_step(self, fresh: DistributedExecutor, tmp_path: Path) -> None:
        a, b, c = fresh.handles
        with InputNode() as inp:
            node = MultiOutputNode([c.echo.bind(b.leave.bind(a.echo.bind(inp))), a.echo.bind(inp)])
        with InputNode() as inp:
            others = c.echo.bind(a.echo.bind(inp))
        graph, unharmed = node.experimental_compile(), others.experimental_compile()
        before = unharmed.execute("before")
        go = tmp_path / "go"  # it leaves when all has been executed, and not before
        plain_call(fresh, 1, "wait_for_file", str(go))
        refs = [ref for i in range(3) for ref in graph.execute(i)]
        go.touch()
        for ref in refs:
            with pytest.raises(WorkerDied, match=r"\(rank 1\) died") as caught:
                ref.get(timeout=10.0)
            assert caught.value.rank == 1
        with pytest.raises(WorkerDied):
            graph.execute(1)
        assert before.get() == "before"
        graph.teardown()
        unharmed.teardown()
        assert fresh.is_failed

    def test_only_our_own_exceptions_come_out(self, fresh: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = fresh.handles[0].leave.bind(inp)
        graph = node.experimental_compile()
        ref = graph.execute(1)
        seen: list[BaseException] = []
        for attempt in (
            ref.get,
            ref.get,
            lambda: graph.execute(1, 2),
            lambda: graph.execute(1),
            chain(fresh).experimental_compile,
        ):
            try:
                attempt()
            except BaseException as error:  # noqa: BLE001  the point of the test
                seen.append(error)
        assert len(seen) == 5
        for error in seen:
            assert isinstance(error, LightvllmError)
            assert type(error).__module__ == "lightvllm.errors"


@pytest.mark.parametrize("fresh", PROCESSES, indirect=True)
class TestSudden:
    @pytest.mark.parametrize("victim", [0, 1, 2])
    def test_sigkill_in_mid_step_fails_what_is_pending_at_once(
        self, fresh: DistributedExecutor, tmp_path: Path, victim: int
    ) -> None:
        """Rank 1 is in its step; the one before it and the one after it are idle."""
        a, b, c = fresh.handles
        begun = tmp_path / "begun"
        with InputNode() as inp:
            node = c.echo.bind(b.hang.bind(a.echo.bind(inp), str(begun)))
        graph = node.experimental_compile()
        refs = [graph.execute(i) for i in range(3)]
        wait_until(begun.exists, "the step to begin")
        os.kill(fresh.workers[victim].pid, signal.SIGKILL)
        started = time.monotonic()
        for ref in refs:
            with pytest.raises(WorkerDied, match=rf"\(rank {victim}\)"):
                ref.get()
        assert time.monotonic() - started < 5.0  # the step would have lasted 60 s
        with pytest.raises(WorkerDied):
            graph.execute(1)

    def test_the_survivors_can_be_called(self, fresh: DistributedExecutor, tmp_path: Path) -> None:
        """What the dead one was to hand to others is not waited for."""
        a, b, c = fresh.handles
        begun = tmp_path / "begun"
        with InputNode() as inp:
            node = MultiOutputNode([c.join.bind(b.hang.bind(inp, str(begun)), a.echo.bind(inp))])
        graph = node.experimental_compile()
        refs = [graph.execute(i) for i in range(3)]
        wait_until(begun.exists, "the step to begin")
        os.kill(fresh.workers[1].pid, signal.SIGKILL)
        for (ref,) in refs:
            with pytest.raises(WorkerDied):
                ref.get()
        for rank in (0, 2):
            assert decode_reply("echo", plain_call(fresh, rank, "echo", rank).result(LIMIT)) == rank
        graph.teardown()

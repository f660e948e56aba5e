"""Compiled graphs on the Kubernetes backend: what is its own, beyond the contract (test_graph_contract.py). Links
between workers over every kind of socket, both carriers, what breaks, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import msgspec
import psutil
from k8s_graph_worker import open_things
from k8s_servers import worker_command, write_token
from waiting import LIMIT, wait_until

from lightvllm.backends.base import Graph, GraphInput, GraphNode, GraphResult, Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.backends.k8s.edges import Edges, Offer
from lightvllm.backends.k8s.programs import INSTALL, Install, Programs, pack, unpack
from lightvllm.certs import Authority
from lightvllm.config import ParallelConfig
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout, WorkerDied, WorkerError
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.executors.graph import InputNode, MultiOutputNode
from lightvllm.messages import StageCredentials, decode_reply, encode_call
from lightvllm.transfer import frames

MANY = 8 << 20  # bytes, more than sockets hold
ENDING = re.compile("lightvllm-(ticket|push)")  # threads of a graph that is being torn down


def pem_files(folder: Path, authority: Authority, name: str, usage: Any) -> list[str]:
    issued = authority.issue(name, usage, ["127.0.0.1"])
    paths = []
    for kind, content in (("cert", issued.cert), ("key", issued.key), ("ca", authority.cert)):
        path = folder / f"{name}-{kind}.pem"
        path.write_bytes(content)
        paths.append(str(path))
    return paths


@contextlib.contextmanager
def static_workers(folder: Path, count: int, tls: bool) -> Iterator[dict[str, Any]]:
    """``lightvllm worker``, ``count`` times; the options of a backend for them."""
    token = write_token(folder)
    listen = ["--listen", "127.0.0.1:0", "--token-file", token]
    options: dict[str, Any] = {"token_file": token}
    if tls:
        authority = Authority.new()
        names = ("--tls-cert", "--tls-key", "--tls-ca")
        files = pem_files(folder, authority, "worker", "server")
        listen += [text for pair in zip(names, files, strict=True) for text in pair]
        driver = pem_files(folder, authority, "driver", "client")
        options |= dict(zip(("tls_cert", "tls_key", "tls_ca"), driver, strict=True))
    with contextlib.ExitStack() as stack:
        commands = [stack.enter_context(worker_command(*listen)) for _ in range(count)]
        yield {**options, "workers": tuple(command.address() for command in commands)}


@contextlib.contextmanager
def running(count: int = 2, step_timeout: float = LIMIT, **options: Any) -> Iterator[DistributedExecutor]:
    made = DistributedExecutor(
        KubernetesBackend(**options),
        Placement(world_size=count, worker_class="k8s_graph_worker:K8sGraphWorker"),
        ParallelConfig(tensor_parallel_size=count),
        start_timeout=LIMIT,
        rpc_timeout=LIMIT,
        step_timeout=step_timeout,
        shutdown_timeout=0.5,
    )
    try:
        yield made
    finally:
        made.shutdown()


KINDS = {
    "local-direct": ("plain AF_UNIX", "direct"),
    "local-grpc": ("plain AF_UNIX", "grpc"),
    "static-direct": ("plain AF_INET", "direct"),
    "tls-direct": ("SSLSocket AF_INET", "direct"),
    "tls-grpc": ("SSLSocket AF_INET", "grpc"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistributedExecutor]:
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if not kind.startswith("local"):
            folder = tmp_path_factory.mktemp("static")
            options = stack.enter_context(static_workers(folder, 2, kind.startswith("tls")))
        yield stack.enter_context(running(transport=KINDS[kind][1], **options))


@pytest.fixture
def executor(shared: DistributedExecutor) -> Iterator[DistributedExecutor]:
    yield shared
    assert shared.collective_rpc("echo", LIMIT, args=(1,)) == [1, 1]
    assert [overlaps for _, overlaps in shared.collective_rpc("read_log")] == [0, 0]


@pytest.fixture
def local() -> Iterator[DistributedExecutor]:
    """One that the test may spoil."""
    with running() as executor:
        yield executor


@contextlib.contextmanager
def compiled(node: Any, **options: Any) -> Iterator[Any]:
    graph = node.experimental_compile(**options)
    try:
        yield graph
    finally:
        graph.teardown()


def there_and_back(executor: DistributedExecutor) -> Any:
    a, b = executor.handles
    with InputNode() as inp:
        return a.join.bind(b.join.bind(a.join.bind(inp, "a"), "b"), "a")


def one_edge(executor: DistributedExecutor) -> Any:
    a, b = executor.handles
    with InputNode() as inp:
        return b.echo.bind(a.echo.bind(inp))


class TestLinks:
    def test_results_go_from_worker_to_worker(self, executor: DistributedExecutor, kind: str) -> None:
        with compiled(there_and_back(executor)) as graph, compiled(one_edge(executor)) as other:
            assert executor.collective_rpc("links") == [[KINDS[kind][0]] * 2] * 2  # one for each graph
            for i in range(5):
                refs = [graph.execute(f"{i}.{j}") for j in range(8)]
                assert other.execute(i).get() == i
                assert [ref.get() for ref in refs] == [f"{i}.{j}aba" for j in range(8)]
        assert executor.collective_rpc("links") == [[], []]
        assert set(executor.backend.carriers.values()) == {KINDS[kind][1]}  # type: ignore[attr-defined]

    def test_a_graph_without_edges_has_none(self, executor: DistributedExecutor) -> None:
        with InputNode() as inp:
            node = MultiOutputNode([handle.echo.bind(inp) for handle in executor.handles])
        with compiled(node) as graph:
            assert executor.collective_rpc("links") == [[], []]
            assert [ref.get() for ref in graph.execute(1)] == [1, 1]

    def test_large_results_in_both_directions_at_once(self, executor: DistributedExecutor) -> None:
        """Each worker writes more than sockets hold before it reads."""
        a, b = executor.handles
        with InputNode() as inp:
            up, down = a.blob.bind(inp), b.blob.bind(inp)
            node = MultiOutputNode([a.length.bind(down, up), b.length.bind(up, down)])
        with compiled(node) as graph:
            for size in (MANY, 0, MANY, 10):
                refs = [graph.execute(size) for _ in range(3)]
                assert [[ref.get() for ref in both] for both in refs] == [[2 * size] * 2] * 3

    def test_memory_that_is_used_again_is_sent_as_it_was(self, executor: DistributedExecutor, tmp_path: Path) -> None:
        """The consumer is busy while its producer fills the same memory for each of several executions."""
        a, b = executor.handles
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            array = a.array.bind(inp, MANY)
            node = MultiOutputNode([a.is_all.bind(array, inp), b.is_all.bind(array, inp)])
        with InputNode() as inp:
            gate = b.touch_and_wait.bind(inp, str(begun), str(go))
        with compiled(node) as graph, compiled(gate) as closed:
            held = closed.execute(0)
            wait_until(begun.exists, "the consumer to be busy")
            refs = [graph.execute(i) for i in range(4)]
            first = [both[0].get for both in refs]
            assert executor.scatter_rpc("echo", {0: ["the producer has done all"]})
            go.touch()
            assert held.get() == 0
            assert [get() for get in first] == [True] * 4
            assert [both[1].get() for both in refs] == [True] * 4
        assert executor.collective_rpc("waiting_values", args=()) == [0, 0]

    def test_a_step_does_not_see_what_another_has_done_to_its_argument(self, executor: DistributedExecutor) -> None:
        a, b = executor.handles
        with InputNode() as inp:
            array = a.array.bind(inp, MANY)
            small = a.array.bind(inp, 8)
            node = MultiOutputNode([b.add_one.bind(value) for value in (array, array, small, small, array)])
        with compiled(node) as graph:
            for i in range(3):
                assert [ref.get() for ref in graph.execute(i)] == [i + 1] * 5

    def test_nothing_is_left_after_tear_down(
        self, executor: DistributedExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="lv-", dir="/tmp") as temporary:
            monkeypatch.setattr(tempfile, "tempdir", temporary)
            self._check_nothing_is_left(executor)
            assert list(Path(temporary).iterdir()) == []

    def _check_nothing_is_left(self, executor: DistributedExecutor) -> None:
        def everything() -> Any:
            return executor.collective_rpc("open_things"), open_things()

        there_and_back(executor).experimental_compile().teardown()  # what is made once and kept
        before = wait_until(lambda: (now := everything()) and not ENDING.search(str(now)) and now, "quiet")
        for _ in range(3):
            graphs = [there_and_back(executor).experimental_compile(), one_edge(executor).experimental_compile()]
            assert everything() != before
            for graph in graphs:
                graph.execute("x")
                graph.teardown()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: everything() == before, "what the graphs had opened to be closed", 10.0)
        assert everything() == before

    def test_nobody_is_busy_while_nothing_is_executed(self, executor: DistributedExecutor) -> None:
        with compiled(there_and_back(executor)) as graph:
            for i in range(50):
                graph.execute(i).get()
            processes = [psutil.Process(), *(psutil.Process(worker.pid) for worker in executor.workers)]
            before = [sum(process.cpu_times()[:2]) for process in processes]
            assert not threading.Event().wait(2.0)
            used = [sum(process.cpu_times()[:2]) - then for process, then in zip(processes, before, strict=True)]
            assert max(used) <= 0.05


class TestOtherTransports:
    """What the contract asks of edges, of those that were given a transport by name."""

    @pytest.fixture(params=["grpc", "shared"])
    def transport(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_values(self, executor: DistributedExecutor, transport: Any) -> None:
        pytest.importorskip("torch")
        a, b = executor.handles
        with InputNode() as inp:
            tensor = a.tensor.bind(inp, (513, 100)).with_tensor_transport(transport)
            pair = a.pair.bind(tensor).with_tensor_transport(transport)
            node = MultiOutputNode(
                [b.digest.bind(tensor), a.digest.bind(tensor), b.first_row.bind(pair), a.first_row.bind(pair)]
            )
        with compiled(node) as graph:
            for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int8"):
                there, here, row_there, row_here = (ref.get() for ref in graph.execute(dtype))
                assert there == here
                assert row_there == row_here
                assert there[:2] == (f"torch.{dtype}", (513, 100))

    def test_in_both_directions_with_many_in_flight(self, executor: DistributedExecutor, transport: Any) -> None:
        a, b = executor.handles
        with InputNode() as inp:
            value = inp
            for number, handle in enumerate((a, b, a, b, a)):
                value = handle.extend.bind(value, number).with_tensor_transport("auto" if number == 1 else transport)
        with compiled(value) as graph:
            for _ in range(3):
                refs = [graph.execute([bytes(100_000)]) for _ in range(10)]
                assert [ref.get()[1:] for ref in refs] == [[0, 1, 2, 3, 4]] * 10

    def test_large_results_and_failures(self, executor: DistributedExecutor, transport: Any) -> None:
        a, b = executor.handles
        with InputNode() as inp:
            up = a.array.bind(7, inp).with_tensor_transport(transport)
            down = b.negative.bind(inp).with_tensor_transport(transport)
            node = MultiOutputNode([b.is_all.bind(up, 7), a.echo.bind(down)])
        with compiled(node) as graph:
            for size in (MANY, 0, 1, MANY + 1):
                assert [ref.get() for ref in graph.execute(size)] == [True, size]
            array, number = graph.execute(-1)
            with pytest.raises(WorkerError, match=r"rank 1 failed in negative: ValueError: -1 is negative"):
                number.get()
            with pytest.raises(WorkerError, match=r"rank 0 failed in array"):
                array.get()
            assert [ref.get() for ref in graph.execute(10)] == [True, 10]

    def test_nothing_is_left(self, executor: DistributedExecutor, transport: Any) -> None:
        def everything() -> Any:
            return executor.collective_rpc("open_things"), sorted(Path("/dev/shm").glob("lightvllm-stage-*"))

        def graph() -> Any:
            a, b = executor.handles
            with InputNode() as inp:
                return b.echo.bind(a.echo.bind(inp).with_tensor_transport(transport)).experimental_compile()

        graph().teardown()
        before = wait_until(lambda: (now := everything()) and not ENDING.search(str(now)) and now, "quiet")
        for _ in range(2):
            made = graph()
            assert everything() != before
            assert made.execute(1).get() == 1
            made.teardown()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: everything() == before, "what the graphs had opened to be closed", 10.0)
        assert everything() == before

    def test_a_worker_that_dies(self, local: DistributedExecutor, tmp_path: Path, transport: Any) -> None:
        a, b = local.handles
        begun = tmp_path / "begun"
        with InputNode() as inp:
            node = b.echo.bind(a.hang.bind(inp, str(begun)).with_tensor_transport(transport))
        graph = node.experimental_compile()
        ref = graph.execute(1)
        wait_until(begun.exists, "the step to begin")
        os.kill(local.workers[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            ref.get(10.0)
        answer = local.backend.call(local.workers[1], *encode_call("echo", ("free",), None))
        assert decode_reply("echo", answer.result(10.0)) == "free"
        graph.teardown()


@pytest.fixture(scope="module")
def small() -> Iterator[DistributedExecutor]:
    with running(max_message_bytes=100_000) as executor:
        yield executor


class TestLimits:
    def test_of_what_execute_is_given(self, small: DistributedExecutor) -> None:
        """Nobody gets the frame, not even those who could."""
        a, b = small.handles
        with InputNode() as inp:
            node = MultiOutputNode([a.length.bind(inp[0]), b.append.bind(inp[1])])
        logs = small.collective_rpc("read_log")
        with compiled(node) as graph:
            with pytest.raises(ConfigError, match=r"is 200\d\d\d bytes, more than max_message_bytes=100000"):
                graph.execute(bytes(200_000), 1)
            assert small.collective_rpc("read_log") == logs
            assert [ref.get() for ref in graph.execute(b"123", 1)] == [3, 1]

    def test_of_a_result_for_another_worker(self, small: DistributedExecutor) -> None:
        a, b = small.handles
        with InputNode() as inp:
            node = MultiOutputNode(
                [b.length.bind(a.blob.bind(inp)), b.length.bind(a.array.bind(7, inp)), b.echo.bind(inp)]
            )
        with compiled(node) as graph:
            for size in (150_000, 200_000):
                blob, array, good = graph.execute(size)
                for ref, method in ((blob, "blob"), (array, "array")):
                    with pytest.raises(
                        ConfigError, match=rf"the result of {method} is {size // 1000}\d\d\d bytes, more"
                    ):
                        ref.get()
                assert good.get() == size
            assert [ref.get() for ref in graph.execute(99_000)] == [99_000] * 3

    def test_of_results_for_the_driver(self, small: DistributedExecutor) -> None:
        a, b = small.handles
        with InputNode() as inp:
            node = MultiOutputNode([a.blob.bind(inp), a.blob.bind(inp), b.echo.bind(inp)])
        with compiled(node) as graph:
            first, second, other = graph.execute(60_000)
            for ref in (first, second):
                with pytest.raises(ConfigError, match="the reply of <graph"):
                    ref.get()
            assert other.get() == 60_000
            assert [ref.get() for ref in graph.execute(3)] == [bytes(3), bytes(3), 3]


class TestRefusals:
    @pytest.mark.parametrize("transport", ["nccl", "gloo"])
    def test_transports(self, small: DistributedExecutor, transport: Any) -> None:
        a, b = small.handles
        with InputNode() as inp:
            node = b.echo.bind(a.echo.bind(inp).with_tensor_transport(transport))
        with pytest.raises(ConfigError, match=f"'{transport}' of echo: this backend has 'grpc', 'shared'"):
            node.experimental_compile()

    @pytest.mark.parametrize("option", [{"_buffer_size_bytes": 10}, {"_overlap_gpu_communication": True}])
    def test_options(self, small: DistributedExecutor, option: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(option))):
            one_edge(small).experimental_compile(**option)

    def test_compiling_takes_no_longer_than_it_may(self, small: DistributedExecutor, tmp_path: Path) -> None:
        """The workers forget what they have learned of it."""
        begun, go = tmp_path / "begun", tmp_path / "go"
        before = small.collective_rpc("open_things")
        busy = small.backend.call(small.workers[1], *encode_call("touch_and_wait", (1, str(begun), str(go)), None))
        wait_until(begun.exists, "the worker to be busy")
        a, b = (worker.id for worker in small.workers)
        graph = Graph((GraphNode(a, "echo", (GraphInput(),)), GraphNode(b, "echo", (GraphResult(0),))), (1,))
        with pytest.raises(RpcTimeout, match=f"compile: worker {b} has not answered <graph install> within 0.2 s"):
            small.backend.compile(graph, 0.2)
        go.touch()
        assert decode_reply("touch_and_wait", busy.result(LIMIT)) == 1
        wait_until(lambda: small.collective_rpc("open_things") == before, "the workers to forget the graph")

    def test_only_programs_answer_to_their_names(self, small: DistributedExecutor) -> None:
        for method in ("<graph 999>", "<graph nothing>", INSTALL):
            with pytest.raises(WorkerError, match=r"not known here|Validation|Decode"):
                small.collective_rpc(method)


class TestBreaks:
    def test_a_link_that_breaks_fails_what_needs_it_and_nothing_else(self, local: DistributedExecutor) -> None:
        a, b = local.handles
        with InputNode() as inp:
            node = MultiOutputNode([b.echo.bind(a.cut.bind(inp)), a.echo.bind(inp), b.echo.bind(inp)])
        with compiled(node) as graph:
            for i in range(3):
                there, mine, other = graph.execute(i)
                with pytest.raises(WorkerError, match=r"rank 1 failed in echo: .*connection to worker local-0 is lost"):
                    there.get(10.0)
                assert (mine.get(), other.get()) == (i, i)
            assert local.collective_rpc("echo", args=(1,)) == [1, 1]
        with compiled(one_edge(local)) as again:
            assert again.execute("x").get() == "x"

    def test_one_that_waits_is_told_at_once(self, local: DistributedExecutor, tmp_path: Path) -> None:
        a, b = local.handles
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            held = a.touch_and_wait.bind(a.cut.bind(inp), str(begun), str(go))
            node = MultiOutputNode([b.echo.bind(held), a.echo.bind(inp)])
        with compiled(node) as graph:
            lost, mine = graph.execute(1)
            wait_until(begun.exists, "the producer to be busy")
            answer = local.backend.call(local.workers[1], *encode_call("echo", ("free",), None))
            assert decode_reply("echo", answer.result(10.0)) == "free"  # though the producer has not come to an end
            go.touch()
            assert mine.get() == 1
            with pytest.raises(WorkerError, match="is lost"):
                lost.get()

    def test_a_producer_that_does_not_come_to_its_end(self, tmp_path: Path) -> None:
        """Its consumer gives up after step_timeout; what comes later is not taken for a later execution's."""
        with running(step_timeout=0.3) as executor:
            a, b = executor.handles
            begun, go = tmp_path / "begun", tmp_path / "go"
            with InputNode() as inp:
                node = b.echo.bind(a.touch_and_wait.bind(inp, str(begun), str(go)))
            with compiled(node) as graph:
                late = graph.execute("late")
                wait_until(begun.exists, "the producer to begin")
                answer = executor.backend.call(executor.workers[1], *encode_call("echo", ("free",), None))
                assert decode_reply("echo", answer.result(LIMIT)) == "free"
                go.touch()
                with pytest.raises(WorkerError, match=r"RpcTimeout: worker local-0 has sent no result within 0.3 s"):
                    late.get(LIMIT)
                assert [graph.execute(i).get(LIMIT) for i in range(3)] == [0, 1, 2]
                assert executor.collective_rpc("waiting_values") == [0, 0]

    def test_tear_down_that_takes_too_long_can_be_repeated(self, local: DistributedExecutor, tmp_path: Path) -> None:
        begun, go = tmp_path / "begun", tmp_path / "go"
        with InputNode() as inp:
            node = local.handles[1].echo.bind(local.handles[0].touch_and_wait.bind(inp, str(begun), str(go)))
        graph = node.experimental_compile()
        ref = graph.execute("x")
        wait_until(begun.exists, "the step to begin")
        with pytest.raises(RpcTimeout, match=r"still executing after 0.2 s"):
            graph._graph.teardown(0.2)
        go.touch()
        graph.teardown()
        assert ref.get() == "x"
        assert local.collective_rpc("links") == [[], []]


# ----------------------------------------------------------------------------------------- the parts by themselves


class TestPayloads:
    @pytest.mark.parametrize("payloads", [[], [b""], [b"one"], [b"", b"two", b""], [b"x" * 100_000, b"y"]])
    def test_what_is_packed_is_unpacked(self, payloads: list[bytes]) -> None:
        for packed in (pack(payloads), memoryview(bytes(pack(payloads)))):
            assert [bytes(payload) for payload in unpack(packed, len(payloads))] == payloads

    @pytest.mark.parametrize(
        "packed", [b"", b"m", b"p" + bytes(16), pack([b"a", b"b"])[:-1], pack([b"a", b"b"]) + b"c"]
    )
    def test_what_is_not_is_refused(self, packed: bytes) -> None:
        with pytest.raises(LightvllmError, match=r"bytes came"):
            unpack(packed, 2)
        with pytest.raises(LightvllmError, match=r"bytes came"):
            unpack(b"x", 0)


LOCAL = StageCredentials(group="g", token="t")


@pytest.fixture
def pair() -> Iterator[Callable[..., tuple[Edges, Edges]]]:
    """Two ends: node 0 is at "a" and node 1 at "b", each used at the other."""
    with contextlib.ExitStack() as stack:

        def make(credentials: tuple[StageCredentials, ...] = (LOCAL, LOCAL), limit: int = 1000) -> Any:
            a = Edges({1: "b"}, limit, 2, 0.2, credentials[0])
            b = Edges({0: "a"}, limit, 2, 0.2, credentials[1])
            stack.callback(a.close)
            stack.callback(b.close)
            offer = a.listen("b", "127.0.0.1", 5.0)
            b.connect("a", offer, 5.0)
            a.accept(5.0)
            return a, b

        yield make


def certified(*authorities: Authority) -> tuple[StageCredentials, ...]:
    made = []
    for authority in authorities:
        issued = authority.issue("worker", "peer", ["worker"])
        made.append(StageCredentials(group="g", token="t", cert=issued.cert, key=issued.key, ca=authority.cert))
    return tuple(made)


class TestEdges:
    def test_results_come_in_any_order(self, pair: Any) -> None:
        a, b = pair()
        a.send(["b"], 1, 0, [b"one", b"more"])
        a.send(["b"], 2, 0, [b"two"])
        assert b.take(2, 0) == [b"two"]
        assert b.take(1, 0) == [b"one", b"more"]
        b.send(["a"], 1, 1, [b"back"])
        assert a.take(1, 1) == [b"back"]

    def test_none_comes_in_time(self, pair: Any) -> None:
        a, b = pair()
        with pytest.raises(RpcTimeout, match=r"worker a has sent no result within 0.2 s"):
            b.take(1, 0)
        b.end_of(1)
        a.send(["b"], 1, 0, [b"late"])
        a.send(["b"], 2, 0, [b"two"])
        assert b.take(2, 0) == [b"two"]
        assert b._arrived == {}

    @pytest.mark.parametrize(
        ("frame", "reason"),
        [
            ((frames.CALL, 1, b"echo", b""), "frame of kind 1, expected a result"),
            ((frames.DATA, 1, b"?", b""), "expected a result"),
            ((frames.DATA, 1, b"\1\0\0\0\1", b""), "result of node 1, which is not its own"),
            ((frames.DATA, 1, b"\7\0\0\0\1", b""), "result of node 7"),
            ((frames.DATA, 3, b"\0\0\0\0\1", b""), "execution 3, though 0 are done here and 2 may be in flight"),
            ((frames.DATA, 1, b"\0\0\0\0\0", bytes(60_000)), "larger than max_message_bytes=1000"),
            ((frames.DATA, 1, b"\0\0\0\0\1", bytes(100_000)), "more than max_message_bytes"),
        ],
    )
    def test_a_peer_that_breaks_the_protocol(self, pair: Any, frame: Any, reason: str) -> None:
        a, b = pair()
        for _ in range(2):
            a._links["b"].write(*frame, 5.0)
        wait_until(lambda: b._broken, "the link to be given up")
        with pytest.raises(LightvllmError, match=f"the connection to worker a is lost: .*{reason}"):
            b.take(1, 0)

    def test_the_other_end_closes(self, pair: Any) -> None:
        a, b = pair()
        a.send(["b"], 1, 0, [b"before"])
        a.close()
        assert b.take(1, 0) == [b"before"]
        with pytest.raises(LightvllmError, match=r"worker a is lost: .*closed"):
            b.take(2, 0)
        b.send(["a"], 1, 1, [b"nobody"])
        a.close()

    def test_mutual_tls(self, pair: Any) -> None:
        ours = Authority.new()
        a, b = pair(certified(ours, ours))
        a.send(["b"], 1, 0, [b"x" * 500])
        assert b.take(1, 0) == [b"x" * 500]
        assert a._links["b"]._tls.version() == "TLSv1.3"

    def test_one_of_another_group_is_refused(self, pair: Any) -> None:
        with pytest.raises(ConfigError, match=r"cannot connect to a at 127.0.0.1.*reach each other on any port"):
            pair(certified(Authority.new(), Authority.new()))

    def test_one_without_the_ticket_is_refused(self) -> None:
        a, b = Edges({}, 1000, 2, 0.2, LOCAL), Edges({}, 1000, 2, 0.2, LOCAL)
        try:
            offer = a.listen("b", "127.0.0.1", 5.0)
            with pytest.raises(ConfigError, match="cannot connect to a"):
                b.connect("a", Offer(offer.address, secrets.token_bytes(32)), 5.0)
            with pytest.raises(ConfigError, match="b did not connect for an edge of the graph: no answer in time"):
                a.accept(0.1)
        finally:
            a.close()
            b.close()

    def test_secrets_are_shown_by_no_repr(self) -> None:
        (credentials,) = certified(Authority.new())
        offer = Offer("unix:/x", b"very secret")
        install = Install(graph_id=1, worker="a", graph=Graph((), ()), credentials=credentials, timeout=1.0)
        for shown in (repr(install), repr(offer), repr([offer])):
            assert "PRIVATE" not in shown
            assert "secret" not in shown


def test_a_listener_off_loopback_needs_tls() -> None:
    graph = Graph((GraphNode("a", "echo", (GraphInput(),)), GraphNode("b", "echo", (GraphResult(0),))), (1,))
    programs = Programs(object(), "0.0.0.0:9000", 1000)
    asked = Install(graph_id=1, worker="a", graph=graph, offers_to={"b": ""}, credentials=LOCAL, timeout=1.0)
    before = threading.active_count()
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:9000 is not a loopback address"):
        decode_reply(INSTALL, programs.call(INSTALL, msgspec.msgpack.encode(asked)))
    wait_until(lambda: threading.active_count() == before, "the reactor's thread to end")


def test_frames_that_wait_can_be_kept(pair: Any) -> None:
    """``FrameSocket.keep_unsent``: what the caller does to its memory afterwards is not sent."""
    a, b = pair(limit=MANY)
    memory, arrived = bytearray(MANY), Future[Any]()
    link = a._links["b"]
    b._reactor.remove(b._links["a"])
    assert not link.send(frames.DATA, 1, b"\0\0\0\0\1", memory)
    link.keep_unsent()
    memory[:] = b"\1" * MANY
    a._reactor.flush_when_possible(link)
    b._reactor.add(b._links["a"], lambda came: _give(arrived, came), lambda _: None)
    assert arrived.result(LIMIT)[3] == bytes(MANY)


def _give(future: Future[Any], came: deque[Any]) -> None:
    while came:
        future.set_result(came.popleft())

"""The driver's end of a session, against servers that do not behave: fakes on the real wire."""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from k8s_servers import WORKER, write_token
from waiting import LIMIT

from lightvllm.backends.base import Placement
from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.backends.k8s.security import Token
from lightvllm.backends.k8s.session import WorkerSession
from lightvllm.errors import PlacementError, Shutdown, WorkerDied
from lightvllm.proto import worker_pb2 as pb
from lightvllm.version import __version__

TOKEN = Token.new()
Sessions = Callable[[Iterator[Any], Any], Iterator[Any]]


def accept(calls: Iterator[Any], context: Any) -> Iterator[Any]:
    """A well-behaved session that answers with the payload."""
    context.send_initial_metadata((wire.ACCEPTED,))
    for call in calls:
        yield pb.Reply(sequence_number=call.sequence_number, payload=call.payload)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts fake worker servers: ``serve(session, init_reply)`` gives the address."""
    with ExitStack() as stack:

        def start(session: Sessions = accept, reply: Any = None, status: str = "SERVING") -> str:
            server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))

            def encoded(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
                for answer in session(map(pb.Call.FromString, messages), context):
                    yield answer.SerializeToString()

            methods = {"InitWorker": lambda *_: reply or pb.InitWorkerReply(), "Session": encoded}
            server.add_generic_rpc_handlers((wire.handlers(methods),))
            checks = health.HealthServicer()
            checks.set(wire.SERVICE, health_pb2.HealthCheckResponse.ServingStatus.Value(status))
            health_pb2_grpc.add_HealthServicer_to_server(checks, server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(lambda: server.stop(None).wait(LIMIT))
            return f"127.0.0.1:{port}"

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[..., tuple[WorkerSession, queue.SimpleQueue[str]]]]:
    """Opens sessions: ``connect(address)`` gives one and the reasons for which it broke."""
    with ExitStack() as stack:

        def start(address: str, timeout: float = LIMIT) -> tuple[WorkerSession, queue.SimpleQueue[str]]:
            broken: queue.SimpleQueue[str] = queue.SimpleQueue()
            session = WorkerSession(address, address, TOKEN, None, max_message_bytes=1 << 20, on_break=broken.put)
            stack.callback(session.abort)
            session.open(time.monotonic() + timeout, lambda _: None)
            return session, broken

        yield start


def test_replies_come_to_their_calls_whatever_buffer_they_were_sent_in(serve: Any, connect: Any) -> None:
    session, _ = connect(serve())
    payloads = [b"a", bytearray(b"b"), memoryview(b"xcx")[1:2]]
    assert [session.call("echo", payload).result(LIMIT) for payload in payloads] == [b"a", b"b", b"c"]


def test_a_reply_to_another_call_breaks_the_session(serve: Any, connect: Any) -> None:
    def confused(calls: Iterator[Any], context: Any) -> Iterator[Any]:
        context.send_initial_metadata((wire.ACCEPTED,))
        for call in calls:
            yield pb.Reply(sequence_number=call.sequence_number + 1, payload=b"not yours")

    session, broken = connect(serve(confused))
    future = session.call("echo", b"")
    assert broken.get(timeout=LIMIT) == "it answered call 2, expected an answer to call 1"
    assert not future.done()  # whoever was told of the break fails it, with who the worker was
    session.fail(WorkerDied("it", "confused"))
    with pytest.raises(WorkerDied):
        future.result(LIMIT)


def test_replies_may_come_in_another_order_than_their_calls(serve: Any, connect: Any) -> None:
    def backwards(calls: Iterator[Any], context: Any) -> Iterator[Any]:
        context.send_initial_metadata((wire.ACCEPTED,))
        for first in calls:
            for call in (next(calls), first):
                yield pb.Reply(sequence_number=call.sequence_number, payload=call.payload)

    session, broken = connect(serve(backwards))
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for payload in (b"1", b"2", b"3", b"4"):
        session.send("echo", payload, told.put)
    assert [told.get(timeout=LIMIT) for _ in range(4)] == [b"2", b"1", b"4", b"3"]
    assert session.pending_method is None
    assert broken.empty()


def test_a_call_is_answered_once(serve: Any, connect: Any) -> None:
    def twice(calls: Iterator[Any], context: Any) -> Iterator[Any]:
        context.send_initial_metadata((wire.ACCEPTED,))
        call = [next(calls) for _ in range(3)][1]
        for _ in range(2):
            yield pb.Reply(sequence_number=call.sequence_number, payload=call.payload)

    session, broken = connect(serve(twice))
    futures = [session.call("echo", payload) for payload in (b"1", b"2", b"3")]
    assert broken.get(timeout=LIMIT) == "it answered call 2, expected an answer to call 1 or a later one that waits"
    assert [future.done() for future in futures] == [False, True, False]


def test_a_worker_that_closes_the_session_breaks_it(serve: Any, connect: Any) -> None:
    def curt(calls: Iterator[Any], context: Any) -> Iterator[Any]:
        context.send_initial_metadata((wire.ACCEPTED,))
        next(calls)
        yield from ()

    session, broken = connect(serve(curt))
    session.call("echo", b"")
    assert broken.get(timeout=LIMIT) == "it closed the session"
    assert session.ended.wait(LIMIT)


def test_closing_it_here_is_not_a_break(serve: Any, connect: Any) -> None:
    session, broken = connect(serve())
    session.close()
    assert session.ended.wait(LIMIT)
    assert broken.empty()
    with pytest.raises(Shutdown):
        session.call("echo", b"").result(LIMIT)


def test_one_that_was_aborted_opens_no_more(serve: Any) -> None:
    address = serve()
    session = WorkerSession(address, address, TOKEN, None, max_message_bytes=1 << 20, on_break=lambda _: None)
    session.abort()
    with pytest.raises(Shutdown):
        session.open(time.monotonic() + LIMIT, lambda _: None)
    with pytest.raises(Shutdown):
        session.init_worker(WORKER, {}, LIMIT)


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.001, 0.002, 0.004])
def test_an_abort_at_any_moment_ends_the_opening(serve: Any, seconds: float) -> None:

    def use(session: WorkerSession, aborting: threading.Thread) -> None:
        session.open(time.monotonic() + LIMIT, lambda _: None)
        session.init_worker(WORKER, {}, LIMIT)
        aborting.join(LIMIT)
        session.call("echo", b"").result(LIMIT)

    address = serve()
    for _ in range(20):
        session = WorkerSession(address, address, TOKEN, None, max_message_bytes=1 << 20, on_break=lambda _: None)
        timer = threading.Timer(seconds, session.abort)
        timer.start()
        with pytest.raises(Shutdown):
            use(session, timer)
        timer.join(LIMIT)


def test_the_first_reason_for_the_end_counts(serve: Any, connect: Any) -> None:
    session, _ = connect(serve())
    session.fail(WorkerDied("it", "killed"))
    session.fail(Shutdown("later"))
    with pytest.raises(WorkerDied):
        session.call("echo", b"").result(LIMIT)


def test_a_call_that_was_sent_cannot_be_cancelled(serve: Any, connect: Any) -> None:
    go = threading.Event()

    def slow(calls: Iterator[Any], context: Any) -> Iterator[Any]:
        context.send_initial_metadata((wire.ACCEPTED,))
        for call in calls:
            go.wait(LIMIT)
            yield pb.Reply(sequence_number=call.sequence_number)

    session, _ = connect(serve(slow))
    first, second = session.call("a", b""), session.call("b", b"")
    assert not first.cancel()
    assert session.pending_method == "a"
    go.set()
    assert (first.result(LIMIT), second.result(LIMIT)) == (b"", b"")
    assert session.pending_method is None


def test_a_server_that_is_not_serving_is_waited_for_and_named(serve: Any, connect: Any) -> None:
    address = serve(status="NOT_SERVING")
    with pytest.raises(PlacementError, match=f"{address}: is not serving"):
        connect(address, 0.5)


@pytest.mark.parametrize(("lightvllm", "python"), [("0.0.0", None), (__version__, "2.7.18"), (__version__, "3.99.1")])
def test_another_version_is_refused(serve: Any, tmp_path: Path, lightvllm: str, python: str | None) -> None:
    import platform

    reply = pb.InitWorkerReply(
        lightvllm_version=lightvllm, python_version=python or platform.python_version(), max_message_bytes=1 << 20
    )
    backend = KubernetesBackend((serve(accept, reply),), write_token(tmp_path))
    with pytest.raises(PlacementError, match=rf"runs lightvllm {lightvllm} on Python .*install the same on both"):
        backend.place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, LIMIT)
    backend.shutdown()

"""The worker server, met by a bare gRPC client: who is let in, in what order things happen, and how it ends."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from k8s_servers import TESTS, WORKER, session_stub
from waiting import LIMIT, wait_until

from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.security import Token
from lightvllm.errors import ConfigError, WorkerError
from lightvllm.messages import Deferred, decode_reply, encode_call
from lightvllm.proto import worker_pb2 as pb

TOKEN = Token.new()
MESSAGE_LIMIT = 1 << 20


@pytest.fixture
def server() -> Iterator[WorkerProcess]:
    process = WorkerProcess(
        "127.0.0.1:0", TOKEN, max_message_bytes=MESSAGE_LIMIT, env={**os.environ, "PYTHONPATH": TESTS, "SET": "before"}
    )
    yield process
    process.end(time.monotonic())


@pytest.fixture
def channel(server: WorkerProcess) -> Iterator[Any]:
    with wire.open_channel(server.wait_listening(LIMIT), None, 8 * MESSAGE_LIMIT) as channel:
        yield channel


def metadata(driver: str = "me", token: Token = TOKEN) -> tuple[tuple[str, str], ...]:
    return (*token.metadata(), (wire.DRIVER_KEY, driver))


class Session:
    """A Session stream with a queue in front."""

    def __init__(self, channel: Any, driver: str = "me") -> None:
        self.frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stream = session_stub(channel)(iter(self.frames.get, None), metadata=metadata(driver), timeout=LIMIT)
        self.stream.initial_metadata()

    def send(self, number: int, method: str, *args: Any) -> None:
        name, payload = encode_call(method, args, None)
        self.frames.put(pb.Call(sequence_number=number, method=name, payload=payload))

    def ask(self, number: int, method: str, *args: Any) -> Any:
        self.send(number, method, *args)
        reply = next(self.stream)
        assert reply.sequence_number == number
        return decode_reply(method, reply.payload)


def init_worker(channel: Any, driver: str = "me", worker_class: str = WORKER, **env: str) -> Any:
    request = pb.InitWorkerRequest(worker_class=worker_class, env=env)
    return wire.stub(channel, "InitWorker")(request, metadata=metadata(driver), timeout=LIMIT)


def health(channel: Any) -> Any:
    request = health_pb2.HealthCheckRequest(service=wire.SERVICE)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=LIMIT).status


def refused(code: Any, call: Any) -> str:
    """The details of the gRPC error that ``call()`` must end with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == code
    return str(caught.value.details())


# -------------------------------------------------------------------------------------------------- who is let in

METHODS = [f"/{wire.SERVICE}/{name}" for name in wire.METHODS]
NO_TOKEN = ((wire.DRIVER_KEY, "me"),)
WRONG_TOKEN = metadata(token=Token.new())
TWO_TOKENS = (*metadata(), *Token.new().metadata())


@pytest.mark.parametrize("method", [*METHODS, f"/{wire.SERVICE}/NoSuch", "/other.Service/Method"])
@pytest.mark.parametrize("bad", [NO_TOKEN, WRONG_TOKEN, TWO_TOKENS], ids=["none", "wrong", "two"])
def test_without_the_token_nothing_is_answered(channel: Any, method: str, bad: Any) -> None:
    unary = channel.unary_unary(method)
    stream = channel.stream_stream(method)
    code = grpc.StatusCode.UNAUTHENTICATED
    assert refused(code, lambda: unary(b"\xff", metadata=bad, timeout=LIMIT)) == "the token is missing or wrong"
    assert refused(code, lambda: next(stream(iter([b"\xff"]), metadata=bad, timeout=LIMIT)))
    Session(channel).stream.cancel()  # the worker was not taken by any of this


def test_without_the_token_no_message_is_read(channel: Any) -> None:
    """One above the size limit would be answered by RESOURCE_EXHAUSTED if it were."""
    huge = bytes(2 * MESSAGE_LIMIT)
    for method in METHODS:
        call = channel.unary_unary(method)
        assert refused(grpc.StatusCode.UNAUTHENTICATED, lambda call=call: call(huge, metadata=NO_TOKEN, timeout=LIMIT))


def test_without_the_token_nothing_is_executed(channel: Any, tmp_path: Path) -> None:
    flag = tmp_path / "executed"
    method, payload = encode_call("touch_and_hang", (str(flag), 0.0), None)
    session = Session(channel)
    init_worker(channel)
    intruder = session_stub(channel)(
        iter([pb.Call(sequence_number=1, method=method, payload=payload)]), metadata=WRONG_TOKEN, timeout=LIMIT
    )
    assert refused(grpc.StatusCode.UNAUTHENTICATED, lambda: next(intruder))
    assert session.ask(1, "echo", 1) == 1
    assert not flag.exists()


def test_with_the_token_a_method_that_is_not_there_is_unimplemented(channel: Any) -> None:
    call = channel.unary_unary(f"/{wire.SERVICE}/NoSuch")
    refused(grpc.StatusCode.UNIMPLEMENTED, lambda: call(b"", metadata=metadata(), timeout=LIMIT))


def test_health_needs_no_token(channel: Any) -> None:
    assert health(channel) == health_pb2.HealthCheckResponse.SERVING
    session = Session(channel)
    assert health(channel) == health_pb2.HealthCheckResponse.SERVING
    assert session.stream.is_active()


@pytest.mark.parametrize(("name", "code"), [("Check", grpc.StatusCode.OK), ("Watch", grpc.StatusCode.UNAUTHENTICATED)])
def test_strangers_who_never_send_their_request_keep_nobody_out(channel: Any, name: str, code: Any) -> None:
    """Each would hold one of the server's threads if it waited for the request."""
    silence: queue.SimpleQueue[Any] = queue.SimpleQueue()
    method = channel.stream_stream(f"/grpc.health.v1.Health/{name}")
    calls = [method(iter(silence.get, None), timeout=10.0) for _ in range(20)]
    for call in calls:
        with contextlib.suppress(grpc.RpcError):
            list(call)
        assert call.code() == code
    for _ in calls:
        silence.put(None)
    session = Session(channel)
    init_worker(channel)
    assert session.ask(1, "echo", 1) == 1


def test_the_request_of_a_strangers_health_check_is_not_read(channel: Any) -> None:
    """One above the size limit would be answered by RESOURCE_EXHAUSTED if it were; one below it would be taken in."""
    call = channel.unary_unary("/grpc.health.v1.Health/Check", None, health_pb2.HealthCheckResponse.FromString)
    assert call(bytes(2 * MESSAGE_LIMIT), timeout=LIMIT).status == health_pb2.HealthCheckResponse.SERVING


# ------------------------------------------------------------------------------------------- one driver, one worker


def test_a_second_driver_is_refused_and_disturbs_nothing(channel: Any) -> None:
    session = Session(channel, "first")
    init_worker(channel, "first")
    details = refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: next(Session(channel, "second").stream))
    assert details == "it is serving another driver; a worker serves one at a time"
    refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: init_worker(channel, "second"))
    assert session.ask(1, "echo", "still here") == "still here"


def test_init_worker_belongs_to_a_session_and_comes_once(channel: Any) -> None:
    details = refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: init_worker(channel))
    assert details == "InitWorker is called once, by the driver that has a session"
    session = Session(channel)
    init_worker(channel)
    refused(grpc.StatusCode.FAILED_PRECONDITION, lambda: init_worker(channel))
    assert session.ask(1, "echo", 1) == 1


def test_a_session_needs_a_drivers_name(channel: Any) -> None:
    stream = session_stub(channel)(iter([]), metadata=TOKEN.metadata(), timeout=LIMIT)
    assert wire.DRIVER_KEY in refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: next(stream))


def test_init_worker_sets_the_environment_and_tells_who_it_is(server: WorkerProcess, channel: Any) -> None:
    session = Session(channel)
    reply = init_worker(channel, SET="after", NEW="new", CUDA_VISIBLE_DEVICES="3,5")
    assert (reply.failure, reply.pid, reply.max_message_bytes) == (b"", server.pid, MESSAGE_LIMIT)
    assert list(reply.device_ids) == ["3", "5"]
    assert session.ask(1, "getenv", "SET") == "before"
    assert session.ask(2, "getenv", "NEW") == "new"


def test_torch_is_left_to_the_worker_class(channel: Any) -> None:
    session = Session(channel)
    init_worker(channel)
    name, payload = encode_call(lambda worker: "torch" in __import__("sys").modules, (), None)
    session.frames.put(pb.Call(sequence_number=1, method=name, payload=payload))
    assert decode_reply(name, next(session.stream).payload) is False


def test_everything_happens_in_one_thread(channel: Any) -> None:
    session = Session(channel)
    init_worker(channel, worker_class="k8s_threads:Threads")
    threads = [session.ask(number, "thread") for number in (1, 2, 3)]
    assert len(set(threads)) == 1
    assert session.ask(4, "constructed_in") == threads[0]


def test_a_class_that_cannot_be_constructed_is_the_drivers_to_know(channel: Any) -> None:
    session = Session(channel)
    reply = init_worker(channel, worker_class="contract_worker:FailsToStart")
    with pytest.raises(WorkerError, match="RuntimeError: no such device"):
        decode_reply("__init__", reply.failure)
    with pytest.raises(WorkerError, match="no such device"):
        session.ask(1, "echo", 1)


# ------------------------------------------------------------------------------------------------------------ frames


def test_calls_sent_before_the_worker_exists_wait_and_keep_their_order(channel: Any) -> None:
    session = Session(channel)
    for number in range(1, 51):
        session.send(number, "append", number)
    init_worker(channel)
    replies = [next(session.stream) for _ in range(50)]
    assert [reply.sequence_number for reply in replies] == list(range(1, 51))
    assert [decode_reply("append", reply.payload) for reply in replies] == list(range(1, 51))
    assert session.ask(51, "read_log") == (list(range(1, 51)), 0)


def test_a_reply_that_is_too_large_is_an_error_and_the_session_goes_on(channel: Any) -> None:
    session = Session(channel)
    init_worker(channel)
    name, payload = encode_call(lambda worker: bytes(2 * MESSAGE_LIMIT), (), None)
    session.frames.put(pb.Call(sequence_number=1, method=name, payload=payload))
    with pytest.raises(ConfigError, match=rf"the reply of <callable> is \d+ bytes, more than .*={MESSAGE_LIMIT}"):
        decode_reply(name, next(session.stream).payload)
    assert session.ask(2, "echo", 1) == 1


def test_a_late_reply_that_is_too_large_is_an_error_too(channel: Any) -> None:
    session = Session(channel)
    init_worker(channel)
    name, payload = encode_call(lambda worker: Deferred(lambda: bytes(2 * MESSAGE_LIMIT)), (), None)
    session.frames.put(pb.Call(sequence_number=1, method=name, payload=payload))
    with pytest.raises(ConfigError, match=rf"the reply of <callable> is \d+ bytes, more than .*={MESSAGE_LIMIT}"):
        decode_reply(name, next(session.stream).payload)
    assert session.ask(2, "echo", 1) == 1


# --------------------------------------------------------------------------------------------------------------- end


def test_it_ends_in_order_when_the_session_is_closed(server: WorkerProcess, channel: Any, tmp_path: Path) -> None:
    session = Session(channel)
    init_worker(channel, worker_class="k8s_threads:Threads")
    session.ask(1, "touch_at_exit", str(tmp_path / "flag"))
    session.frames.put(None)
    assert server.exited.wait(LIMIT)
    assert server.reason() == "exited with code 0"
    assert (tmp_path / "flag").exists()


def test_late_replies_come_before_the_end(server: WorkerProcess, channel: Any, tmp_path: Path) -> None:
    session = Session(channel)
    init_worker(channel)
    session.send(1, "later", str(tmp_path / "go"), "late", "late")
    session.send(2, "later_boom", "too late")
    assert session.ask(3, "echo", "soon") == "soon"
    session.frames.put(None)
    (tmp_path / "go").touch()
    first, second = session.stream
    assert (first.sequence_number, decode_reply("later", first.payload)) == (1, "late")
    assert second.sequence_number == 2
    with pytest.raises(WorkerError, match="too late"):
        decode_reply("later_boom", second.payload)
    assert session.stream.code() == grpc.StatusCode.OK
    assert server.exited.wait(LIMIT)
    assert server.reason() == "exited with code 0"


def test_it_ends_at_once_when_its_driver_goes_though_a_late_reply_is_not_there(
    server: WorkerProcess, channel: Any, tmp_path: Path
) -> None:
    session = Session(channel)
    init_worker(channel)
    session.send(1, "later", str(tmp_path / "go"), "late")
    assert session.ask(2, "echo", 1) == 1
    session.frames.put(None)
    session.stream.cancel()
    assert server.exited.wait(5.0)  # it would have waited for 60 s


def test_it_ends_at_once_when_its_driver_goes_though_the_though_the_worker_is_stuck(
    server: WorkerProcess, channel: Any, tmp_path: Path
) -> None:
    session = Session(channel)
    init_worker(channel)
    session.send(1, "touch_and_hang", str(tmp_path / "flag"))
    wait_until((tmp_path / "flag").exists, "the call to begin")
    session.stream.cancel()
    assert server.exited.wait(5.0)  # the call would have taken 60 s


@pytest.mark.parametrize(("code", "status"), [(3, 3), (None, 0), ("a last word", 1)])
def test_it_exits_as_its_worker_asks(server: WorkerProcess, channel: Any, code: Any, status: int) -> None:
    session = Session(channel)
    init_worker(channel)
    session.send(1, "exit_yourself", code)
    assert server.exited.wait(LIMIT)
    expected = f"exited with code {status}"
    assert server.reason() == (f"{expected}: {code}" if isinstance(code, str) else expected)

"""The direct carrier of the Kubernetes backend: which one is taken, what the server demands, what Ctrl-C does to it."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from k8s_servers import WORKER, WorkerCommand, session_stub, worker_command, write_token
from waiting import LIMIT, wait_until

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import grpc

from lightvllm.backends.base import Placement, WorkerRef
from lightvllm.backends.k8s import session as session_module
from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.backends.k8s.process import MAX_MESSAGE_BYTES, WorkerProcess
from lightvllm.backends.k8s.security import Token
from lightvllm.config import ParallelConfig
from lightvllm.errors import ConfigError, PlacementError, WorkerDied
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.messages import decode_reply, encode_call
from lightvllm.proto import worker_pb2 as pb
from lightvllm.transfer import frames
from lightvllm.transfer.link import connect

TWO = Placement(world_size=2, worker_class=WORKER)


def ignore(worker: WorkerRef, died: WorkerDied) -> None:
    """Some tests let workers die."""


@pytest.fixture
def started() -> Iterator[Any]:
    with ExitStack() as stack:

        def start(**options: Any) -> KubernetesBackend:
            backend = KubernetesBackend(**options)
            stack.callback(backend.shutdown, 0.5)
            return backend

        yield start


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[tuple[str, list[WorkerCommand]]]:
    token_file = write_token(tmp_path)
    options = ("--listen", "127.0.0.1:0", "--token-file", token_file)
    with worker_command(*options) as first, worker_command(*options) as second:
        yield token_file, [first, second]


@pytest.mark.parametrize(("transport", "carrier"), [("auto", "direct"), ("direct", "direct"), ("grpc", "grpc")])
def test_it_is_taken_unless_grpc_is_asked_for(started: Any, transport: str, carrier: str) -> None:
    backend, said = started(transport=transport), []
    backend.place(TWO, ignore, LIMIT, said.append)
    assert set(backend.carriers.values()) == {carrier}
    assert said[-1] == f"calls go by {carrier}"


def test_it_goes_to_servers_over_tcp_too(started: Any, commands: tuple[str, list[WorkerCommand]]) -> None:
    token_file, servers = commands
    backend = started(workers=tuple(server.address() for server in servers), token_file=token_file)
    refs = backend.place(TWO, ignore, LIMIT)
    assert set(backend.carriers.values()) == {"direct"}
    method, payload = encode_call("echo", (b"x" * 300_000,), None)
    assert decode_reply(method, backend.call(refs[1], method, payload).result(LIMIT)) == b"x" * 300_000


def test_where_it_cannot_be_opened_auto_does_without_and_says_why(
    started: Any, commands: tuple[str, list[WorkerCommand]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocked(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(session_module.link, "connect", blocked)
    token_file, servers = commands
    addresses = tuple(server.address() for server in servers)
    with pytest.raises(PlacementError, match="no direct connection: timed out"):
        started(workers=addresses, token_file=token_file, transport="direct").place(TWO, ignore, LIMIT)
    backend, said = started(workers=addresses, token_file=token_file), []
    refs = backend.place(TWO, ignore, LIMIT, said.append)
    assert set(backend.carriers.values()) == {"grpc"}
    assert said[-1].startswith("calls go by grpc (no direct connection to 127.0.0.1:")
    method, payload = encode_call("echo", (1,), None)
    assert decode_reply(method, backend.call(refs[0], method, payload).result(LIMIT)) == 1


def test_an_unknown_carrier_is_refused() -> None:
    with pytest.raises(ConfigError, match="transport='tcp' is unknown; use one of auto, grpc, direct"):
        KubernetesBackend(transport="tcp")  # type: ignore[arg-type]


def test_no_socket_is_left(started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    started().place(TWO, ignore, LIMIT)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_waiting_loses_no_reply(tmp_path: Path) -> None:
    executor = DistributedExecutor(KubernetesBackend(), TWO, ParallelConfig(tensor_parallel_size=2))
    try:
        future = executor.collective_rpc("wait_for_file", args=(str(tmp_path / "go"),), non_block=True)
        reactor = executor.backend._reactor  # type: ignore[attr-defined]
        me = threading.get_ident()

        def interrupt() -> None:
            wait_until(lambda: reactor._reader == me, "the main thread to wait")
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            future.result()
        thread.join(LIMIT)
        (tmp_path / "go").touch()
        assert future.result() == ["gone on", "gone on"]
        assert executor.collective_rpc("echo", args=(1,)) == [1, 1]
    finally:
        executor.shutdown()


# --------------------------------------------------------------------------------------------- the server's side

TOKEN = Token.new()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WorkerProcess]:
    process = WorkerProcess(
        f"unix:{tmp_path}/s", TOKEN, max_message_bytes=MAX_MESSAGE_BYTES, env=os.environ, capture=False
    )
    process.wait_listening(LIMIT)
    yield process
    process.kill()
    process.exited.wait(LIMIT)


@pytest.fixture
def channel(server: WorkerProcess, tmp_path: Path) -> Iterator[Any]:
    with wire.open_channel(f"unix:{tmp_path}/s", None, MAX_MESSAGE_BYTES) as channel:
        yield channel


def metadata(driver: str) -> tuple[tuple[str, str], ...]:
    return (*TOKEN.metadata(), (wire.DRIVER_KEY, driver))


def ask(channel: Any, name: str, request: Any, driver: str = "me") -> Any:
    return wire.stub(channel, name)(request, metadata=metadata(driver), timeout=LIMIT)


def refused(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


DIRECT = pb.InitWorkerRequest(worker_class=WORKER, carrier=pb.DIRECT)


@pytest.fixture
def session(channel: Any) -> Iterator[Any]:
    """A session that has been accepted."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stream = session_stub(channel)(iter(messages.get, None), metadata=metadata("me"))
    assert wire.ACCEPTED in stream.initial_metadata()
    yield stream
    messages.put(None)


def test_without_a_session_there_is_no_direct_connection(channel: Any) -> None:
    assert "by the driver that has a session" in refused(lambda: ask(channel, "OpenDirect", pb.OpenDirectRequest()))


def test_it_belongs_to_the_driver_that_has_the_session(channel: Any, session: Any) -> None:
    refused(lambda: ask(channel, "OpenDirect", pb.OpenDirectRequest(), "somebody else"))
    assert ask(channel, "OpenDirect", pb.OpenDirectRequest()).address.startswith("unix:")


def test_it_is_opened_before_the_worker_is_initialised(channel: Any, session: Any) -> None:
    assert "call OpenDirect and connect first" in refused(lambda: ask(channel, "InitWorker", DIRECT))
    ask(channel, "InitWorker", pb.InitWorkerRequest(worker_class=WORKER))
    assert "before InitWorker" in refused(lambda: ask(channel, "OpenDirect", pb.OpenDirectRequest()))


def test_asked_again_it_makes_another_ticket(channel: Any, session: Any) -> None:
    first = ask(channel, "OpenDirect", pb.OpenDirectRequest())
    second = ask(channel, "OpenDirect", pb.OpenDirectRequest())
    assert first.ticket != second.ticket
    with pytest.raises(OSError):
        connect(first.address, first.ticket, 1 << 20, 2.0)
    link = connect(second.address, second.ticket, 1 << 20, LIMIT)
    ask(channel, "InitWorker", DIRECT)
    method, payload = encode_call("echo", (7,), None)
    link.write(frames.CALL, 1, method.encode(), payload, LIMIT)
    kind, number, _, reply = link.read(LIMIT)
    assert (kind, number, decode_reply(method, reply)) == (frames.REPLY, 1, 7)
    link.close()


def test_a_driver_that_does_not_want_it_after_all_closes_it(channel: Any, session: Any, tmp_path: Path) -> None:
    opened = ask(channel, "OpenDirect", pb.OpenDirectRequest())
    ask(channel, "InitWorker", pb.InitWorkerRequest(worker_class=WORKER))
    with pytest.raises(OSError):
        connect(opened.address, opened.ticket, 1 << 20, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_late_replies_come_before_the_end(server: WorkerProcess, channel: Any, session: Any, tmp_path: Path) -> None:
    opened = ask(channel, "OpenDirect", pb.OpenDirectRequest())
    link = connect(opened.address, opened.ticket, 1 << 20, LIMIT)
    ask(channel, "InitWorker", DIRECT)
    go = tmp_path.parent / f"{tmp_path.name}-go"
    for number, (method, *args) in enumerate((("later", str(go), "late", "late"), ("echo", "soon")), 1):
        link.write(frames.CALL, number, method.encode(), encode_call(method, args, None)[1], LIMIT)
    link.write(frames.CLOSE, 0, b"", b"", LIMIT)
    kind, number, _, reply = link.read(LIMIT)
    assert (kind, number, decode_reply("echo", reply)) == (frames.REPLY, 2, "soon")
    go.touch()
    kind, number, _, reply = link.read(LIMIT)
    assert (kind, number, decode_reply("later", reply)) == (frames.REPLY, 1, "late")
    assert server.exited.wait(LIMIT)
    assert server.reason() == "exited with code 0"
    link.close()
    go.unlink()


@pytest.mark.parametrize("end", ["close frame", "closed", "garbage"])
def test_the_worker_ends_with_its_direct_connection(
    server: WorkerProcess, channel: Any, session: Any, tmp_path: Path, end: str
) -> None:
    opened = ask(channel, "OpenDirect", pb.OpenDirectRequest())
    link = connect(opened.address, opened.ticket, 1 << 20, LIMIT)
    ask(channel, "InitWorker", DIRECT)
    if end == "close frame":
        link.write(frames.CLOSE, 0, b"", b"", LIMIT)
    elif end == "garbage":
        link.write(frames.DATA, 1, b"", b"", LIMIT)
    else:
        link.close()
    assert server.exited.wait(LIMIT)
    assert server.reason() == "exited with code 0"
    link.close()
    assert not tmp_path.exists()  # as the last of its sockets it took the directory along

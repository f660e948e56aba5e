"""The plain calls, for clients that are no driver of ours: LoadModel, ExecuteModel(Stream), CollectiveRpc."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from k8s_servers import session_stub
from waiting import LIMIT, wait_until

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import grpc

from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.process import MAX_MESSAGE_BYTES, WorkerProcess
from lightvllm.backends.k8s.security import Token
from lightvllm.errors import ConfigError, WorkerError
from lightvllm.messages import StepInput, decode_reply, encode_call
from lightvllm.proto import worker_pb2 as pb

TOKEN = Token.new()
WORKER = "contract_worker:StageWorker"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WorkerProcess]:
    process = WorkerProcess(
        f"unix:{tmp_path}/s", TOKEN, max_message_bytes=MAX_MESSAGE_BYTES, env=os.environ, capture=False
    )
    process.wait_listening(LIMIT)
    yield process
    process.kill()
    process.exited.wait(LIMIT)


class Client:
    """A client with a session and an initialised worker."""

    def __init__(self, channel: Any, carrier: Any = pb.UNARY) -> None:
        self.channel = channel
        self.messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stream = session_stub(channel)(iter(self.messages.get, None), metadata=metadata())
        assert wire.ACCEPTED in self.stream.initial_metadata()
        self.ask("InitWorker", pb.InitWorkerRequest(worker_class=WORKER, carrier=carrier))

    def ask(self, name: str, request: Any, driver: str = "me") -> Any:
        return wire.stub(self.channel, name)(request, metadata=metadata(driver), timeout=LIMIT)

    def rpc(self, method: Any, *args: Any) -> Any:
        name, payload = encode_call(method, args, None)
        return decode_reply(
            name, self.ask("CollectiveRpc", pb.CollectiveRpcRequest(method=name, payload=payload)).payload
        )


def metadata(driver: str = "me") -> tuple[tuple[str, str], ...]:
    return (*TOKEN.metadata(), (wire.DRIVER_KEY, driver))


def step(number: int) -> bytes:
    return encode_call("execute_model", (StepInput(step=number),), None)[1]


@pytest.fixture
def channel(server: WorkerProcess, tmp_path: Path) -> Iterator[Any]:
    with wire.open_channel(f"unix:{tmp_path}/s", None, MAX_MESSAGE_BYTES) as channel:
        yield channel


@pytest.fixture
def client(channel: Any) -> Iterator[Client]:
    made = Client(channel)
    yield made
    made.messages.put(None)


def refused(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


def test_collective_rpc_calls_any_method(client: Client) -> None:
    assert client.rpc("echo", {"a": b"x" * 2_000_000}) == {"a": b"x" * 2_000_000}
    assert client.rpc(lambda worker: type(worker).__name__) == "StageWorker"
    with pytest.raises(WorkerError, match="ValueError: no good"):
        client.rpc("boom", "no good")


def test_calls_from_many_threads_run_one_at_a_time(client: Client) -> None:
    with ThreadPoolExecutor(6) as threads:
        lengths = sorted(threads.map(lambda i: client.rpc("append", i), range(60)))
    assert lengths == list(range(1, 61))
    assert client.rpc("read_log")[1] == 0


def test_everything_happens_in_one_thread(client: Client) -> None:
    assert len({client.rpc(lambda _: threading.get_ident()) for _ in range(5)}) == 1


def test_what_a_method_puts_off_is_finished_at_once(client: Client, tmp_path: Path) -> None:
    assert client.rpc("later_thread") is True
    with pytest.raises(WorkerError, match="ValueError: too late"):
        client.rpc("later_boom", "too late")
    with pytest.raises(grpc.RpcError):
        client.rpc("later_exit", str(tmp_path), 0)  # of a folder that is there


def test_load_model_loads_the_model(client: Client) -> None:
    reply = client.ask("LoadModel", pb.LoadModelRequest())
    assert decode_reply("load_model", reply.payload).parameter_bytes == 7


def test_execute_model_is_one_step(client: Client) -> None:
    reply = client.ask("ExecuteModel", pb.ExecuteModelRequest(scheduler_output=step(5)))
    assert decode_reply("execute_model", reply.model_output).token_ids == [5]
    assert not reply.intermediate_tensors


def test_a_grammar_makes_it_sample(client: Client) -> None:
    grammar = encode_call("sample_tokens", ("a grammar",), None)[1]
    request = pb.ExecuteModelRequest(scheduler_output=step(5), grammar_output=grammar)
    assert decode_reply("sample_tokens", client.ask("ExecuteModel", request).model_output) == ("sampled", "a grammar")


def test_with_tensors_it_is_one_stages_step(client: Client) -> None:
    given = pb.IntermediateTensor(name="hidden_states", data=b"\x01\x02", shape=[2], dtype="int8")
    reply = client.ask("ExecuteModel", pb.ExecuteModelRequest(scheduler_output=step(5), intermediate_tensors=[given]))
    assert decode_reply("execute_model", reply.model_output).token_ids == [5]
    (tensor,) = reply.intermediate_tensors
    assert (tensor.data, list(tensor.shape), tensor.dtype) == (b"\x02\x04", [2], "int8")


def test_large_tensors_come_in_pieces(client: Client) -> None:
    size = 3 * wire.PIECE_BYTES
    request = pb.ExecuteModelRequest(scheduler_output=step(size))
    pieces = list(wire.stub(client.channel, "ExecuteModelStream")(request, metadata=metadata(), timeout=LIMIT))
    assert [piece.offset for piece in pieces] == [0, wire.PIECE_BYTES, 2 * wire.PIECE_BYTES]
    assert b"".join(piece.data for piece in pieces) == bytes(2 * i % 256 for i in range(256)) * (size // 256)
    assert {(tuple(piece.shape), piece.dtype) for piece in pieces} == {((size,), "uint8")}


def test_a_stage_that_fails_says_so_in_both_ways(client: Client) -> None:
    given = pb.IntermediateTensor(name="hidden_states", data=b"\x01", shape=[1], dtype="int8")
    reply = client.ask("ExecuteModel", pb.ExecuteModelRequest(scheduler_output=step(-1), intermediate_tensors=[given]))
    with pytest.raises(WorkerError, match="no such step"):
        decode_reply("execute_model", reply.model_output)
    stream = wire.stub(client.channel, "ExecuteModelStream")(
        pb.ExecuteModelRequest(scheduler_output=step(-1)), metadata=metadata(), timeout=LIMIT
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    failure = dict(caught.value.trailing_metadata())[wire.FAILURE_KEY]
    with pytest.raises(WorkerError, match="no such step"):
        decode_reply("execute_stage", failure)


def test_a_step_that_cannot_be_read_is_an_error(client: Client) -> None:
    given = pb.IntermediateTensor(name="hidden_states", data=b"\x01", shape=[1], dtype="int8")
    for payload in (b"t\xff\xff", b"", b"p"):
        request = pb.ExecuteModelRequest(scheduler_output=payload, intermediate_tensors=[given])
        with pytest.raises(ConfigError, match="the arguments of execute_model"):
            decode_reply("execute_model", client.ask("ExecuteModel", request).model_output)


@pytest.mark.parametrize("carrier", [pb.STREAM, pb.DIRECT])
def test_they_are_for_a_session_that_has_chosen_them(channel: Any, carrier: Any) -> None:
    request = pb.CollectiveRpcRequest(method="echo", payload=encode_call("echo", (1,), None)[1])

    def ask() -> Any:
        return wire.stub(channel, "CollectiveRpc")(request, metadata=metadata(), timeout=LIMIT)

    assert "after an InitWorker with the carrier UNARY" in refused(ask)
    if carrier == pb.STREAM:
        client = Client(channel, carrier)
        refused(ask)
        client.messages.put(None)


def test_another_driver_is_refused(client: Client) -> None:
    name, payload = encode_call("echo", (1,), None)
    refused(lambda: client.ask("CollectiveRpc", pb.CollectiveRpcRequest(method=name, payload=payload), "another"))
    refused(lambda: client.ask("LoadModel", pb.LoadModelRequest(), "another"))
    refused(lambda: client.ask("ExecuteModel", pb.ExecuteModelRequest(scheduler_output=step(1)), "another"))


def test_the_worker_ends_with_the_session(client: Client, server: WorkerProcess) -> None:
    assert client.rpc("echo", 1) == 1
    client.messages.put(None)
    assert server.exited.wait(LIMIT)
    assert server.reason() == "exited with code 0"
    wait_until(lambda: not Path(f"/proc/{server.pid}").exists(), "the process to be gone")

"""The listener for hidden states: who may push, and what becomes of those who send what they should not."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import grpc
from stage_channels import CREDENTIALS
from waiting import wait_until

from lightvllm.config import ParallelConfig
from lightvllm.errors import AuthError, ConfigError, LightvllmError
from lightvllm.messages import StageCredentials
from lightvllm.proto import worker_pb2 as pb
from lightvllm.transfer.credentials import make_credentials
from lightvllm.transfer.push import _METHOD, PushInlet, PushOutlet, channel_name
from lightvllm.transfer.stage import Header

CHANNEL = channel_name(1, 1)
LIMIT = 4096


@pytest.fixture
def inlet() -> Iterator[PushInlet]:
    made = PushInlet("127.0.0.1", CREDENTIALS, CHANNEL, 0, 2, LIMIT)
    yield made
    made.close()


def outlet(address: str, credentials: StageCredentials = CREDENTIALS, **options: Any) -> PushOutlet:
    return PushOutlet(address, credentials, CHANNEL, 1, 2, **({"timeout": 20.0} | options))


def push(address: str, messages: Any, metadata: Any = (("authorization", f"Bearer {CREDENTIALS.token}"),)) -> Any:
    """The call's status after pushing ``messages``, by a client that keeps none of the rules."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_unary(_METHOD)
        try:
            call(iter(messages), metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def piece(sequence: int = 1, channel: str = CHANNEL, last: bool = True, **fields: Any) -> Any:
    tensor = pb.IntermediateTensor(
        **({"name": "hidden_states", "dtype": "int8", "shape": [4], "data": b"abcd"} | fields)
    )
    return pb.TensorBatch(channel=channel, sequence_number=sequence, tensors=[tensor], last=last)


def test_pieces_are_put_together(inlet: PushInlet) -> None:
    sender = outlet(inlet.address, piece_bytes=1000)
    x = torch.arange(900, dtype=torch.float32)
    sender.put(Header(0, 1, 5, "float32", (30, 30)), x.reshape(30, 30), time.monotonic() + 5)
    sender.put(Header(3, 2, -2, "float32", (0, 3)), torch.empty(0, 3), time.monotonic() + 5)
    one, two = (inlet.take(time.monotonic() + 10) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.header == Header(0, 1, 5, "float32", (30, 30))
    assert torch.equal(one.tensor.flatten(), x)  # type: ignore[union-attr]
    assert two.header == Header(3, 2, -2, "float32", (0, 3))
    sender.close()


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", CREDENTIALS.token),),
        (("authorization", f"Bearer {CREDENTIALS.token}"), ("authorization", f"Bearer {CREDENTIALS.token}")),
    ],
)
def test_without_the_token_no_message_is_read(inlet: PushInlet, metadata: Any) -> None:
    def never() -> Iterator[bytes]:
        yield b"\xff not even a message"

    assert push(inlet.address, never(), metadata) == grpc.StatusCode.UNAUTHENTICATED
    sender = outlet(inlet.address)  # the place is still free
    sender.put(Header(0, 1, 1), None, time.monotonic() + 5)
    assert inlet.take(time.monotonic() + 10) is not None
    sender.close()


def test_a_wrong_token_is_an_auth_error_that_does_not_show_it(inlet: PushInlet) -> None:
    with pytest.raises(AuthError, match=r"rank 1 at .* refused the stage transport: the token is missing") as caught:
        outlet(inlet.address, msgspec.structs.replace(CREDENTIALS, token="some other secret"))
    assert "secret" not in str(caught.value)
    assert CREDENTIALS.token not in str(caught.value)


def test_only_one_may_push(inlet: PushInlet) -> None:
    sender = outlet(inlet.address)
    with pytest.raises(LightvllmError, match="the previous stage has connected before"):
        outlet(inlet.address)
    sender.put(Header(0, 1, 1), None, time.monotonic() + 5)
    assert inlet.take(time.monotonic() + 10) is not None
    sender.close()


def test_nothing_else_is_served(inlet: PushInlet) -> None:
    with grpc.insecure_channel(inlet.address) as channel:
        for method in ("/lightvllm.worker.v1.LLMWorker/InitWorker", "/grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(
                    b"", metadata=(("authorization", f"Bearer {CREDENTIALS.token}"),), timeout=9
                )
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([piece(channel="rank-7-to-rank-8")], "for channel 'rank-7-to-rank-8'; expected 'rank-0-to-rank-1'"),
        ([piece(2)], "batch 2 came; expected batch 1"),
        ([piece(), piece()], "batch 1 came; expected batch 2"),
        ([piece(dtype="object")], "dtype 'object'"),
        ([piece(shape=[-4])], "none negative"),
        ([piece(shape=[5000])], "a tensor of 5000 bytes came .*expected at most 4096"),
        ([piece(shape=[2**62, 2**62])], "expected at most 4096"),
        ([piece(data=b"abc")], "ends after 3 bytes; expected 4"),
        ([piece(data=b"abcde")], "bytes 0 to 5 of batch 1 came; expected them from 0 on and up to 4"),
        ([piece(offset=1)], "bytes 1 to 5"),
        ([piece(last=False, data=b"ab"), piece(offset=3, data=b"d")], "bytes 3 to 4"),
        (
            [piece(last=False, data=b"ab"), piece(2, data=b"cd", offset=2)],
            "a piece of batch 2 came; expected the next of 1",
        ),
        ([pb.TensorBatch(channel=CHANNEL, sequence_number=1, tensors=[piece().tensors[0]] * 2)], "2 tensors came"),
    ],
)
def test_what_breaks_the_rules_ends_the_channel(inlet: PushInlet, messages: Any, reason: str) -> None:
    encoded = [message.SerializeToString() for message in messages]
    assert push(inlet.address, encoded) == grpc.StatusCode.INVALID_ARGUMENT

    def drain() -> None:
        while inlet.take(time.monotonic() + 10) is not None:
            pass

    with pytest.raises(LightvllmError, match=reason):
        drain()


def test_bytes_that_are_no_message_end_the_channel(inlet: PushInlet) -> None:
    assert push(inlet.address, [b"\xff" * 100]) == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(LightvllmError, match="no TensorBatch came"):
        inlet.take(time.monotonic() + 10)


def test_a_message_beyond_the_limit_ends_the_channel(inlet: PushInlet) -> None:
    assert push(inlet.address, [bytes(3 << 20)]) == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(LightvllmError, match="the connection broke"):
        inlet.take(time.monotonic() + 10)


def test_a_receiver_that_does_not_listen_is_a_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(LightvllmError, match=rf"rank 1 at {address} could not be reached .* within 0.5 s"):
            outlet(address, timeout=0.5)


# ------------------------------------------------------------------------------------------- between hosts


@pytest.fixture
def certified() -> list[StageCredentials]:
    made = make_credentials(ParallelConfig(pipeline_parallel_size=3, pp_transport="grpc"), local=False)
    return [one for one in made if one is not None]


def test_mutual_tls_with_the_groups_own_ca(certified: list[StageCredentials]) -> None:
    """Two ranks of another host's address: certificates name ranks, so any address will do."""
    inlet = PushInlet("127.0.0.1", certified[1], CHANNEL, 0, 2, LIMIT)
    try:
        sender = outlet(inlet.address, certified[0])
        sender.put(Header(0, 1, 1, "int8", (2,)), torch.tensor([1, 2], dtype=torch.int8), time.monotonic() + 5)
        batch = inlet.take(time.monotonic() + 10)
        assert batch is not None
        assert batch.tensor is not None
        assert batch.tensor.tolist() == [1, 2]
        sender.close()
    finally:
        inlet.close()


def test_a_rank_that_is_not_the_previous_one_is_refused(certified: list[StageCredentials]) -> None:
    inlet = PushInlet("127.0.0.1", certified[1], CHANNEL, 0, 2, LIMIT)
    try:
        with pytest.raises(AuthError, match="only rank-0 may connect"):
            outlet(inlet.address, certified[2])
        outlet(inlet.address, certified[0]).close()
    finally:
        inlet.close()


def test_another_groups_ca_another_rank_or_no_certificate_is_refused(certified: list[StageCredentials]) -> None:
    stranger = make_credentials(ParallelConfig(pipeline_parallel_size=2, pp_transport="grpc"), local=False)[0]
    assert stranger is not None
    stolen = msgspec.structs.replace(stranger, token=certified[0].token)
    inlet = PushInlet("127.0.0.1", certified[1], CHANNEL, 0, 2, LIMIT)
    try:
        for credentials in (stolen, msgspec.structs.replace(CREDENTIALS, token=certified[0].token)):
            with pytest.raises(LightvllmError, match="could not be reached"):
                outlet(inlet.address, credentials, timeout=1.0)
        with pytest.raises(LightvllmError, match="could not be reached"):  # it is rank 1, not rank 2, that answers
            PushOutlet(inlet.address, certified[0], CHANNEL, 2, 2, 1.0)
    finally:
        inlet.close()


def test_a_listener_that_is_not_loopback_needs_certificates(certified: list[StageCredentials]) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "localhost"):
        with pytest.raises(ConfigError, match="needs certificates"):
            PushInlet(host, CREDENTIALS, CHANNEL, 0, 2, LIMIT)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1 .*; set LIGHTVLLM_HOST_IP"):
        PushInlet("192.0.2.1", certified[1], CHANNEL, 0, 2, LIMIT)


def test_a_closed_listener_is_gone() -> None:
    inlet = PushInlet("127.0.0.1", CREDENTIALS, CHANNEL, 0, 2, LIMIT)
    host, _, port = inlet.address.rpartition(":")
    inlet.close()
    inlet.close()

    def refused() -> bool:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_until(refused, "the port is closed")

"""What both ends of a connection must agree on: method names, metadata, limits, keepalive. Keeps no state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from lightvllm.backends.k8s.credentials import server_credentials
from lightvllm.backends.k8s.security import Tls
from lightvllm.messages import Buffer, Tensor
from lightvllm.proto import worker_pb2 as pb

SERVICE: str = pb.DESCRIPTOR.services_by_name["LLMWorker"].full_name

DRIVER_KEY = "lightvllm-driver"
"""Metadata: a random id of the driver, which ties its InitWorker to its Session. Not a secret."""

ACCEPTED = ("lightvllm-session", "accepted")
"""Initial metadata of a Session that has taken the worker. (A refusal has some, too: empty.)"""

FAILURE_KEY = "lightvllm-failure-bin"
"""Trailing metadata of an ExecuteModelStream whose stage has failed: the encoded failure."""

_FRAME_BYTES = 64 * 2**10  # room for what surrounds a payload

# (time, time-out) of pings, over TCP only: the kernel tells of a dead peer on a Unix socket, and a suspended one there
# is not dead. A dead node is noticed by the driver within 3 s; the worker is more patient with its driver, which may
# have been suspended for a moment.
_CLIENT_KEEPALIVE_MS = (1_000, 2_000)
_SERVER_KEEPALIVE_MS = (5_000, 10_000)

Options = list[tuple[str, int | str]]


def _client_options(target: str, max_message_bytes: int) -> Options:
    return [
        *_message_limits(max_message_bytes),
        *_keepalive(target, _CLIENT_KEEPALIVE_MS),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a channel's end must be its connection's end
    ]


def server_options(target: str, max_message_bytes: int) -> Options:
    return [
        *_message_limits(max_message_bytes),
        *_keepalive(target, _SERVER_KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", _CLIENT_KEEPALIVE_MS[0] // 2),
        ("grpc.http2.max_ping_strikes", 0),
        # Calls, of anybody, that have arrived and not been looked at: from the first number on some are refused, beyond
        # the second all. By default there may be 3,000, which is 80 MiB in the hands of strangers.
        ("grpc.server.max_pending_requests", 128),
        ("grpc.server.max_pending_requests_hard_limit", 256),
        ("grpc.server_handshake_timeout_ms", 10_000),  # who says nothing for so long is no driver
        ("grpc.so_reuseport", 0),  # a port belongs to one server: an occupied one is an error
    ]


def _keepalive(target: str, time_and_timeout: tuple[int, int]) -> Options:
    if target.startswith("unix:"):
        return []
    return [
        ("grpc.keepalive_time_ms", time_and_timeout[0]),
        ("grpc.keepalive_timeout_ms", time_and_timeout[1]),
        # A keepalive ping waits for the ack of any other that is in flight (grpc measures bandwidth with them), which
        # by default may take a minute.
        ("grpc.http2.ping_timeout_ms", time_and_timeout[1]),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _message_limits(max_message_bytes: int) -> Options:
    size = min(max_message_bytes + _FRAME_BYTES, 2**31 - 1)  # gRPC's own limit; a Session's payloads come in pieces
    return [("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)]


def open_channel(target: str, tls: Tls | None, max_message_bytes: int, server_name: str | None = None) -> Any:
    """A channel to ``target`` ("host:port", "unix:/path"): mutual TLS if ``tls`` is given, else plain.

    ``server_name``: what the server's certificate is for, if that is not the target's host.
    """
    options = _client_options(target, max_message_bytes)
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    if tls is None:
        return grpc.insecure_channel(target, options)
    cert, key, ca = tls.read()
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), options)


def bind(server: Any, target: str, tls: Tls | None) -> int:
    """Have ``server`` listen on ``target``; the bound port (1 for a Unix socket). Raises RuntimeError."""
    if tls is None:
        return int(server.add_insecure_port(target))
    return int(server.add_secure_port(target, server_credentials(tls)))


def handlers(methods: Mapping[str, Callable[..., Any]]) -> Any:
    """The service's methods, by name, as something to give to ``server.add_generic_rpc_handlers``.

    Session's handler takes and gives encoded messages; ``whole_calls`` and ``encode_reply`` are for it, and
    ``with_sender`` if it is to send from other threads, too.
    """
    return grpc.method_handlers_generic_handler(
        SERVICE, {name: METHODS[name].handler(behaviour) for name, behaviour in methods.items()}
    )


def with_sender(
    behaviour: Callable[[Iterator[bytes], Any, Callable[[bytes | None], None]], None],
) -> Callable[..., Any]:
    """The handler of a stream that does not give its messages, but is given what sends them.

    ``send(message)`` returns when gRPC has taken the message. Any thread may call it, but only one at a time.
    ``send(None)`` is the end. A generator sends from the thread that runs it alone, and not while it waits or works.
    gRPC counts this as experimental; its own health service rests on it.
    """
    handler: Any = functools.partial(behaviour)
    handler.experimental_non_blocking = True
    return handler  # type: ignore[no-any-return]


def stub(channel: Any, name: str) -> Any:
    """The client's side of a method."""
    return METHODS[name].stub(channel, name)


@dataclass(frozen=True)
class _Method:
    """``request`` and ``reply`` are message classes, or None for bytes as they are."""

    request: Any
    reply: Any
    streams: bool = False  # the request is a stream, and so is the reply
    reply_streams: bool = False

    def handler(self, behaviour: Callable[..., Any]) -> Any:
        make = (
            grpc.stream_stream_rpc_method_handler
            if self.streams
            else grpc.unary_stream_rpc_method_handler
            if self.reply_streams
            else grpc.unary_unary_rpc_method_handler
        )
        return make(behaviour, self.request and self.request.FromString, self.reply and self.reply.SerializeToString)

    def stub(self, channel: Any, name: str) -> Any:
        make = (
            channel.stream_stream
            if self.streams
            else channel.unary_stream
            if self.reply_streams
            else channel.unary_unary
        )
        return make(
            f"/{SERVICE}/{name}",
            self.request and self.request.SerializeToString,
            self.reply and self.reply.FromString,
        )


METHODS = {
    "InitWorker": _Method(pb.InitWorkerRequest, pb.InitWorkerReply),
    "OpenDirect": _Method(pb.OpenDirectRequest, pb.OpenDirectReply),
    "Session": _Method(None, None, streams=True),
    "CollectiveRpc": _Method(pb.CollectiveRpcRequest, pb.CollectiveRpcReply),
    "LoadModel": _Method(pb.LoadModelRequest, pb.CollectiveRpcReply),
    "ExecuteModel": _Method(pb.ExecuteModelRequest, pb.ExecuteModelReply),
    "ExecuteModelStream": _Method(pb.ExecuteModelRequest, pb.IntermediateTensor, reply_streams=True),
}

# ------------------------------------------------------------------------------------ Session's messages, in pieces

PIECE_BYTES = 2**20
"""Payloads beyond this size cross a Session in pieces, so that the two ends work on them at the same time."""


class CallEncoder:
    """Encodes a payload once, though it is sent to many workers: it remembers the last call. For one backend."""

    def __init__(self) -> None:
        self._last: tuple[int, str, bytes, list[bytes]] | None = None

    def encode(self, number: int, method: str, payload: bytes) -> list[bytes]:
        """The messages of a Call."""
        last = self._last
        if last is not None and last[2] is payload and last[:2] == (number, method):
            return last[3]
        messages = _pieces(pb.Call, number, payload, method=method)
        # A large payload is not kept alive for the sake of a copy that nobody may ask for.
        self._last = (number, method, payload, messages) if len(payload) <= PIECE_BYTES else None
        return messages


def encode_reply(number: int, payload: Buffer) -> list[bytes]:
    """The messages of a Reply."""
    return _pieces(pb.Reply, number, payload)


def _pieces(message: Any, number: int, payload: Buffer, **fields: str) -> list[bytes]:
    size = len(payload)
    if size <= PIECE_BYTES:
        return [message(sequence_number=number, payload=bytes(payload), **fields).SerializeToString()]
    view = memoryview(payload)
    first = message(sequence_number=number, payload=bytes(view[:PIECE_BYTES]), total_bytes=size, **fields)
    rest = (message(payload=bytes(view[at : at + PIECE_BYTES])) for at in range(PIECE_BYTES, size, PIECE_BYTES))
    return [first.SerializeToString(), *(piece.SerializeToString() for piece in rest)]


def whole_calls(messages: Iterable[bytes], limit: int) -> Iterator[tuple[int, str, Buffer]]:
    """Sequence number, method and payload of each Call. Raises ConnectionError for what is none."""
    for first, payload in _whole(pb.Call, messages, limit):
        yield first.sequence_number, first.method, payload


def whole_replies(messages: Iterable[bytes], limit: int) -> Iterator[tuple[int, Buffer]]:
    """Sequence number and payload of each Reply. Raises ConnectionError for what is none."""
    for first, payload in _whole(pb.Reply, messages, limit):
        yield first.sequence_number, payload


def _whole(message: Any, messages: Iterable[bytes], limit: int) -> Iterator[tuple[Any, Buffer]]:
    arriving = iter(messages)
    for data in arriving:
        first = _decoded(message, data)
        if first.sequence_number == 0:
            raise ConnectionError("it sent a piece of a payload, expected the first one")
        if not first.total_bytes:
            yield first, first.payload
            continue
        total = first.total_bytes
        if total > limit:
            raise ConnectionError(f"it announced a payload of {total} bytes, more than max_message_bytes={limit}")
        payload = bytearray(total)
        piece = first
        filled = 0
        while True:
            size = len(piece.payload)
            if not size or filled + size > total:
                raise ConnectionError(f"it sent {filled + size} bytes of a payload of {total} bytes")
            payload[filled : filled + size] = piece.payload
            filled += size
            if filled == total:
                break
            following = next(arriving, None)
            if following is None:
                raise ConnectionError(f"it ended after {filled} bytes of a payload of {total} bytes")
            piece = _decoded(message, following)
            if piece.sequence_number:
                raise ConnectionError(f"it sent message {piece.sequence_number}, expected the rest of a payload")
        yield first, payload


def tensor_message(tensor: Any) -> Tensor:
    """An IntermediateTensor, whole, as the engine's own message."""
    return Tensor(tensor.dtype, list(tensor.shape), tensor.data)


def intermediate_tensor(tensor: Tensor, name: str = "hidden_states") -> Any:
    return pb.IntermediateTensor(name=name, data=tensor.data, shape=tensor.shape, dtype=tensor.dtype)


def tensor_pieces(tensor: Any) -> Iterator[Any]:
    """An IntermediateTensor in pieces of PIECE_BYTES at most; at least one."""
    data = memoryview(tensor.data)
    for at in range(0, max(1, len(data)), PIECE_BYTES):
        yield pb.IntermediateTensor(
            name=tensor.name,
            data=bytes(data[at : at + PIECE_BYTES]),
            shape=tensor.shape,
            dtype=tensor.dtype,
            offset=at,
        )


def _decoded(message: Any, data: bytes) -> Any:
    try:
        return message.FromString(data)
    except DecodeError:
        raise ConnectionError(f"it sent {len(data)} bytes that are no {message.DESCRIPTOR.name}") from None

"""``pp_transport="grpc"``: batches from worker to worker over ``LLMWorker.PushTensors``.

The receiving worker listens and takes one stream, for the life of the group; the sending one keeps it open. The
listener serves nothing else. It is on loopback, or it is mutual TLS with the group's own CA and takes only the rank
that it expects; on either, no message is read before the group's token has been seen. Large tensors go in pieces, so
that no message is large; sizes are checked before memory is allocated. A receiver that is behind stops reading, and
gRPC's own flow control stops the sender.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from lightvllm.errors import AuthError, ConfigError, LightvllmError, MissingExtra
from lightvllm.messages import StageCredentials
from lightvllm.transfer import tensors
from lightvllm.transfer.credentials import host_name
from lightvllm.transfer.stage import Batch, Header, Mailbox

if TYPE_CHECKING:
    import torch

try:
    import grpc
    from google.protobuf.message import DecodeError

    from lightvllm.proto import worker_pb2 as pb
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] not in ("grpc", "google"):
        raise
    raise MissingExtra("grpcio", "k8s", "--pp-transport grpc") from None

PIECE_BYTES = 2 * 2**20
"""The largest piece of a tensor in one message."""
NAME = "hidden_states"

_METHOD = f"/{pb.DESCRIPTOR.services_by_name['LLMWorker'].full_name}/PushTensors"
_MESSAGE_BYTES = PIECE_BYTES + 64 * 2**10
_ACCEPTED = ("lightvllm-push", "accepted")
_THREADS = 3  # one is the stream's; the others refuse
_CLOSE_SECONDS = 2.0
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
]
# A host that has gone without a word is noticed within 15 s; the system tells of a process at once.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]


def channel_name(rank: int, tp_size: int) -> str:
    """Of the channel into ``rank``, from its counterpart in the stage before."""
    return f"rank-{rank - tp_size}-to-rank-{rank}"


def _bearer(credentials: StageCredentials) -> str:
    return f"Bearer {credentials.token}"


class PushInlet:
    """The receiving end: a listener and its mailbox.

    Args:
        host: the address to listen on, and no other; ``"127.0.0.1"`` unless there are certificates.
        channel: see ``channel_name``.
        previous_rank: the only one who may connect.
        capacity: batches that are kept.
        limit: bytes of the largest tensor.
        pinned: receive into pinned memory, for a GPU.

    Attributes:
        address: ``"host:port"``, where it listens.
    """

    def __init__(
        self,
        host: str,
        credentials: StageCredentials,
        channel: str,
        previous_rank: int,
        capacity: int,
        limit: int,
        pinned: bool = False,
    ) -> None:
        self._expected = _bearer(credentials).encode()
        self._peer = host_name(previous_rank).encode() if credentials.cert else None
        self._mailbox = Mailbox(capacity)
        self._assembly = _Assembly(channel, limit, pinned)
        self._guard = threading.Lock()
        self._taken = False
        self._closed = False
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="lightvllm-push")
        handler = grpc.stream_unary_rpc_method_handler(
            self._push, response_serializer=pb.PushTensorsReply.SerializeToString
        )
        service, _, method = _METHOD[1:].partition("/")
        handlers = [grpc.method_handlers_generic_handler(service, {method: handler})]
        options = [*_OPTIONS, *(_KEEPALIVE if credentials.cert else []), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(self._pool, handlers, options=options)
        try:
            if credentials.cert:
                pair = [(credentials.key, credentials.cert)]
                secure = grpc.ssl_server_credentials(pair, credentials.ca, require_client_auth=True)
                port = self._server.add_secure_port(_target(host, 0), secure)
            elif host != "127.0.0.1":
                raise ConfigError(f"a listener for hidden states on {host} needs certificates; use 127.0.0.1")
            else:
                port = self._server.add_insecure_port(_target(host, 0))
        except RuntimeError:
            self._pool.shutdown()
            raise ConfigError(
                f"cannot listen on {host} for the previous stage; set LIGHTVLLM_HOST_IP to this host's address"
            ) from None
        self.address = _target(host, port)
        self._server.start()

    def take(self, deadline: float) -> Batch | None:
        return self._mailbox.take(deadline)

    def close(self) -> None:
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._mailbox.close()
        self._server.stop(0).wait(_CLOSE_SECONDS)
        self._pool.shutdown(wait=False)

    def _push(self, messages: Iterator[bytes], context: Any) -> Any:
        self._admit(context)
        context.send_initial_metadata((_ACCEPTED,))
        try:
            for message in messages:
                batch = self._assembly.add(_parsed(message))
                if batch is not None and not self._mailbox.put(batch):
                    break
        except LightvllmError as malformed:
            self._mailbox.end(str(malformed))
            refusal = str(malformed)
        except grpc.RpcError:
            self._mailbox.end("the connection broke; it has died, or cannot be reached any more")
            refusal = "the connection broke"
        else:
            self._mailbox.end("it has closed its stage transport")
            return pb.PushTensorsReply(sequence_number=self._assembly.done)
        return context.abort(grpc.StatusCode.INVALID_ARGUMENT, refusal)

    def _admit(self, context: Any) -> None:
        """Nothing has been read of the stream so far."""
        given = [value for key, value in context.invocation_metadata() if key == "authorization"]
        text = given[0] if len(given) == 1 else ""
        if not hmac.compare_digest(text.encode() if isinstance(text, str) else text, self._expected):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
        if self._peer is not None and context.auth_context().get("x509_subject_alternative_name") != [self._peer]:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"only {self._peer.decode()} may connect")
        with self._guard:
            refused, self._taken = self._taken, True
        if refused:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the previous stage has connected before")


class _Assembly:
    """Puts pieces together again, and trusts none of them.

    Attributes:
        done: batches that were completed.
    """

    def __init__(self, channel: str, limit: int, pinned: bool) -> None:
        self._channel, self._limit, self._pinned = channel, limit, pinned
        self._header: Header | None = None
        self._tensor: torch.Tensor | None = None
        self._size = 0
        self._filled = 0
        self.done = 0

    def add(self, message: Any) -> Batch | None:
        """The batch that this piece completes, if it does. LightvllmError for a piece that does not belong."""
        header = self._header
        if header is None:
            header = self._header = self._begin(message)
        elif message.sequence_number != header.sequence or len(message.tensors) != 1:
            raise LightvllmError(
                f"a piece of batch {message.sequence_number} came; expected the next of {header.sequence}"
            )
        for piece in message.tensors:
            end = self._filled + len(piece.data)
            if piece.offset != self._filled or end > self._size:
                raise LightvllmError(
                    f"bytes {piece.offset} to {piece.offset + len(piece.data)} of batch {header.sequence} came; "
                    f"expected them from {self._filled} on and up to {self._size}"
                )
            if self._tensor is not None and piece.data:
                tensors.buffer_of(self._tensor)[self._filled : end] = piece.data
            self._filled = end
        if not message.last:
            return None
        if self._filled != self._size:
            raise LightvllmError(f"batch {header.sequence} ends after {self._filled} bytes; expected {self._size}")
        batch = Batch(header, self._tensor)
        self._header = self._tensor = None
        self._size = self._filled = 0
        self.done += 1
        return batch

    def _begin(self, message: Any) -> Header:
        if message.channel != self._channel:
            raise LightvllmError(f"a batch came for channel {message.channel!r:.80}; expected {self._channel!r}")
        if message.sequence_number != self.done + 1:
            raise LightvllmError(f"batch {message.sequence_number} came; expected batch {self.done + 1}")
        if len(message.tensors) > 1:
            raise LightvllmError(f"{len(message.tensors)} tensors came in one batch; expected at most 1")
        if not message.tensors:
            return Header(message.epoch, message.sequence_number, message.step)
        (first,) = message.tensors
        shape = tuple(first.shape)
        self._size = tensors.check_size(shape, first.dtype, self._limit)
        self._tensor = tensors.empty(shape, first.dtype, self._pinned)
        return Header(message.epoch, message.sequence_number, message.step, first.dtype, shape)


def _parsed(message: bytes) -> Any:
    """Here and not by gRPC, which takes what it cannot parse for the stream's end."""
    try:
        return pb.TensorBatch.FromString(message)
    except DecodeError:
        raise LightvllmError("something that is no TensorBatch came") from None


class _Item(NamedTuple):
    header: Header
    tensor: torch.Tensor | None


class PushOutlet:
    """The sending end: connects when it is made, within ``timeout`` seconds.

    Args:
        address: of the peer's ``PushInlet``.
        channel: see ``channel_name``.
        next_rank: who must answer there.
        capacity: batches that may wait to be sent.

    Raises:
        AuthError: the peer refused us.
        LightvllmError: it cannot be reached.
    """

    def __init__(
        self,
        address: str,
        credentials: StageCredentials,
        channel: str,
        next_rank: int,
        capacity: int,
        timeout: float,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._name, self._capacity, self._piece_bytes = channel, capacity, piece_bytes
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._closed = False
        self._failure: LightvllmError | None = None
        options: list[tuple[str, Any]] = [
            *_OPTIONS,
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if credentials.cert:
            secure = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.cert)
            options += [*_KEEPALIVE, ("grpc.ssl_target_name_override", host_name(next_rank))]
            self._channel = grpc.secure_channel(address, secure, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        push = self._channel.stream_unary(_METHOD, pb.TensorBatch.SerializeToString, pb.PushTensorsReply.FromString)
        self._call: Any = push.future(
            self._messages(), metadata=(("authorization", _bearer(credentials)),), wait_for_ready=True
        )
        self._call.add_done_callback(self._ended)
        try:
            self._await_acceptance(f"rank {next_rank} at {address}", timeout)
        except BaseException:
            self.close()
            raise

    def _await_acceptance(self, peer: str, timeout: float) -> None:
        limit = threading.Timer(timeout, self._call.cancel)
        limit.daemon = True
        limit.start()
        try:
            accepted = dict(self._call.initial_metadata() or ()).get(_ACCEPTED[0]) == _ACCEPTED[1]
        finally:
            limit.cancel()
            limit.join()
        if accepted:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, _CLOSE_SECONDS)
            reason = self._failure
        if self._call.cancelled():
            raise LightvllmError(f"{peer} could not be reached for the stage transport within {timeout:g} s")
        if self._call.done() and self._call.code() in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
        ):
            raise AuthError(f"{peer} refused the stage transport: {self._call.details()}")
        raise LightvllmError(f"{peer} refused the stage transport: {reason or 'it said nothing'}")

    def put(self, header: Header, x: torch.Tensor | None, deadline: float) -> bool:
        host = None if x is None else tensors.to_host(x)
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or self._closed or len(self._items) < self._capacity,
                max(0.0, deadline - time.monotonic()),
            )
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise LightvllmError("this worker has closed its stage transport")
            if len(self._items) >= self._capacity:
                return False
            self._items.append(_Item(header, host))
            self._changed.notify_all()
        return True

    def close(self) -> None:
        """What has been put is still sent if the receiver takes it at once."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failure is not None, _CLOSE_SECONDS)
        self._call.cancel()
        self._channel.close()

    def _ended(self, call: Any) -> None:
        code = call.code()
        if code == grpc.StatusCode.OK:
            text = "it has closed its stage transport"
        else:
            text = f"{call.details() or 'the connection broke'} ({code.name.lower().replace('_', ' ')})"
        with self._changed:
            self._failure = LightvllmError(text)
            self._changed.notify_all()

    def _messages(self) -> Iterator[Any]:
        """What gRPC sends: read by a thread of its own, which sleeps here when there is nothing to send."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closed or self._failure is not None)
                if self._failure is not None or not self._items:
                    return
                item = self._items[0]
            yield from self._pieces(item)
            with self._changed:
                self._items.popleft()
                self._changed.notify_all()

    def _pieces(self, item: _Item) -> Iterator[Any]:
        header, x = item
        fields: dict[str, Any] = {
            "channel": self._name,
            "sequence_number": header.sequence,
            "epoch": header.epoch,
            "step": header.tag,
        }
        if x is None:
            yield pb.TensorBatch(**fields, last=True)
            return
        data = tensors.buffer_of(x)
        for offset in range(0, max(1, len(data)), self._piece_bytes):
            end = offset + self._piece_bytes
            piece = pb.IntermediateTensor(data=bytes(data[offset:end]), offset=offset)
            if offset == 0:
                piece.name, piece.dtype = NAME, header.dtype
                piece.shape.extend(header.shape)
            yield pb.TensorBatch(**fields, tensors=[piece], last=end >= len(data))


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

"""The driver's end of one worker: find it well, take it, initialise it; then the ordered calls.

The gRPC stream ``Session`` is the lease on the worker, whichever way the calls go: by the stream itself, or by a direct
socket that a ticket opens (``lightvllm/transfer/link.py``). Order, replies, errors and the end are the same for both.
A reply names its call, and may come after those of later ones (``messages.Deferred``).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightvllm.backends.base import OnReply, complete
from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.discovery import Locate
from lightvllm.backends.k8s.names import Unresolved
from lightvllm.backends.k8s.reactor import Reactor
from lightvllm.backends.k8s.security import Tls, Token
from lightvllm.config import KubernetesTransport
from lightvllm.errors import AuthError, ConfigError, LightvllmError, PlacementError, Shutdown
from lightvllm.messages import Buffer
from lightvllm.proto import worker_pb2 as pb
from lightvllm.transfer import frames, link
from lightvllm.transfer.frames import Frame, FrameSocket

_PROBE_SECONDS = 2.0  # for one health check
_BACK_OFF_SECONDS = (0.1, 1.0)  # between two of them: first, most
_BUSY_SECONDS = 3.0  # how long a worker may go on serving a driver that has just gone
# The same behind a name: the driver may have gone with its node, which the worker notices later; and until the name
# server has a new answer, the name may lead to what is another pod by now.
_BUSY_POD_SECONDS = 30.0
_DIRECT_SECONDS = 5.0  # for a direct connection to be opened; it either can be at once or not at all

_CLOSED = "it closed the session"
_WRONG_NAME = "Hostname Verification Check failed"  # gRPC's words, which do not say which name
_PASSING = (  # may be otherwise in a moment: the server is not there yet, is just ending, or has too many at its door
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


class WorkerSession:
    """One worker, from the driver. Methods may be called from any thread.

    Attributes:
        ended: set when the session is over, whoever ended it.
        carrier: what carries the calls, once the worker is initialised: ``"grpc"`` or ``"direct"``.
        why_not_direct: why it is gRPC, if that was left to be seen.
        address: where the worker is reached, ``"unix:/path"`` or ``"host:port"``; known once it is open.
    """

    def __init__(
        self,
        who: str,
        target: str,
        token: Token,
        tls: Tls | None,
        *,
        max_message_bytes: int,
        on_break: Callable[[str], None],
        transport: KubernetesTransport = "grpc",
        reactor: Reactor | None = None,
        encoder: wire.CallEncoder | None = None,
        locate: Locate | None = None,
    ) -> None:
        """Connects to nothing yet.

        With ``locate`` the connection goes to an address that it gives, asked at each attempt; the worker's certificate
        is for the host of ``target`` all the same.

        ``on_break(reason)`` is called once, from a thread, when an open session ends that has not been closed here.
        A ``transport`` other than ``"grpc"`` needs a ``reactor``. Sessions that send the same payloads share an
        ``encoder``.
        """
        self._who, self._tls, self._locate = who, tls, locate
        self._server_name = None if locate is None else target.rpartition(":")[0]
        self._metadata = (*token.metadata(), (wire.DRIVER_KEY, uuid.uuid4().hex))
        self._limit = self._channel_limit = max_message_bytes
        self._on_break = on_break
        self._transport = transport
        self._reactor = reactor
        self._encoder = encoder or wire.CallEncoder()
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[str, OnReply]] = {}  # by number, in the order in which they were sent
        self._sent = 0
        self._over: LightvllmError | None = None  # why calls are refused
        self._broken = False
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stream: Any = None
        self._init: Any = None
        self._direct: FrameSocket | None = None
        self._cancelled = threading.Event()
        self.ended = threading.Event()
        self.carrier: Literal["grpc", "direct"] = "grpc"
        self.why_not_direct = ""
        self.address = ""
        self._channel: Any = None
        if locate is None:
            self._connect_to(target)

    # -------------------------------------------------------------------------------------------- placement

    def open(self, deadline: float, say: Callable[[str], None]) -> None:
        """Wait until the worker reports SERVING, then take it. ``say`` is told what is being waited for.

        A worker that serves another driver is given a moment, in which it may learn that the other has gone.
        Raises AuthError, PlacementError (time is up, it serves another driver), or what the session was failed with.
        """
        patience = _BUSY_SECONDS if self._locate is None else _BUSY_POD_SECONDS
        busy_until = min(deadline, time.monotonic() + patience)
        pause = _BACK_OFF_SECONDS[0]
        while True:
            self._wait_serving(deadline, say)
            refusal = self._take()
            if refusal is None:
                break
            code, why = refusal.code(), _details(refusal)
            busy = code == grpc.StatusCode.FAILED_PRECONDITION
            if not busy and code not in _PASSING:
                raise self._translated(refusal)
            if time.monotonic() >= (busy_until if busy else deadline):
                raise PlacementError(f"{self._who}: {why}")
            say(why)
            self._sleep(pause)
            if self._locate is not None:  # each attempt asks name servers
                pause = min(2 * pause, _BACK_OFF_SECONDS[1])
        if self._transport == "grpc":
            self._watch()

    def init_worker(
        self,
        worker_class: str,
        env: Mapping[str, str],
        timeout: float,
        env_overrides: Mapping[str, str] | None = None,
    ) -> pb.InitWorkerReply:
        """Have the worker class constructed. ``failure`` of the reply is for ``messages.decode_reply``.

        Raises PlacementError, AuthError, or what the session was failed with.
        """
        deadline = time.monotonic() + timeout
        if self._transport != "grpc":
            self._connect_directly(timeout)
            self._watch()
        carrier = pb.STREAM if self._direct is None else pb.DIRECT
        request = pb.InitWorkerRequest(worker_class=worker_class, env=env, carrier=carrier, env_overrides=env_overrides)
        reply: pb.InitWorkerReply = self._ask(self._call_init_worker, request, deadline - time.monotonic())
        self._limit = min(self._limit, reply.max_message_bytes)
        return reply

    def _watch(self) -> None:
        """From now on replies are taken from the stream, if it carries the calls, and its end is noticed."""
        if self._direct is None:
            threading.Thread(target=self._read_stream, name=f"lightvllm-session-{self._who}", daemon=True).start()
        else:  # nothing comes but its end; a thread that reads it would look ten times a second
            self._stream.add_done_callback(self._stream_ended)

    def _ask(self, method: Any, request: Any, timeout: float) -> Any:
        with self._lock:
            self._raise_if_over()
            self._init = method.future(request, timeout=timeout, metadata=self._metadata)
        try:
            return self._init.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._translated(error) from None

    def _connect_directly(self, timeout: float) -> None:
        """Open the direct carrier; with transport "auto" the stream is good enough where that fails."""
        assert self._reactor is not None
        limit = min(timeout, _DIRECT_SECONDS)
        try:
            reply = self._ask(self._call_open_direct, pb.OpenDirectRequest(), limit)
            address = reply.address
            if not address.startswith("unix:"):
                address = f"{self.address.rpartition(':')[0]}:{address}"
            tls = None if self._tls is None else self._tls.context(server=False)
            direct = link.connect(address, reply.ticket, self._limit, limit, tls, server_name=self._server_name)
        except (OSError, PlacementError) as error:
            self._raise_if_over()
            if self._transport == "direct":
                raise PlacementError(f"{self._who}: no direct connection: {error}") from None
            self.why_not_direct = str(error)
            return
        with self._lock:
            if self._over is None:
                self._direct, self.carrier = direct, "direct"
                self._reactor.add(direct, self._take_frames, self._break)
                return
        direct.close()
        self._raise_if_over()

    def _wait_serving(self, deadline: float, say: Callable[[str], None]) -> None:
        pause = _BACK_OFF_SECONDS[0]
        while why := self._why_not_serving(deadline):
            say(why)
            if time.monotonic() + pause >= deadline:
                raise PlacementError(f"{self._who}: {why}")
            self._sleep(pause)
            pause = min(2 * pause, _BACK_OFF_SECONDS[1])

    def _why_not_serving(self, deadline: float) -> str:
        """Nothing if the worker reports SERVING, at the address to which the channel goes from now on."""
        if self._locate is None:
            return self._check(deadline)
        try:
            addresses = self._locate(_probe_seconds(deadline))
        except Unresolved as error:
            self._raise_if_over()
            return str(error)
        said = []
        for address in addresses:
            self._connect_to(address)
            why = self._check(deadline)
            if not why:
                return ""
            said.append(f"{address.rpartition(':')[0]}: {why}")
        return "; ".join(said)

    def _check(self, deadline: float) -> str:
        """Nothing if what the channel goes to reports SERVING, else why it may be otherwise in a moment."""
        request = health_pb2.HealthCheckRequest(service=wire.SERVICE)
        try:
            status = self._check_health(request, timeout=_probe_seconds(deadline)).status
        except grpc.RpcError as error:
            if error.code() not in _PASSING:
                raise self._translated(error) from None
            if _WRONG_NAME not in (why := _details(error)):
                return why
            return f"its certificate is not for {self._server_name or self.address.rpartition(':')[0]}"
        except ValueError:  # the channel was closed
            self._raise_if_over()
            raise
        return "" if status == health_pb2.HealthCheckResponse.SERVING else "is not serving"

    def _connect_to(self, address: str) -> None:
        """Have calls go to ``address`` from now on."""
        if address == self.address:
            return
        with self._lock:
            self._raise_if_over()
            channel = wire.open_channel(address, self._tls, self._channel_limit, self._server_name)
            # Made here, while nobody can close the channel: grpc crashes when a method is registered on a closed one.
            self._check_health = health_pb2_grpc.HealthStub(channel).Check
            self._call_init_worker = wire.stub(channel, "InitWorker")
            self._call_open_direct = wire.stub(channel, "OpenDirect")
            self._open_session = wire.stub(channel, "Session")
            former, self._channel, self.address = self._channel, channel, address
        if former is not None:
            former.close()

    def _take(self) -> Any:
        """Open the session: None, or the gRPC error with which the worker refused."""
        with self._lock:
            self._raise_if_over()
            messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            stream = self._open_session(iter(messages.get, None), metadata=self._metadata)
            self._messages, self._stream = messages, stream
        if wire.ACCEPTED in stream.initial_metadata():  # comes when the worker has decided, or the stream has ended
            return None
        messages.put(None)
        return stream.exception()  # waits for the end of the stream, which has begun

    def _sleep(self, seconds: float) -> None:
        if self._cancelled.wait(seconds):
            self._raise_if_over()

    def _raise_if_over(self) -> None:
        if self._over is not None:
            raise self._over

    def _translated(self, error: Any) -> LightvllmError:
        """A gRPC error as one of ours."""
        if self._over is not None:
            return self._over
        code = error.code() if isinstance(error, grpc.RpcError) else None
        if code == grpc.StatusCode.UNAUTHENTICATED:
            return AuthError(f"{self._who} refused this driver: {_details(error)}; give it the worker's own token file")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return PlacementError(f"{self._who} is no lightvllm worker: {_details(error)}")
        return PlacementError(f"{self._who}: {_details(error)}")

    # ------------------------------------------------------------------------------------------------ calls

    @property
    def pending_method(self) -> str | None:
        """The method that is being executed, or finished, as far as is known here."""
        with self._lock:
            return next((method for method, _ in self._pending.values()), None)

    def refusal(self, method: str, size: int) -> LightvllmError | None:
        """What a call with a payload of ``size`` bytes would fail with at once."""
        if size > self._limit:
            return ConfigError(
                f"the call of {method} is {size} bytes, more than max_message_bytes={self._limit} "
                "(lightvllm worker --max-message-mib)"
            )
        return self._over

    def call(self, method: str, payload: Buffer) -> Future[Buffer]:
        """Send a call. The future has failed already if the session is over or the payload is too large."""
        future: Future[Buffer] = Future()
        future.set_running_or_notify_cancel()  # what has been sent can no longer be cancelled
        self.send(method, payload, functools.partial(complete, future))
        return future

    def send(self, method: str, payload: Buffer, on_reply: OnReply) -> None:
        """``call`` without a future; see ``Backend.send``."""
        data = payload if isinstance(payload, bytes) else bytes(payload)
        with self._lock:
            error = self.refusal(method, len(data))
            if error is None:
                self._sent += 1
                self._send(self._sent, method, data)
                self._pending[self._sent] = (method, on_reply)
        if error is not None:
            on_reply(error)

    def _send(self, number: int, method: str, data: bytes) -> None:
        if self._direct is None:
            for message in self._encoder.encode(number, method, data):
                self._messages.put(message)
            return
        try:
            if not self._direct.send(frames.CALL, number, _name(method), data) and self._reactor is not None:
                self._reactor.flush_when_possible(self._direct)
        except ConnectionError:
            pass  # the reading side sees it, too, and tells why

    def _take_frames(self, arrived: collections.deque[Frame]) -> None:
        while arrived:
            kind, number, _, payload = arrived.popleft()
            if kind != frames.REPLY:
                raise ConnectionError(f"it sent a frame of kind {kind}, expected a reply")
            self._replied(number, payload)

    def _replied(self, number: int, payload: Buffer) -> None:
        """Raises ConnectionError if no call of this number waits for a reply."""
        with self._lock:
            if self._over is not None:
                return  # the call has failed already
            answered = self._pending.pop(number, None)
            if answered is None:
                expected = f"call {next(iter(self._pending), None)}"
                if len(self._pending) > 1:
                    expected += " or a later one that waits"
                raise ConnectionError(f"it answered call {number}, expected an answer to {expected}")
        answered[1](payload)

    def _read_stream(self) -> None:
        try:
            for number, payload in wire.whole_replies(self._stream, self._limit):
                self._replied(number, payload)
            reason = _CLOSED
        except grpc.RpcError as error:
            reason = f"the connection broke ({_details(error)})"
        except ConnectionError as error:
            self._stream.cancel()
            reason = str(error)
        self.ended.set()
        self._break(reason)

    def _stream_ended(self, stream: Any) -> None:
        """In a thread of gRPC's, which must not wait for what a break sets off."""
        self.ended.set()
        reason = _CLOSED if stream.code() == grpc.StatusCode.OK else f"the connection broke ({_details(stream)})"
        threading.Thread(target=self._break, args=(reason,), name="lightvllm-session-ended", daemon=True).start()

    def _break(self, reason: str) -> None:
        with self._lock:
            first, self._broken = not self._broken, True
            report = first and self._over is None
        if report:
            self._on_break(reason)

    # -------------------------------------------------------------------------------------------------- end

    def fail(self, error: LightvllmError) -> None:
        """Fail what is pending and refuse what comes, with ``error``; the first one counts."""
        with self._lock:
            if self._over is None:
                self._over = error
            failed, self._pending = self._pending, {}
        self._cancelled.set()
        for _, on_reply in failed.values():
            on_reply(error)

    def close(self) -> None:
        """Tell the worker politely that its driver is done; ``ended`` is set when it has understood."""
        self.fail(Shutdown("the backend has been shut down"))
        if self._direct is not None:
            with contextlib.suppress(ConnectionError):  # it has gone already
                self._direct.send(frames.CLOSE, 0, b"", b"")  # a few bytes on an idle connection
        self._messages.put(None)

    def abort(self) -> None:
        """End the connection at once, whatever is going on."""
        self.fail(Shutdown("the backend has been shut down"))
        self._messages.put(None)  # ends gRPC's sending thread
        if self._channel is not None:  # there will be no other one: the session is over
            self._channel.close()
        if self._direct is not None and self._reactor is not None:
            self._reactor.remove(self._direct)
            self._direct.close()
        if self._stream is None:
            self.ended.set()


def _probe_seconds(deadline: float) -> float:
    return max(0.05, min(_PROBE_SECONDS, deadline - time.monotonic()))


@functools.lru_cache(maxsize=256)
def _name(method: str) -> bytes:
    return method.encode()


def _details(error: Any) -> str:
    """What a gRPC error says, in one line and without gRPC's own wrapping."""
    text = (error.details() if isinstance(error, grpc.RpcError) else None) or str(error)
    _, _, last = text.rpartition("Failed to connect to remote host: ")
    return " ".join(last.split()) or "no reason given"

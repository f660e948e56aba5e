"""The driver's end of one worker's connection: find it well, take it, initialise it; then the ordered calls."""

from __future__ import annotations

import collections
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.security import Tls, Token
from lightvllm.errors import AuthError, ConfigError, LightvllmError, PlacementError, Shutdown
from lightvllm.messages import Buffer
from lightvllm.proto import worker_pb2 as pb

_PROBE_SECONDS = 2.0  # for one health check
_BACK_OFF_SECONDS = (0.1, 1.0)  # between two of them: first, most
_BUSY_SECONDS = 3.0  # how long a worker may go on serving a driver that has just gone

_PASSING = (  # may be otherwise in a moment: the server is not there yet, or is just ending
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


class WorkerSession:
    """One worker, from the driver. Methods may be called from any thread.

    Attributes:
        ended: set when the session is over, whoever ended it.
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
    ) -> None:
        """Connects to nothing yet. ``on_break(reason)`` is called once, from a thread, when an open session ends
        that has not been closed here."""
        self._who = who
        self._channel = wire.open_channel(target, tls, max_message_bytes)
        # Made here, while nobody can close the channel: grpc crashes when a method is registered on a closed one.
        self._check_health = health_pb2_grpc.HealthStub(self._channel).Check
        self._call_init_worker = wire.init_worker_stub(self._channel)
        self._open_session = wire.session_stub(self._channel)
        self._metadata = (*token.metadata(), (wire.DRIVER_KEY, uuid.uuid4().hex))
        self._limit = max_message_bytes
        self._on_break = on_break
        self._lock = threading.Lock()
        self._pending: collections.deque[tuple[int, str, Future[Buffer]]] = collections.deque()
        self._sent = 0
        self._over: LightvllmError | None = None  # why calls are refused
        self._frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stream: Any = None
        self._init: Any = None
        self._cancelled = threading.Event()
        self.ended = threading.Event()

    # -------------------------------------------------------------------------------------------- placement

    def open(self, deadline: float, say: Callable[[str], None]) -> None:
        """Wait until the worker reports SERVING, then take it. ``say`` is told what is being waited for.

        A worker that serves another driver is given a moment, in which it may learn that the other has gone.
        Raises AuthError, PlacementError (time is up, it serves another driver), or what the session was failed with.
        """
        busy_until = min(deadline, time.monotonic() + _BUSY_SECONDS)
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
            self._sleep(_BACK_OFF_SECONDS[0])
        threading.Thread(target=self._read, name=f"lightvllm-session-{self._who}", daemon=True).start()

    def init_worker(self, worker_class: str, env: Mapping[str, str], timeout: float) -> pb.InitWorkerReply:
        """Have the worker class constructed. ``failure`` of the reply is for ``messages.decode_reply``."""
        request = pb.InitWorkerRequest(worker_class=worker_class, env=env)
        with self._lock:
            self._raise_if_over()
            self._init = self._call_init_worker.future(request, timeout=timeout, metadata=self._metadata)
        try:
            reply: pb.InitWorkerReply = self._init.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._translated(error) from None
        self._limit = min(self._limit, reply.max_message_bytes)
        return reply

    def _wait_serving(self, deadline: float, say: Callable[[str], None]) -> None:
        pause = _BACK_OFF_SECONDS[0]
        request = health_pb2.HealthCheckRequest(service=wire.SERVICE)
        while True:
            remaining = deadline - time.monotonic()
            try:
                status = self._check_health(request, timeout=max(0.05, min(_PROBE_SECONDS, remaining))).status
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                why = "is not serving"
            except grpc.RpcError as error:
                if error.code() not in _PASSING:
                    raise self._translated(error) from None
                why = _details(error)
            except ValueError:  # the channel was closed
                self._raise_if_over()
                raise
            say(why)
            if time.monotonic() + pause >= deadline:
                raise PlacementError(f"{self._who}: {why}")
            self._sleep(pause)
            pause = min(2 * pause, _BACK_OFF_SECONDS[1])

    def _take(self) -> Any:
        """Open the session: None, or the gRPC error with which the worker refused."""
        with self._lock:
            self._raise_if_over()
            frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
            stream = self._open_session(iter(frames.get, None), metadata=self._metadata)
            self._frames, self._stream = frames, stream
        if wire.ACCEPTED in stream.initial_metadata():  # comes when the worker has decided, or the stream has ended
            return None
        frames.put(None)
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
        """The method that is being executed, as far as is known here."""
        with self._lock:
            return self._pending[0][1] if self._pending else None

    def call(self, method: str, payload: Buffer) -> Future[Buffer]:
        """Send a call. The future has failed already if the session is over or the payload is too large."""
        future: Future[Buffer] = Future()
        future.set_running_or_notify_cancel()  # it has been sent: it can no longer be cancelled
        data = payload if isinstance(payload, bytes) else bytes(payload)
        error: LightvllmError | None
        if len(data) > self._limit:
            error = ConfigError(f"the call of {method} is {len(data)} bytes, more than max_message_bytes={self._limit}")
        else:
            with self._lock:
                error = self._over
                if error is None:
                    self._sent += 1
                    self._pending.append((self._sent, method, future))
                    self._frames.put(pb.Call(sequence_number=self._sent, method=method, payload=data))
        if error is not None:
            future.set_exception(error)
        return future

    def _read(self) -> None:
        try:
            for reply in self._stream:
                with self._lock:
                    expected = self._pending[0][0] if self._pending else None
                    future = self._pending.popleft()[2] if reply.sequence_number == expected else None
                if future is None:
                    if self._over is None:
                        reason = f"it answered call {reply.sequence_number}, expected an answer to call {expected}"
                        self._stream.cancel()
                        break
                    continue  # the call has failed already
                future.set_result(reply.payload)
            else:
                reason = "it closed the session"
        except grpc.RpcError as error:
            reason = f"the connection broke ({_details(error)})"
        self.ended.set()
        with self._lock:
            broken = self._over is None
        if broken:
            self._on_break(reason)

    # -------------------------------------------------------------------------------------------------- end

    def fail(self, error: LightvllmError) -> None:
        """Fail what is pending and refuse what comes, with ``error``; the first one counts."""
        with self._lock:
            if self._over is None:
                self._over = error
            failed, self._pending = self._pending, collections.deque()
        self._cancelled.set()
        for _, _, future in failed:
            future.set_exception(error)

    def close(self) -> None:
        """Tell the worker politely that its driver is done; ``ended`` is set when it has understood."""
        self.fail(Shutdown("the backend has been shut down"))
        self._frames.put(None)

    def abort(self) -> None:
        """End the connection at once, whatever is going on."""
        self.fail(Shutdown("the backend has been shut down"))
        self._frames.put(None)  # ends gRPC's sending thread
        self._channel.close()
        if self._stream is None:
            self.ended.set()


def _details(error: Any) -> str:
    """What a gRPC error says, in one line and without gRPC's own wrapping."""
    text = (error.details() if isinstance(error, grpc.RpcError) else None) or str(error)
    _, _, last = text.rpartition("Failed to connect to remote host: ")
    return " ".join(last.split()) or "no reason given"

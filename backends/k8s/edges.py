"""The edges of a compiled graph between two workers: results on their way from worker to worker, past the driver.

Each pair of workers with an edge has one link (``lightvllm/transfer/link.py``) for both directions, opened when the
graph is compiled and closed when it is torn down. A result is one frame with what is pickled, then one for each large
tensor or array in it: their memory is written to the socket as it lies, and received into memory of its own.

Nobody waits for a consumer: what has come is taken in by whoever reads (``reactor.py``), also while the worker
computes, and lies here until its execution wants it. What lies here is bounded, because the driver bounds the
executions in flight. A consumer waits for its producer for a limited time, and no longer than the link stands.

Used by ``programs.py``, in a worker. Knows neither values nor programs.
"""

from __future__ import annotations

import collections
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import msgspec

from lightvllm.backends.k8s.reactor import Reactor
from lightvllm.errors import AuthError, ConfigError, LightvllmError, RpcTimeout
from lightvllm.messages import Buffer, StageCredentials
from lightvllm.transfer import frames, link
from lightvllm.transfer.frames import Frame, FrameSocket
from lightvllm.transfer.link import TicketListener

Parts = list[Buffer]
"""A result as it travels: what is pickled, or a failure; then the memory of the large tensors and arrays in it."""

_PATIENCE_SECONDS = 0.05  # that a producer writes for a peer that takes nothing, before it goes on with its own work
OVERHEAD_BYTES = 64 * 2**10  # of a result beyond max_message_bytes, which its producer has held it to
_NAME = struct.Struct("<I?")  # the producing node; whether this is its result's last frame

# The kernel tells of a process that ends at once, of a host that goes without a word by these (seconds, count). A
# suspended process is not dead: its host answers.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))


def _context(credentials: StageCredentials, server: bool) -> ssl.SSLContext | None:
    """Mutual TLS 1.3 with a CA that has signed for this graph's workers only; which of them the other one is, the
    ticket tells. None without a certificate."""
    if not credentials.cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.ca.decode())
    fd = os.memfd_create("lightvllm-certificate", os.MFD_CLOEXEC)  # it is read from files only
    with open(fd, "wb", buffering=0) as file:
        file.write(credentials.cert + credentials.key)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    return context


class Offer(msgspec.Struct, frozen=True):
    """Where a worker waits for another one, and what that one must show. No ``repr`` shows the ticket."""

    address: str
    ticket: bytes

    def __repr__(self) -> str:
        return f"Offer({self.address!r}, ticket hidden)"


class Edges:
    """One worker's links to the other workers of one graph.

    One thread sends, takes and closes.

    Args:
        sources: of each node of another worker whose result is used here, that worker.
        limit: bytes of the largest result.
        window: executions that may be in flight.
        timeout: seconds to wait for a result.
        credentials: the worker's; with a certificate for links that may leave the host.
    """

    def __init__(
        self, sources: Mapping[int, str], limit: int, window: int, timeout: float, credentials: StageCredentials
    ) -> None:
        self._sources = dict(sources)
        self._limit, self._window, self._timeout = limit, window, timeout
        self._credentials = credentials
        self._reactor = Reactor()
        self._listeners: dict[str, TicketListener] = {}
        self._links: dict[str, FrameSocket] = {}
        self._lock = threading.Lock()  # guards the four below
        self._arrived: dict[tuple[int, int], Parts] = {}
        self._awaited: tuple[tuple[int, int], Future[Parts]] | None = None
        self._broken: dict[str, str] = {}
        self._done = 0  # executions that want nothing more

    # ----------------------------------------------------------------------------------------------- opening

    def listen(self, peer: str, address: str, timeout: float) -> Offer:
        """Wait for ``peer`` at ``address`` ("unix:/path", or a host), for ``timeout`` seconds and in the background."""
        tls = _context(self._credentials, server=True)
        try:
            listener = TicketListener(address, self._frame_limit, timeout, tls)
        except OSError as error:
            raise ConfigError(f"it cannot listen on {address} for {peer}: {error.strerror or error}") from None
        self._listeners[peer] = listener
        return Offer(listener.address, listener.ticket)

    def connect(self, peer: str, offer: Offer, timeout: float) -> None:
        """Take up the offer of ``peer``."""
        tls = _context(self._credentials, server=False)
        try:
            self._add(peer, link.connect(offer.address, offer.ticket, self._frame_limit, timeout, tls))
        except (OSError, AuthError) as error:
            raise ConfigError(
                f"it cannot connect to {peer} at {offer.address} for an edge of the graph: {_why(error)}; "
                "the workers of a graph must reach each other on any port"
            ) from None

    def accept(self, timeout: float) -> None:
        """Have the links of those who were offered one. They have connected by now."""
        deadline = time.monotonic() + timeout
        for peer, listener in self._listeners.items():
            try:
                self._add(peer, listener.accepted.result(max(0.0, deadline - time.monotonic())))
            except OSError as error:
                raise ConfigError(f"{peer} did not connect for an edge of the graph: {_why(error)}") from None
        self._listeners.clear()

    def _add(self, peer: str, made: FrameSocket) -> None:
        with socket.socket(fileno=os.dup(made.fileno())) as sock:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _KEEPALIVE:
                    sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._links[peer] = made
        parts: Parts = []
        self._reactor.add(
            made,
            lambda arrived: self._take_frames(peer, parts, arrived),
            lambda reason: self._broke(peer, reason),
        )

    @property
    def _frame_limit(self) -> int:
        return self._limit + OVERHEAD_BYTES

    # ----------------------------------------------------------------------------------------------- sending

    def send(self, peers: Sequence[str], execution: int, node: int, parts: Parts) -> None:
        """Send a result of ``node`` to ``peers``. Its memory may be changed when this returns."""
        last = len(parts) - 1
        for peer in peers:
            to, patient = self._links[peer], True
            try:
                for index, part in enumerate(parts):
                    patient = self._write(to, patient, execution, _NAME.pack(node, index == last), part)
                if not patient:
                    to.keep_unsent()
                    self._reactor.flush_when_possible(to)
            except ConnectionError:
                pass  # the driver learns of a dead peer by its own session, and a live one by its side of the link

    @staticmethod
    def _write(to: FrameSocket, patient: bool, execution: int, name: bytes, part: Buffer) -> bool:
        """False if something is left to be sent."""
        if not patient:
            return to.send(frames.DATA, execution, name, part)
        try:
            to.write(frames.DATA, execution, name, part, _PATIENCE_SECONDS)
        except TimeoutError:
            return False
        return True

    # --------------------------------------------------------------------------------------------- receiving

    def take(self, execution: int, node: int) -> Parts:
        """The result of ``node``. Raises LightvllmError if the link is broken, or when the time is up."""
        key, peer = (execution, node), self._sources[node]
        with self._lock:
            if (parts := self._arrived.pop(key, None)) is not None:
                return parts
            if peer in self._broken:
                raise self._lost(peer)
            future: Future[Parts] = Future()
            self._awaited = (key, future)
        self._reactor.wait(future, self._timeout)
        with self._lock:
            self._awaited = None
            if not future.done():
                raise RpcTimeout(f"worker {peer} has sent no result within {self._timeout:g} s (step_timeout)")
        return future.result()

    def end_of(self, execution: int) -> None:
        """``execution`` wants nothing more, nor do those before it."""
        with self._lock:
            self._done = execution
            if self._arrived:  # of those after it; or of this one, which has come after its time
                for key in [key for key in self._arrived if key[0] <= execution]:
                    del self._arrived[key]

    def _lost(self, peer: str) -> LightvllmError:
        return LightvllmError(f"the connection to worker {peer} is lost: {self._broken[peer]}")

    def _take_frames(self, peer: str, parts: Parts, arrived: collections.deque[Frame]) -> None:
        """``parts``: of the result that is not complete yet."""
        while arrived:
            kind, execution, name, payload = arrived.popleft()
            if kind != frames.DATA or len(name) != _NAME.size:
                raise ConnectionError(f"it sent a frame of kind {kind}, expected a result")
            node, last = _NAME.unpack(name)
            if self._sources.get(node) != peer:
                raise ConnectionError(f"it sent a result of node {node}, which is not its own or not used here")
            parts.append(payload)
            if sum(map(len, parts)) > self._frame_limit:
                raise ConnectionError(f"it sent a result that is larger than max_message_bytes={self._limit}")
            if last:
                self._deliver((execution, node), list(parts))
                parts.clear()

    def _deliver(self, key: tuple[int, int], parts: Parts) -> None:
        with self._lock:
            if key[0] <= self._done:  # it is too late
                return
            if key[0] > self._done + self._window:
                raise ConnectionError(
                    f"it sent a result of execution {key[0]}, though {self._done} are done here and "
                    f"{self._window} may be in flight"
                )
            if self._awaited is None or self._awaited[0] != key:
                self._arrived[key] = parts
                return
            future, self._awaited = self._awaited[1], None
        future.set_result(parts)

    def _broke(self, peer: str, reason: str) -> None:
        with self._lock:
            self._broken[peer] = reason
            if self._awaited is None or self._sources[self._awaited[0][1]] != peer:
                return
            future, self._awaited = self._awaited[1], None
            error = self._lost(peer)
        future.set_exception(error)

    # -------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Close the links; idempotent."""
        for listener in self._listeners.values():
            listener.close()
            listener.accepted.add_done_callback(_close_accepted)
        for opened in self._links.values():
            self._reactor.remove(opened)
        self._reactor.close()
        for opened in self._links.values():
            opened.close()
        self._listeners.clear()
        self._links.clear()


def _why(error: Exception) -> str:
    return str(error) or "no answer in time"


def _close_accepted(accepted: Future[FrameSocket]) -> None:
    if accepted.exception() is None:
        accepted.result().close()

"""Contenders of ``carriers.py`` over frames: the direct carrier's own parts, each with one of them exchanged.

The driver has ``FrameSocket`` and ``Reactor``, and of the executor's work only the gathering of the replies; a worker
answers every frame with the number of bytes that it held. What ``open_contender`` is told names the one thing that is
otherwise.

As a script it is one worker: ``rpc_frames.py SPEC FD``. It inherits its connection, so that there is nothing to listen
on, and ends with it.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from lightvllm.backends.k8s.reactor import Reactor
from lightvllm.messages import Buffer
from lightvllm.transfer import frames
from lightvllm.transfer.frames import SPIN_SECONDS, Frame, FrameSocket

SPEC: dict[str, Any] = {
    "carrier": "unix",  # or tcp
    "worker_spin": SPIN_SECONDS,
    "driver_spin": SPIN_SECONDS,
    "reader": "waiting",  # or result, wait: the reactor's own thread reads, see _WAITS; or threads: one per worker
    "worker": "poll",  # or blocking, asyncio
    "write": "threshold",  # or joined, sendmsg, two
    "nodelay": True,
}
"""The chosen way; ``open_contender`` is given what differs from it."""

LIMIT = 64 * 2**20
WORKER_SECONDS = 60.0
"""For a worker to start and to answer for the first time, and for any one call."""

_END_SECONDS = 5.0
_SIZE = struct.Struct("<Q8x")
_COPIED_BYTES = {"joined": LIMIT, "sendmsg": 0, "two": 0}  # instead of frames._COPIED_BYTES


class Gathering:
    """The replies to one call at a time: a future that is done when every worker has replied."""

    def __init__(self, workers: int) -> None:
        self._lock = threading.Lock()
        self._number, self._missing = 0, 0
        self._replies: list[Buffer] = [b""] * workers
        self._broken: str | None = None
        self._future: Future[None] = Future()

    def begin(self) -> tuple[int, Future[None]]:
        """The next call's sequence number, and its future."""
        with self._lock:
            if self._broken is not None:
                raise RuntimeError(self._broken)
            self._number += 1
            self._missing = len(self._replies)
            self._future = Future()
            return self._number, self._future

    def replied(self, rank: int, number: int, payload: Buffer) -> None:
        with self._lock:
            if number != self._number:
                raise ConnectionError(f"it answered call {number}, expected an answer to call {self._number}")
            self._replies[rank] = payload
            self._missing -= 1
            future, last = self._future, not self._missing
        if last:
            future.set_result(None)

    def broke(self, rank: int, reason: str) -> None:
        with self._lock:
            first, self._broken = self._broken is None, f"worker {rank}: {reason}"
            future, pending = self._future, self._missing > 0
        if first and pending:
            future.set_exception(RuntimeError(self._broken))

    def replies(self, future: Future[None]) -> list[Buffer]:
        """Of a call that is done, or has had ``WORKER_SECONDS``."""
        if not future.done():
            raise RuntimeError(f"{self._missing} of {len(self._replies)} workers did not reply in {WORKER_SECONDS} s")
        future.result()
        return self._replies


_WAITS: dict[str, Callable[[Future[None]], object]] = {
    "result": lambda future: future.exception(WORKER_SECONDS),
    "wait": lambda future: concurrent.futures.wait((future,), WORKER_SECONDS),
}


class Driver:
    """Calls to all workers, one at a time, sent and read as the direct carrier does it, or as ``reader`` says."""

    def __init__(self, links: Sequence[FrameSocket], reader: str = "waiting", spin: float = SPIN_SECONDS) -> None:
        self._links = links
        self._gathering = Gathering(len(links))
        self._reactor = None if reader == "threads" else Reactor(spin)
        self._threads: list[threading.Thread] = []
        self._closing = False
        if self._reactor is None:
            self._wait: Callable[[Future[None]], object] = _WAITS["result"]
        elif reader == "waiting":
            self._wait = functools.partial(self._reactor.wait, timeout=WORKER_SECONDS)
        else:
            self._wait = _WAITS[reader]
        for rank, link in enumerate(links):
            broke = functools.partial(self._broke, rank)
            if self._reactor is not None:
                self._reactor.add(link, functools.partial(self._take, rank), broke)
            else:
                self._threads.append(threading.Thread(target=self._read, args=(rank, link), daemon=True))
                self._threads[-1].start()

    def call(self, name: bytes, payload: bytes) -> list[Buffer]:
        """The workers' replies, in their order. Raises RuntimeError if a worker is gone or does not reply."""
        number, future = self._gathering.begin()
        for link in self._links:
            if self._reactor is None:
                link.write(frames.CALL, number, name, payload, WORKER_SECONDS)
            elif not link.send(frames.CALL, number, name, payload):
                self._reactor.flush_when_possible(link)
        self._wait(future)
        return self._gathering.replies(future)

    def _take(self, rank: int, arrived: collections.deque[Frame]) -> None:
        while arrived:
            _, number, _, payload = arrived.popleft()
            self._gathering.replied(rank, number, payload)

    def _read(self, rank: int, link: FrameSocket) -> None:
        try:
            while True:
                _, number, _, payload = link.read(None)
                self._gathering.replied(rank, number, payload)
        except ConnectionError as error:
            self._broke(rank, str(error))

    def _broke(self, rank: int, reason: str) -> None:
        if not self._closing:
            self._gathering.broke(rank, reason)

    def close(self) -> None:
        """End the workers, and the reading of their connections."""
        self._closing = True
        for link in self._links:
            with contextlib.suppress(ConnectionError):  # it has gone already
                link.send(frames.CLOSE, 0, b"", b"")
        if self._reactor is not None:
            self._reactor.close()
        for thread in self._threads:  # each reads until its worker has closed the connection
            thread.join(_END_SECONDS)
        for link in self._links:
            link.close()


# ------------------------------------------------------------------------------------------- connections


class _TwoSends(FrameSocket):
    """Header and payload by a system call each; for use with a ``_COPIED_BYTES`` of 0."""

    def _write(self, pieces: Sequence[Buffer]) -> int:
        return super()._write(pieces[:1])


class _Blocking(FrameSocket):
    """Reads by a blocking ``recv``, which neither looks first nor has a time-out."""

    def __init__(self, sock: socket.socket, limit: int) -> None:
        super().__init__(sock, limit)
        sock.setblocking(True)

    def read(self, timeout: float | None) -> Frame:
        assert timeout is None
        while not self._frames:
            self.receive()
        return self._frames.popleft()


def _linked(sock: socket.socket, spec: dict[str, Any], kind: type[FrameSocket], spin: float) -> FrameSocket:
    link = kind(sock, LIMIT, spin)
    if not spec["nodelay"]:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)  # FrameSocket has just switched it on
    return link


def _pair(carrier: str) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets; the TCP ones over loopback, where nobody else can have taken the other's place."""
    if carrier == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WORKER_SECONDS)
        near = socket.create_connection(listener.getsockname(), WORKER_SECONDS)
        while True:
            far, peer = listener.accept()
            if peer == near.getsockname():
                return near, far
            far.close()


def start_workers(stack: contextlib.ExitStack, script: str, spec: dict[str, Any]) -> tuple[list[socket.socket], Any]:
    """``world_size`` processes of ``script``, which end with their connections: these, and the process ids."""
    sockets, pids = [], []
    for _ in range(spec["world_size"]):
        near, far = _pair(spec["carrier"])
        with far:
            worker = subprocess.Popen(
                [sys.executable, script, json.dumps(spec), str(far.fileno())],
                pass_fds=(far.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        stack.callback(_end, worker)
        stack.callback(near.close)  # runs before, and ends the worker
        sockets.append(near)
        pids.append(worker.pid)
    return sockets, pids


def _end(worker: subprocess.Popen[bytes]) -> None:
    try:
        worker.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


@contextlib.contextmanager
def open_contender(given: dict[str, Any]) -> Iterator[Any]:
    """``given``: ``world_size``, and what differs from ``SPEC``."""
    from rpc_child import Contender

    spec = SPEC | given
    if spec["write"] in _COPIED_BYTES:  # on this side alone, and of what it receives nothing is that large
        frames._COPIED_BYTES = _COPIED_BYTES[spec["write"]]
    kind = _TwoSends if spec["write"] == "two" else FrameSocket
    with contextlib.ExitStack() as stack:
        sockets, pids = start_workers(stack, __file__, spec)
        links = [_linked(sock, spec, kind, spec["driver_spin"]) for sock in sockets]
        driver = Driver(links, spec["reader"], spec["driver_spin"])
        stack.callback(driver.close)
        prepare = checked(lambda payload: driver.call(b"echo", payload), spec["world_size"])
        prepare(b"")  # the workers have started when it returns
        yield Contender(prepare, pids)


def checked(send: Callable[[bytes], list[Buffer]], workers: int) -> Callable[[bytes], Callable[[], list[None]]]:
    """``prepare`` of a contender whose workers answer with the size of what they were sent, which is checked once."""
    nothing = [None] * workers

    def prepare(payload: bytes) -> Callable[[], list[None]]:
        sizes = [_SIZE.unpack(reply)[0] for reply in send(payload)]
        if sizes != [len(payload)] * workers:
            raise RuntimeError(f"the workers got {sizes} bytes; expected {len(payload)} each")

        def call() -> list[None]:
            send(payload)
            return nothing

        return call

    return prepare


# ---------------------------------------------------------------------------------------------- a worker


def size_reply(payload: Buffer) -> bytes:
    """What ``checked`` expects."""
    return _SIZE.pack(len(payload))


def serve(link: FrameSocket, answer: Callable[[bytes, Buffer], Buffer]) -> None:
    """Answer calls, of which ``answer`` is given name and payload, until the connection ends."""
    with contextlib.suppress(ConnectionError):
        while True:
            kind, number, name, payload = link.read(None)
            if kind == frames.CLOSE:
                return
            link.write(frames.REPLY, number, b"", answer(name, payload), None)


async def _serve_streams(sock: socket.socket) -> None:
    header = frames._HEADER
    reader, writer = await asyncio.open_connection(sock=sock)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            number, size, name_size, kind = header.unpack(await reader.readexactly(header.size))
            body = await reader.readexactly(name_size + size)
            if kind == frames.CLOSE:
                return
            reply = size_reply(memoryview(body)[name_size:])
            writer.write(b"".join((header.pack(number, len(reply), 0, frames.REPLY), reply)))
            await writer.drain()


def _work(spec: dict[str, Any], sock: socket.socket) -> None:
    if spec["worker"] == "asyncio":
        asyncio.run(_serve_streams(sock))
    elif spec["worker"] == "blocking":
        serve(_Blocking(sock, LIMIT), lambda _, payload: size_reply(payload))
    else:
        serve(_linked(sock, spec, FrameSocket, spec["worker_spin"]), lambda _, payload: size_reply(payload))


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))

"""Reads the direct connections of a backend: who waits, reads.

A thread that waits for a reply reads the sockets itself, so that no reply is handed from thread to thread. While nobody
waits, a thread of the reactor's own does it: it sees workers die, and completes futures that have only callbacks. It
sleeps in the kernel when nothing happens, and stands aside for ``_LINGER_SECONDS`` at a time while others read.

Callbacks of futures run in whichever thread reads, and must not block.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lightvllm.backends.base import wait_for
from lightvllm.transfer.frames import SOON, SPIN_SECONDS, Frame, FrameSocket

logger = logging.getLogger(__name__)

_LINGER_SECONDS = 0.002


@dataclass(frozen=True, eq=False)
class _Connection:
    link: FrameSocket
    fd: int
    on_frames: Callable[[collections.deque[Frame]], None]
    on_break: Callable[[str], None]


class Reactor:
    """Methods may be called from any thread."""

    def __init__(self, spin: float = SPIN_SECONDS) -> None:
        """``spin``: seconds that a waiting thread looks before it sleeps, if the last reply came soon enough."""
        self._spin = spin
        self._eager = spin > 0  # the last events that were waited for came soon
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._connections: dict[int, _Connection] = {}
        self._waiting = threading.Lock()  # held by the thread that waits and reads; others only wait
        self._reading = threading.Lock()  # held by whoever reads
        self._reader: int | None = None  # its ident
        self._aside = False  # asks the reactor's own thread to let a waiting one read
        self._waits = 0
        self._guard = threading.Lock()  # of what close() ends
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightvllm-reactor", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------ connections

    def add(
        self,
        link: FrameSocket,
        on_frames: Callable[[collections.deque[Frame]], None],
        on_break: Callable[[str], None],
    ) -> None:
        """Read ``link`` from now on. ``on_frames`` takes the frames out of what it is given; ``on_break(reason)`` is
        called at most once, in a thread of its own."""
        connection = _Connection(link, link.fileno(), on_frames, on_break)
        with self._guard:
            if self._closed.is_set():
                return
            self._connections[connection.fd] = connection
            self._epoll.register(connection.fd, select.EPOLLIN)

    def flush_when_possible(self, link: FrameSocket) -> None:
        """Go on writing what ``link.send`` could not."""
        with self._guard:
            if link.fileno() in self._connections and not self._closed.is_set():
                self._epoll.modify(link.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def remove(self, link: FrameSocket) -> None:
        """Read ``link`` no more."""
        with self._guard:
            if self._connections.pop(link.fileno(), None) is not None and not self._closed.is_set():
                self._epoll.unregister(link.fileno())

    # ---------------------------------------------------------------------------------------------- waiting

    def wait(self, future: Future[Any], timeout: float) -> None:
        """Return when ``future`` is done or ``timeout`` seconds have passed, reading meanwhile."""
        if future.done():
            return
        if self._reader == threading.get_ident():  # in a callback, of which this thread does the reading
            self._read_until(future, time.monotonic() + timeout)
            return
        if not self._waiting.acquire(blocking=False):
            wait_for(future, timeout)  # another thread waits, and reads for both
            return
        try:
            deadline = time.monotonic() + timeout
            self._waits += 1
            if not self._reading.acquire(blocking=False):
                self._aside = True
                self._ring()
                if not self._reading.acquire(timeout=max(0.0, timeout)):
                    return
            try:
                self._reader = threading.get_ident()
                self._read_until(future, deadline)
            finally:
                self._reader = None
                self._reading.release()
        finally:
            self._waiting.release()

    def _read_until(self, future: Future[Any], deadline: float) -> None:
        poll, now, hooked = self._epoll.poll, time.perf_counter, False
        while not future.done() and not self._closed.is_set():
            if not (events := poll(0)):
                began = now()
                if not (self._eager and (events := self._look(began + self._spin))):
                    if not hooked:  # whoever completes it must wake this thread, which is about to sleep
                        hooked = True
                        future.add_done_callback(self._ring_for_reader)
                        if future.done():
                            return
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        return
                    events = poll(remaining)
                    self._eager = now() - began < SOON * self._spin
            self._handle(events)
            if time.monotonic() >= deadline:
                return
        if self._closed.is_set() and not future.done():
            wait_for(future, max(0.0, deadline - time.monotonic()))

    def _look(self, until: float) -> list[tuple[int, int]]:
        """Spin for events."""
        while not (events := self._epoll.poll(0)) and time.perf_counter() < until:
            os.sched_yield()
        return events

    def _ring_for_reader(self, _: Future[Any]) -> None:
        if self._reader != threading.get_ident():
            self._ring()

    def _ring(self) -> None:
        with self._guard:
            if not self._closed.is_set():
                os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        waits = 0
        while not self._closed.is_set():
            if self._waiting.locked() or self._waits != waits or not self._reading.acquire(blocking=False):
                waits = self._waits
                self._closed.wait(_LINGER_SECONDS)
                continue
            try:
                self._reader = threading.get_ident()
                while not self._aside and not self._closed.is_set():
                    self._handle_here(self._epoll.poll())
            finally:
                self._aside, self._reader = False, None
                self._reading.release()
        with self._reading, self._guard:  # nobody is in poll(), or ringing, now
            self._epoll.close()
            os.close(self._bell)

    # ---------------------------------------------------------------------------------------------- reading

    def _handle(self, events: list[tuple[int, int]]) -> None:
        for fd, mask in events:
            if fd == self._bell:
                if not self._closed.is_set():  # then it rings for all
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(fd)
                continue
            connection = self._connections.get(fd)
            if connection is None:  # removed meanwhile
                continue
            try:
                if mask & select.EPOLLOUT:
                    with self._guard:  # flush_when_possible comes before the flush or after what follows from it
                        if fd in self._connections and connection.link.flush():
                            self._epoll.modify(fd, select.EPOLLIN)
                if mask & ~select.EPOLLOUT and (frames := connection.link.receive()):
                    connection.on_frames(frames)
            except ConnectionError as error:
                self._broke(connection, str(error))
            except BaseException as error:  # Ctrl-C in this very moment: what was read of the frame may be lost
                self._broke(connection, f"reading its reply was interrupted ({type(error).__name__})")
                raise

    def _handle_here(self, events: list[tuple[int, int]]) -> None:
        """``_handle`` in the reactor's own thread, which outlives whatever a callback raises."""
        try:
            self._handle(events)
        except BaseException:
            logger.exception("a callback raised; the connection whose frame it was for has been given up")

    def _broke(self, connection: _Connection, reason: str) -> None:
        self.remove(connection.link)
        threading.Thread(
            target=connection.on_break, args=(reason,), name="lightvllm-connection-broke", daemon=True
        ).start()

    # -------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """End the reading; who waits goes on waiting without. Idempotent."""
        with self._guard:
            if self._closed.is_set():
                return
            self._closed.set()
            os.eventfd_write(self._bell, 1)
        if self._reader != threading.get_ident():  # else it is a callback, whose thread must first come back
            self._thread.join(1.0)

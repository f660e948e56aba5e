"""A TCP proxy on loopback that loses, delays and cuts what it carries."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from typing import Literal

Way = Literal["up", "down"]
"""``up``: from the one who connected to the target."""

_libc = ctypes.CDLL(None)

WAYS: tuple[Way, Way] = ("up", "down")


class Proxy:
    """Carries connections to ``target`` ("host:port") until ``close``. What is asked of it holds for those that stand
    and those that come.

    Attributes:
        address: where it listens.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._dropped: set[Way] = set()
        self._flowing = {way: threading.Event() for way in WAYS}
        for event in self._flowing.values():
            event.set()
        self._trickles = False
        self._allowance: dict[Way, int] = {}  # bytes that may still pass before the connection is closed
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    # --------------------------------------------------------------------------------------------- what it may do

    def drop(self, *ways: Way) -> None:
        """Lose what comes from now on."""
        self._dropped |= set(ways)

    def hold(self, *ways: Way) -> None:
        """Read nothing until ``release``."""
        for way in ways:
            self._flowing[way].clear()

    def release(self) -> None:
        for event in self._flowing.values():
            event.set()

    def trickle(self) -> None:
        """Pass one byte at a time, each in a packet of its own."""
        self._trickles = True

    def truncate(self, way: Way, count: int) -> None:
        """Pass ``count`` more bytes, then close the connection."""
        self._allowance[way] = count

    def cut(self) -> None:
        """Close both ends."""
        for pair in self._standing():
            self._end(pair)

    def reset(self) -> None:
        """Close both ends with RST."""
        unspecified = bytes(16)  # a sockaddr of AF_UNSPEC: connect(2) dissolves the connection at once
        for pair in self._standing():
            for sock in pair:
                _libc.connect(sock.fileno(), unspecified, len(unspecified))

    def end_way(self, way: Way) -> None:
        """Say that nothing more will come ``way``; the other way stays open."""
        for client, target in self._standing():
            with contextlib.suppress(OSError):
                (target if way == "up" else client).shutdown(socket.SHUT_WR)

    @property
    def connections(self) -> int:
        """How many have been carried."""
        return len(self._standing())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.release()
        self.cut()
        for thread in list(self._threads):
            thread.join(10.0)
        for pair in self._standing():
            for sock in pair:
                sock.close()

    # ------------------------------------------------------------------------------------------------------- inside

    def _standing(self) -> list[tuple[socket.socket, socket.socket]]:
        with self._lock:
            return list(self._pairs)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                target = socket.create_connection(self._target, 10.0)
            except OSError:
                client.close()
                continue
            target.settimeout(None)
            for sock in (client, target):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((client, target))
                for way, source, sink in (("up", client, target), ("down", target, client)):
                    thread = threading.Thread(target=self._carry, args=(way, source, sink), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _carry(self, way: Way, source: socket.socket, sink: socket.socket) -> None:
        try:
            while True:
                self._flowing[way].wait()
                data = source.recv(1 << 16)
                self._flowing[way].wait()
                if not data:
                    if way not in self._dropped:
                        sink.shutdown(socket.SHUT_WR)
                    return
                if way in self._dropped:
                    continue
                if (allowed := self._allowance.get(way)) is not None:
                    self._allowance[way] = max(0, allowed - len(data))
                    if len(data) > allowed:
                        sink.sendall(data[:allowed])
                        self._end((source, sink))
                        return
                if self._trickles:
                    for at in range(len(data)):
                        sink.sendall(data[at : at + 1])
                else:
                    sink.sendall(data)
        except OSError:  # it was cut
            self._end((source, sink))

    @staticmethod
    def _end(pair: tuple[socket.socket, socket.socket]) -> None:
        for sock in pair:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

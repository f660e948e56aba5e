"""Opening a framed connection between two processes that already trust a third way of speaking: by a ticket.

The listening side makes a listener and a ticket, and has both told to the other side over an authenticated channel. The
other side connects and shows the ticket; the listener answers with what only a holder of the ticket can compute. One
connection is accepted and then the listener is gone: a ticket that is shown again, or late, meets a closed door.

Over TCP the connection is mutual TLS if it is given contexts for it. Without them only loopback is listened on.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import select
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lightvllm.errors import AuthError
from lightvllm.transfer.frames import SPIN_SECONDS, FrameSocket

_MAGIC = b"lightvllm/1\n"
_TICKET_BYTES = 32
_HELLO_BYTES = len(_MAGIC) + _TICKET_BYTES
_HELLO_SECONDS = 5.0  # for a peer that has connected to say who it is
_STRANGERS = 16  # connections that may be saying so at a time


class TicketListener:
    """Waits, in threads of its own, for the one connection that shows the ticket.

    Attributes:
        address: ``"unix:/path"``, or ``"host:port"``.
        ticket: 32 random bytes; a secret.
        accepted: the connection; fails with TimeoutError when nobody has come in time, or after ``close`` with
            ConnectionAbortedError.
    """

    def __init__(
        self,
        listen: str,
        limit: int,
        timeout: float,
        tls: ssl.SSLContext | None = None,
        spin: float = SPIN_SECONDS,
    ) -> None:
        """Listen for ``timeout`` seconds.

        ``listen``: ``"unix:/path"`` for a socket in a directory that only its owner can enter, or a host, on which a
        free port is taken; ``limit`` and ``spin`` as in FrameSocket. Raises OSError.
        """
        self._limit, self._spin, self._tls = limit, spin, tls
        self._deadline = time.monotonic() + timeout
        self.ticket = secrets.token_bytes(_TICKET_BYTES)
        self.accepted: Future[FrameSocket] = Future()
        self._lock = threading.Lock()
        self._claimed = False
        self._strangers: list[_Stranger] = []  # the oldest first
        self._path: Path | None = None
        if listen.startswith("unix:"):
            self._path = Path(listen.removeprefix("unix:"))
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.bind(str(self._path))
                os.chmod(self._path, 0o600)
                self._socket.listen(_STRANGERS)
            except BaseException:
                self._socket.close()
                raise
            self.address = listen
        else:
            family = socket.AF_INET6 if ":" in listen else socket.AF_INET
            both = listen == "::" and socket.has_dualstack_ipv6()  # as gRPC's servers listen there
            self._socket = socket.create_server((listen, 0), family=family, backlog=_STRANGERS, dualstack_ipv6=both)
            host = f"[{listen}]" if ":" in listen else listen
            self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._socket.setblocking(False)
        threading.Thread(target=self._accept, name="lightvllm-ticket", daemon=True).start()

    def __repr__(self) -> str:
        return f"TicketListener({self.address}, ticket hidden)"

    def close(self) -> None:
        """Stop listening, unless the connection has been accepted; idempotent."""
        self._close(ConnectionAbortedError("the listener was closed"))

    def _close(self, error: Exception) -> None:
        """Take no stranger in any more; ``error`` if none has been taken in."""
        if self._claim():
            self.accepted.set_exception(error)

    def _claim(self) -> bool:
        """True for the first who asks: nobody else decides what ``accepted`` becomes."""
        with self._lock:
            first, self._claimed = not self._claimed, True
        if first:
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes poll()
        return first

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            while not self._claimed:
                remaining = self._deadline - time.monotonic()
                if remaining <= 0:
                    self._close(TimeoutError("nobody has connected"))
                    return
                # Not accept() with a time-out: on a Unix socket that is shut down it spins until the time is up.
                if not poll.poll(1000 * min(remaining, 60.0)) or self._claimed:
                    continue
                try:
                    stranger, _ = self._socket.accept()
                except BlockingIOError:  # it has gone again
                    continue
                except OSError:  # the system has no room for a connection at the moment
                    time.sleep(0.01)
                    continue
                self._hear(_Stranger(stranger))
        finally:
            self._socket.close()

    def _hear(self, stranger: _Stranger) -> None:
        """In a thread of its own. When too many are heard, the oldest must go: the one with the ticket is quick."""
        with self._lock:
            self._strangers.append(stranger)
            oldest = self._strangers.pop(0) if len(self._strangers) > _STRANGERS else None
        if oldest is not None:
            oldest.interrupt()
        threading.Thread(target=self._welcome, args=(stranger,), name="lightvllm-ticket-hello", daemon=True).start()

    def _welcome(self, stranger: _Stranger) -> None:
        try:
            sock = stranger.secured(self._tls)
            hello = _exactly(sock, _HELLO_BYTES, time.monotonic() + _HELLO_SECONDS)
            if not hmac.compare_digest(hello, _MAGIC + self.ticket) or not self._claim():
                raise ConnectionRefusedError("no ticket, or one that has been used")
        except OSError:  # it went away, was too slow, has a certificate of another CA, …: it is told nothing
            stranger.close()
            return
        finally:
            with self._lock, contextlib.suppress(ValueError):
                self._strangers.remove(stranger)
        try:
            sock.sendall(_proof(self.ticket))
            self.accepted.set_result(FrameSocket(sock, self._limit, self._spin))
        except OSError as error:
            stranger.close()
            self.accepted.set_exception(ConnectionAbortedError(f"the peer left while it was welcomed ({error})"))


class _Stranger:
    """A connection that has not yet said who it is."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()  # of what is closed: its number may soon be another's

    def secured(self, tls: ssl.SSLContext | None) -> socket.socket:
        """The socket, after TLS's handshake if there is to be one. Raises OSError."""
        self._socket.settimeout(_HELLO_SECONDS)
        if tls is not None:
            with self._lock:
                secured = self._socket = tls.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            secured.do_handshake()
        return self._socket

    def interrupt(self) -> None:
        """Whoever reads from it finds its end."""
        with self._lock, contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS's own would first forget that it is TLS

    def close(self) -> None:
        with self._lock:
            self._socket.close()


def connect(
    address: str,
    ticket: bytes,
    limit: int,
    timeout: float,
    tls: ssl.SSLContext | None = None,
    spin: float = SPIN_SECONDS,
    server_name: str | None = None,
) -> FrameSocket:
    """Connect to a TicketListener at ``"unix:/path"`` or ``"host:port"``.

    ``server_name``: what its certificate is for, if that is not the host.

    Raises OSError (TimeoutError among it) if it cannot be reached, AuthError if what answers did not make the ticket.
    """
    deadline = time.monotonic() + timeout
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
    else:
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        sock = socket.create_connection((host, int(port)), timeout)
    try:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        if address.startswith("unix:"):
            sock.connect(address.removeprefix("unix:"))
        elif tls is not None:
            sock = tls.wrap_socket(sock, server_hostname=server_name or host)
        sock.sendall(_MAGIC + ticket)
        proof = _exactly(sock, len(_proof(ticket)), deadline)
        if not hmac.compare_digest(proof, _proof(ticket)):
            raise AuthError(f"what listens at {address} did not make the ticket")
        return FrameSocket(sock, limit, spin)
    except BaseException:
        sock.close()
        raise


def _proof(ticket: bytes) -> bytes:
    return hmac.digest(ticket, _MAGIC, hashlib.sha256)


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """``count`` bytes. Raises OSError, TimeoutError at ``deadline`` however slowly they drip."""
    data = b""
    while len(data) < count:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("the peer closed the connection before it was accepted")
        data += piece
        if time.monotonic() >= deadline and len(data) < count:
            raise TimeoutError("the peer did not say in time who it is")
    return data

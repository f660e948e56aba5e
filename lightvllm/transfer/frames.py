"""Frames over a connected stream socket: the direct carrier's and the graph edges' wire. Knows no calls and no gRPC.

A frame is a header, a name and a payload::

    sequence number (u64) | payload bytes (u64) | name bytes (u16) | kind (u8) | name | payload        little-endian

Who the peer is has been proved before a ``FrameSocket`` is made (``link.py``); what comes is nevertheless checked
against the limits before memory is allocated for it. The socket is never blocked on: whoever
has nothing to do looks a few microseconds longer whether something comes (waking a sleeping process takes longer than
most calls), then sleeps.
"""

from __future__ import annotations

import collections
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence

from lightvllm.messages import Buffer

CALL, REPLY, CLOSE, DATA = 1, 2, 3, 4
"""Kinds of frames: a call and its reply, the polite end, and a value on its way from worker to worker."""

Frame = tuple[int, int, bytes, bytes | bytearray]
"""Kind, sequence number, name, payload."""

SPIN_SECONDS = 100e-6
"""How long a reader looks before it sleeps, if the last frame came soon enough."""
SOON = 2.5
"""As a multiple of that time. It is more than 1 because two ends that both slept take longer over a round trip than two
that look: by 1 they would not find back to looking."""

_HEADER = struct.Struct("<QQHB")
_KINDS = frozenset((CALL, REPLY, CLOSE, DATA))
_NAME_BYTES = 1024  # the longest name
_BUFFER_BYTES = 128 * 2**10
_COPIED_BYTES = 32 * 2**10  # a payload up to this size is copied out of the buffer, or into one with its header
_RECORD_BYTES = 16 * 2**10  # of TLS
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class FrameSocket:
    """One end of a connection. One thread reads at a time; any thread may send.

    Every method but ``read`` and ``write`` returns at once. ConnectionError is raised, then and ever after, when the
    peer has gone or has broken the protocol; its text says which.
    """

    def __init__(self, sock: socket.socket, limit: int, spin: float = SPIN_SECONDS) -> None:
        """Takes over ``sock``. ``limit``: bytes of the largest payload; ``spin``: seconds, see ``SPIN_SECONDS``."""
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._limit = limit
        self._spin = spin
        self._eager = spin > 0  # the last frame that was waited for came soon
        self._sending = threading.Lock()
        self._unsent: collections.deque[memoryview] = collections.deque()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what has been received and not been taken
        self._large: tuple[int, int, bytes, bytearray] | None = None  # a frame that does not pass through the buffer
        self._filled = 0
        self._frames: collections.deque[Frame] = collections.deque()
        self._over: str | None = None  # why nothing more will come
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def fileno(self) -> int:
        return self._socket.fileno()

    # ----------------------------------------------------------------------------------------------- sending

    def send(self, kind: int, sequence_number: int, name: bytes, payload: Buffer) -> bool:
        """Queue a frame, and write what can be written now; False if something is left for ``flush``.

        ``payload`` may not be changed until then.
        """
        size = len(payload)
        header = _HEADER.pack(sequence_number, size, len(name), kind)
        with self._sending:
            if size <= _COPIED_BYTES:
                data = b"".join((header, name, payload))
                sent = 0
                if not self._unsent and (self._tls is None or len(data) <= _RECORD_BYTES):  # as nearly always
                    try:
                        sent = self._socket.send(data)
                    except _WOULD_BLOCK:
                        pass
                    except OSError as error:
                        raise _broken(error) from None
                    if sent == len(data):
                        return True
                self._unsent.append(memoryview(data)[sent:])
            else:
                self._unsent.append(memoryview(header + name))
                self._unsent.append(memoryview(payload).cast("B"))
            return self._flush()

    def flush(self) -> bool:
        """Write what can be written now; False if something is left."""
        with self._sending:
            return self._flush()

    def _flush(self) -> bool:
        unsent = self._unsent
        while unsent:
            sent = self._write((unsent[0], unsent[1]) if len(unsent) > 1 else (unsent[0],))
            if not sent:
                return False
            while sent:
                first = unsent[0]
                if sent < len(first):
                    unsent[0] = first[sent:]
                    break
                sent -= len(first)
                unsent.popleft()
        return True

    def _write(self, pieces: Sequence[Buffer]) -> int:
        """Bytes that could be written now of the one or two pieces."""
        try:
            if self._tls is not None:
                return self._tls.send(pieces[0][:_RECORD_BYTES])  # after WANT_WRITE the same bytes must be tried
            return self._socket.send(pieces[0]) if len(pieces) == 1 else self._socket.sendmsg(pieces)
        except _WOULD_BLOCK:
            return 0
        except OSError as error:
            raise _broken(error) from None

    def write(self, kind: int, sequence_number: int, name: bytes, payload: Buffer, timeout: float | None) -> None:
        """``send``, and wait until all is written; TimeoutError after ``timeout`` seconds (then the connection can only
        be closed)."""
        if self.send(kind, sequence_number, name, payload):
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while not self.flush():
            self._sleep(poll, deadline)

    def keep_unsent(self) -> None:
        """Copy what is left for ``flush``, so that the payloads given to ``send`` may be changed from now on."""
        with self._sending:
            self._unsent = collections.deque(memoryview(bytes(part)) for part in self._unsent)

    # --------------------------------------------------------------------------------------------- receiving

    def receive(self) -> collections.deque[Frame]:
        """What has arrived whole, in order; empty if nothing has. The caller takes the frames out of it."""
        if self._over is None:
            if self._tls is None:
                self._over = self._receive()
            else:
                with self._sending:  # OpenSSL's state is one for both directions
                    self._over = self._receive()
        if self._over is not None and not self._frames:
            raise ConnectionError(self._over)
        return self._frames

    def read(self, timeout: float | None) -> Frame:
        """The next frame. Raises TimeoutError after ``timeout`` seconds; nothing is lost then."""
        frames = self._frames
        if frames or (self._over is not None and self.receive()):
            return frames.popleft()
        began = time.perf_counter()
        if not (self._eager and self._look(began + self._spin)):
            deadline = None if timeout is None else time.monotonic() + timeout
            while not self.receive():
                self._sleep(self._poll, deadline)
            self._eager = time.perf_counter() - began < SOON * self._spin
        return frames.popleft()

    def _look(self, until: float) -> bool:
        """Spin for a frame. To ask whether there is anything costs less than to try, in TLS's case much less."""
        ready = self._poll.poll
        while not (ready(0) and self.receive()):
            if time.perf_counter() >= until:
                return False
            os.sched_yield()
        return True

    @staticmethod
    def _sleep(poll: select.poll, deadline: float | None) -> None:
        remaining = None if deadline is None else deadline - time.monotonic()
        if not poll.poll(None if remaining is None else max(0.0, 1000 * remaining)) and remaining is not None:
            raise TimeoutError

    def _receive(self) -> str | None:
        """Take in what is there, until the kernel (and TLS) has no more or a frame is complete; why it was the last."""
        while True:
            large = self._large
            into = self._view[self._end :] if large is None else memoryview(large[3])[self._filled :]
            try:
                count = self._socket.recv_into(into)
            except _WOULD_BLOCK:
                return None
            except OSError as error:
                return str(_broken(error))
            if count == 0:
                return "the connection broke (the other side closed it)"
            if self._large is not None:
                self._filled += count
                self._finish_large()
            else:
                self._end += count
                if (violation := self._parse()) is not None:
                    return violation
            if self._frames and not (self._tls is not None and self._tls.pending()):
                return None

    def _parse(self) -> str | None:
        """Make frames of what is in the buffer; what is wrong with it, if anything is."""
        buffer, start, end = self._buffer, self._start, self._end
        while end - start >= _HEADER.size:
            number, size, name_size, kind = _HEADER.unpack_from(buffer, start)
            if kind not in _KINDS or name_size > _NAME_BYTES:
                return f"it sent what is no frame (kind {kind}, a name of {name_size} bytes)"
            if size > self._limit:
                return f"it sent a frame of {size} bytes, more than max_message_bytes={self._limit}"
            body = start + _HEADER.size + name_size
            if body + size <= end:
                name = bytes(self._view[body - name_size : body])
                self._frames.append((kind, number, name, bytes(self._view[body : body + size])))
                start = body + size
                continue
            if size > _COPIED_BYTES and body <= end:
                self._large = (kind, number, bytes(self._view[body - name_size : body]), bytearray(size))
                self._filled = end - body
                self._large[3][: self._filled] = self._view[body:end]
                start = end
            break
        if start == end:
            start = end = 0
        elif start:  # an incomplete frame goes to the front, so that there is room for the rest of it
            self._view[: end - start] = bytes(self._view[start:end])
            start, end = 0, end - start
        self._start, self._end = start, end
        return None

    def _finish_large(self) -> None:
        assert self._large is not None
        if self._filled == len(self._large[3]):
            self._frames.append(self._large)
            self._large = None

    # -------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Close the connection; idempotent. Nobody may be in ``read`` or ``write``, nor call them afterwards."""
        self._socket.close()


def _broken(error: OSError) -> ConnectionError:
    return ConnectionError(f"the connection broke ({error.strerror or error})")

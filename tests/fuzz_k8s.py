"""Hostile input for a worker's listeners: what is sent, how, and what must hold of the worker meanwhile and afterwards.

Everything is made from a seeded ``random.Random``. What a stranger sends never holds both the right token and the whole
of a Session, with which he would be a driver. For ``test_k8s_fuzz.py`` and ``benchmarks/fuzz.py``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import os
import queue
import random
import re
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from k8s_servers import TESTS, WORKER, worker_command, write_token
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.reactor import Reactor
from lightvllm.backends.k8s.security import Tls, Token, split_address
from lightvllm.backends.k8s.session import WorkerSession
from lightvllm.certs import Authority
from lightvllm.errors import LightvllmError
from lightvllm.messages import CALLABLE, decode_reply, encode_call
from lightvllm.proto import worker_pb2 as pb
from lightvllm.transfer import frames, link
from lightvllm.transfer.frames import FrameSocket

MEMORY_BYTES = 32 << 20
"""That a worker may have more after the input than after a warm-up."""

LIMIT_BYTES = 1 << 20
"""The largest payload, where it can be chosen."""

_WARM_UP = 20 * 11  # inputs: every kind, several times
_HELD = 24  # connections held open meanwhile
_POOL_THREADS = 8  # by which gRPC's own pool and the server's breathe
_LOOKS = 20  # in a row that must be the same, until a process is said to be at rest
_INPUTS_PER_TICKET = 500  # a door is open for ten seconds
_ANSWER_SECONDS = 30.0  # for a listener to close a connection whose other side has
_HEALTH = "/grpc.health.v1.Health"
_PATHS = [f"/{wire.SERVICE}/{name}" for name in wire.METHODS]
_NAMES = [*_PATHS, f"{_HEALTH}/Check", f"{_HEALTH}/Watch", f"/{wire.SERVICE}/NoSuch", "/", "*", "/a/b/c"]

# ------------------------------------------------------------------------------------------------- HTTP/2 by hand

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes, size: int | None = None) -> bytes:
    """``size``: what the frame says of its payload, if it lies."""
    size = len(payload) if size is None else size
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: bytes) -> bytes:
    return _integer(len(text)) + text


def _integer(value: int) -> bytes:
    """HPACK's, with a prefix of 7 bits (RFC 7541, 5.1)."""
    if value < 127:
        return bytes([value])
    out, value = bytearray([127]), value - 127
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes(out + bytes([value]))


def header_block(path: str, metadata: list[tuple[str, str]]) -> bytes:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "worker")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *metadata]
    return b"".join(b"\x00" + _text(name.encode()) + _text(value.encode()) for name, value in fields)


def request(path: str, metadata: list[tuple[str, str]], message: bytes, stream: int = 1, last: bool = True) -> bytes:
    body = b"\x00" + struct.pack(">I", len(message)) + message
    return frame(HEADERS, END_HEADERS, stream, header_block(path, metadata)) + frame(
        DATA, END_STREAM * last, stream, body
    )


OPENING = PREFACE + frame(SETTINGS, 0, 0, b"")

# ----------------------------------------------------------------------------------------------- what is executed


class _Create:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


class Bait:
    """Calls that leave a trace if they are ever executed, or only unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def traces(self) -> list[str]:
        return sorted(path.name for path in self._folder.iterdir())

    def calls(self, name: str) -> list[tuple[str, bytes]]:
        path = str(self._folder / name)
        return [
            encode_call("touch_and_hang", (f"{path}-method", 0.0), None),
            encode_call("echo", (_Create(f"{path}-pickle"),), None),
            encode_call(lambda worker, path: os.mkdir(path), (f"{path}-callable",), None),
        ]

    def message(self, path: str, rng: random.Random) -> bytes:
        """A request of the method ``path`` that would do something."""
        method, payload = rng.choice(self.calls(f"{rng.getrandbits(32):x}"))
        name = path.rpartition("/")[2]
        if name == "InitWorker":
            message = pb.InitWorkerRequest(worker_class=WORKER, carrier=pb.UNARY)
        elif name == "Session":
            message = pb.Call(sequence_number=1, method=method, payload=payload)
        elif name in ("ExecuteModel", "ExecuteModelStream"):
            message = pb.ExecuteModelRequest(scheduler_output=payload)
        else:
            message = pb.CollectiveRpcRequest(method=method, payload=payload)
        encoded: bytes = message.SerializeToString()
        return encoded


# ----------------------------------------------------------------------------------------------- what strangers send


@dataclass
class Stranger:
    """Makes inputs for a gRPC listener. ``served``: a driver has the worker, so that even the right token with a whole
    Session must be refused."""

    rng: random.Random
    bait: Bait
    token: Token
    served: bool

    def _metadata(self, token: str) -> list[tuple[str, str]]:
        right, wrong = self.token.metadata()[0], Token.new().metadata()[0]
        kept = {
            "right": [right],
            "none": [],
            "wrong": [wrong],
            "two": [right, wrong],
            "twice": [right, right],
            "first": [wrong, right],
            "bare": [("authorization", self.token.reveal())],
            "case": [("authorization", right[1].lower())],
            "cut": [("authorization", right[1][:-1])],
        }[token]
        return [(wire.DRIVER_KEY, f"{self.rng.getrandbits(128):032x}"), *kept]

    def _unauthenticated(self, *tokens: str) -> bytes:
        path = self.rng.choice(_NAMES)
        token = self.rng.choice(tokens or ("none", "wrong", "two", "twice", "first", "bare", "case", "cut"))
        return request(path, self._metadata(token), self.bait.message(path, self.rng))

    def random_bytes(self) -> bytes:
        return self.rng.randbytes(self.rng.choice([0, 1, 3, 9, 24, 100, 4096]))

    def preface_then_garbage(self) -> bytes:
        return PREFACE + self.rng.randbytes(self.rng.randrange(2000))

    def random_frames(self) -> bytes:
        rng = self.rng
        made = []
        for _ in range(rng.randrange(1, 20)):
            payload = rng.randbytes(rng.choice([0, 1, 4, 5, 6, 8, 50, 500]))
            size = rng.choice([None, None, None, 0, 1, len(payload) + 1, 2**14, 2**24 - 1])
            stream = rng.choice([0, 1, 2, 3, 5, 2**31 - 1, 2**32 - 1])
            made.append(frame(rng.randrange(12), rng.randrange(256), stream, payload, size))
        return OPENING + b"".join(made)

    def truncated(self) -> bytes:
        # gRPC takes what had come of a header block for the whole when the connection ends, so that the right token
        # with another behind it may become the right token alone.
        whole = OPENING + self._unauthenticated("none", "wrong", "bare", "case", "cut")
        return whole[: self.rng.randrange(len(whole))]

    def bits_flipped(self) -> bytes:
        data = bytearray(OPENING + request(self.rng.choice(_PATHS), self._metadata("none"), self.rng.randbytes(50)))
        for _ in range(self.rng.randrange(1, 9)):
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        return bytes(data)

    def oversized(self) -> bytes:
        rng = self.rng
        path, metadata = rng.choice(_NAMES), self._metadata("wrong")
        headers = frame(HEADERS, END_HEADERS, 1, header_block(path, metadata))
        name = b"\x00" + _text(b"x")
        return OPENING + rng.choice(
            [
                headers + frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + rng.randbytes(100)),
                headers + frame(DATA, 0, 1, rng.randbytes(100), 2**24 - 1),
                frame(HEADERS, END_HEADERS, 1, name + _integer(2**60) + rng.randbytes(10)),
                frame(HEADERS, END_HEADERS, 1, b"\x00" + _integer(2**60)),
                frame(HEADERS, END_HEADERS, 1, header_block(path, [*metadata, ("content-length", str(2**60))])),
                frame(HEADERS, END_HEADERS, 1, header_block(path, [*metadata, ("grpc-timeout", "99999999H")])),
                frame(HEADERS, END_HEADERS, 1, header_block(path, [*metadata, ("x", "y" * 16000)])),
                frame(HEADERS, 0, 1, header_block(path, metadata)) + 40 * frame(CONTINUATION, 0, 1, 100 * name),
                frame(HEADERS, END_HEADERS, 1, b"\x3f" + b"\xff" * 8 + b"\x0f"),  # a dynamic table of 2^60 bytes
                frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", n, 2**32 - 1) for n in range(1, 7))),
                frame(SETTINGS, 0, 0, struct.pack(">HI", 1, 0xFFFFFFFF)) + headers,
                frame(WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
                headers + frame(DATA, 0, 1, bytes(16384)) * 3,
            ]
        )

    def floods(self) -> bytes:
        rng = self.rng
        count = rng.randrange(20, 60)
        return OPENING + rng.choice(
            [
                self.rapid_reset(count)[len(OPENING) :],
                b"".join(request(rng.choice(_NAMES), self._metadata("wrong"), b"", 2 * n + 1) for n in range(count)),
                frame(PING, 0, 0, bytes(8)) * count,
                frame(SETTINGS, 0, 0, b"") * count,
                frame(DATA, 0, 1, b"") * count,
            ]
        )

    def rapid_reset(self, count: int) -> bytes:
        return OPENING + b"".join(
            frame(HEADERS, END_HEADERS, 2 * n + 1, header_block(self.rng.choice(_PATHS), []))
            + frame(RESET, 0, 2 * n + 1, struct.pack(">I", 8))
            for n in range(count)
        )

    def without_the_token(self) -> bytes:
        return OPENING + self._unauthenticated()

    def health_unfinished(self) -> bytes:
        name = self.rng.choice(["Check", "Watch", "NoSuch"])
        return OPENING + frame(HEADERS, END_HEADERS, 1, header_block(f"{_HEALTH}/{name}", []))

    def wrong_order(self) -> bytes:
        """The right token, but nothing in which order it could be used."""
        paths = _PATHS if self.served else [path for path in _PATHS if not path.endswith("/Session")]
        metadata = self._metadata("right")
        return OPENING + b"".join(
            request(path, metadata, self.bait.message(path, self.rng), 2 * n + 1, self.rng.random() < 0.7)
            for n, path in enumerate(self.rng.choices(paths, k=self.rng.randrange(1, 4)))
        )

    def replay(self) -> bytes:
        """A conversation that would be a driver's, if the worker were free; else a part of one without its token."""
        metadata = self._metadata("right" if self.served else "none")
        order = [f"/{wire.SERVICE}/{name}" for name in ("Session", "OpenDirect", "InitWorker", "CollectiveRpc")]
        return OPENING + b"".join(
            request(path, metadata, self.bait.message(path, self.rng), 2 * n + 1, n > 0) for n, path in enumerate(order)
        )

    KINDS = (
        "random_bytes",
        "preface_then_garbage",
        "random_frames",
        "truncated",
        "bits_flipped",
        "oversized",
        "floods",
        "without_the_token",
        "health_unfinished",
        "wrong_order",
        "replay",
    )


def hello(rng: random.Random, ticket: bytes, used: list[bytes]) -> bytes:
    """What a stranger says to a listener that waits for ``ticket``; he has those that were used."""
    magic = b"lightvllm/1\n"
    near = bytearray(ticket)
    near[rng.randrange(len(near))] ^= 1 << rng.randrange(8)
    call = struct.pack("<QQHB", 1, 2**60, 4, frames.CALL) + b"echo"
    return rng.choice(
        [
            b"",
            rng.randbytes(rng.randrange(200)),
            magic,
            magic + rng.randbytes(32),
            magic + bytes(near),
            magic + bytes(near) + call,
            magic + ticket[: rng.randrange(32)],
            magic[: rng.randrange(12)],
            ticket + magic,
            call + magic + ticket,
            magic + (rng.choice(used) if used else rng.randbytes(32)),
            OPENING,
            b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(500),
        ]
    )


# ---------------------------------------------------------------------------------------------------- how it is sent


@dataclass(frozen=True)
class Door:
    """A listener. ``tls``: what a stranger who gets through the handshake connects with."""

    address: str
    tls: ssl.SSLContext | None = None

    def connect(self, secure: bool = True) -> socket.socket:
        if self.address.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_ANSWER_SECONDS)
            try:
                wait_until(
                    lambda: sock.connect_ex(self.address.removeprefix("unix:")) != errno.EAGAIN, "a full backlog"
                )
                sock.getpeername()
            except BaseException:
                sock.close()
                raise
            return sock
        sock = socket.create_connection(split_address(self.address), _ANSWER_SECONDS)
        if self.tls is None or not secure:
            return sock
        try:
            return self.tls.wrap_socket(sock, server_hostname="127.0.0.1")
        except BaseException:
            sock.close()
            raise


def deliver(door: Door, data: bytes, how: str, secure: bool = True) -> bytes:
    """Send ``data``, be done, and wait until the other side has closed; what it has answered.

    ``how``: ``"whole"``, ``"split"`` in two, ``"drip"`` byte by byte, ``"drop"`` without waiting, ``"reset"`` likewise
    with RST. AssertionError, with the input, if the connection is not closed in time.
    """
    answer = b""
    try:
        sock = door.connect(secure)
    except OSError:  # the handshake was refused, or the listener's backlog is full
        return answer
    with sock:
        try:
            if how == "drip":
                for at in range(len(data)):
                    sock.sendall(data[at : at + 1])
            elif how == "split":
                sock.sendall(data[: len(data) // 2])
                sock.sendall(data[len(data) // 2 :])
            else:
                sock.sendall(data)
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if how in ("drop", "reset"):
                return answer
            socket.socket.shutdown(sock, socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                answer += piece
        except TimeoutError:
            raise AssertionError(f"not closed within {_ANSWER_SECONDS:g} s after ({how}): {shown(data)}") from None
        except OSError:  # it has closed before it had read all
            pass
    return answer


def shown(data: bytes) -> str:
    """An input, for a message. What is cut off here is made again from the seed."""
    most = 4096
    return data[:most].hex() + (f"… ({len(data)} bytes)" if len(data) > most else "")


MANNERS = ("whole", "whole", "whole", "split", "drip", "drop", "reset")


def _manner(rng: random.Random, data: bytes) -> str:
    how = rng.choice(MANNERS)
    return "whole" if how == "drip" and len(data) > 600 else how


@dataclass
class Counts:
    """Inputs by kind."""

    by_kind: collections.Counter[str] = field(default_factory=collections.Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, count: int = 1) -> None:
        with self._lock:
            self.by_kind[kind] += count

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def fuzz_grpc(
    door: Door, count: int, seed: int, bait: Bait, token: Token, counts: Counts, *, served: bool, label: str
) -> None:
    """``count`` inputs of every kind in turn, from several threads."""

    def one(number: int) -> None:
        rng = random.Random(f"{seed}-{label}-{number}")
        stranger = Stranger(rng, bait, token, served)
        kind = Stranger.KINDS[number % len(Stranger.KINDS)]
        data: bytes = getattr(stranger, kind)()
        deliver(door, data, _manner(rng, data))
        counts.add(f"{label}: {kind}")

    in_threads(one, count)


def fuzz_handshake(door: Door, strangers: list[ssl.SSLContext], count: int, seed: int, counts: Counts) -> None:
    """What comes before TLS is done: plaintext, broken and truncated hellos, certificates that nobody asked for."""
    recorded = client_hello(door.tls)

    def one(number: int) -> None:
        rng = random.Random(f"{seed}-handshake-{number}")
        kind = ("plaintext", "mutated_hello", "truncated_hello", "replayed_hello", "stranger_certificate")[number % 5]
        if kind == "stranger_certificate":
            answer = deliver(Door(door.address, strangers[number // 5 % len(strangers)]), OPENING, "whole")
            assert not answer, f"a stranger's certificate was let in: {answer.hex()}"
        else:
            data = bytearray(recorded)
            if kind == "plaintext":
                data = bytearray(OPENING + rng.randbytes(rng.randrange(300)))
            elif kind == "mutated_hello":
                for _ in range(rng.randrange(1, 9)):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == "truncated_hello":
                del data[rng.randrange(len(data)) :]
            else:
                data += rng.randbytes(rng.randrange(300))
            deliver(door, bytes(data), _manner(rng, data), secure=False)
        counts.add(f"TLS handshake: {kind}")

    in_threads(one, count)


def client_hello(tls: ssl.SSLContext | None) -> bytes:
    assert tls is not None
    outgoing = ssl.MemoryBIO()
    client = tls.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def fuzz_ticket(
    door: Door, ticket: bytes, used: list[bytes], count: int, seed: int, counts: Counts, label: str
) -> None:
    def one(number: int) -> None:
        rng = random.Random(f"{seed}-{label}-{number}")
        data = hello(rng, ticket, used)
        answer = deliver(door, data, _manner(rng, data))
        assert not answer, f"the stranger was told {answer.hex()} for {data.hex()}"
        counts.add(label)

    in_threads(one, count)


def in_threads(one: Callable[[int], None], count: int, threads: int = 4) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(one, range(count)):
            pass


# ------------------------------------------------------------------------------------ what is sent after authentication


def session_messages(rng: random.Random, limit: int) -> list[bytes]:
    """Messages of a Session whose sender has gone mad."""

    def piece() -> bytes:
        payload = rng.randbytes(rng.choice([0, 1, 10, 1000]))
        total = rng.choice([0, 0, 1, len(payload), 2 * len(payload), limit, limit + 1, 2**60, 2**64 - 1])
        call = pb.Call(
            sequence_number=rng.choice([0, 0, 1, 1, 2, 7, 2**64 - 1]),
            method=rng.choice(["", "echo", CALLABLE, "__init__", "no_such", "x" * 1000]),
            payload=payload,
            total_bytes=total,
        )
        encoded: bytes = call.SerializeToString()
        return encoded

    messages = []
    for _ in range(rng.randrange(1, 8)):
        message = piece()
        if rng.random() < 0.3:
            message = rng.choice(
                [rng.randbytes(rng.randrange(60)), message[: rng.randrange(len(message) + 1)], message + b"\xff"]
            )
        messages.append(message)
    return messages


def frame_bytes(rng: random.Random, limit: int) -> bytes:
    """Frames of a direct connection whose sender has gone mad."""
    out = b""
    for _ in range(rng.randrange(1, 8)):
        name, payload = rng.randbytes(rng.choice([0, 4, 100, 2000])), rng.randbytes(rng.choice([0, 1, 100, 40000]))
        size = rng.choice([len(payload)] * 4 + [limit, limit + 1, 2**60, 2**64 - 1])
        kind = rng.choice([1, 2, 3, 4, 1, 2, 0, 5, 255])
        out += struct.pack("<QQHB", rng.getrandbits(64), size, len(name), kind) + name + payload
    return out[: rng.randrange(len(out))] if rng.random() < 0.4 else out


def fuzz_session_decoding(count: int, seed: int, counts: Counts, limit: int = LIMIT_BYTES) -> None:
    """``wire.whole_calls``: calls within the limits, or a ConnectionError."""
    for number in range(count):
        rng = random.Random(f"{seed}-stream-{number}")
        messages = session_messages(rng, limit)
        try:
            for sequence, _, payload in wire.whole_calls(messages, limit):
                assert sequence, [message.hex() for message in messages]
                assert len(payload) <= limit, [message.hex() for message in messages]
        except ConnectionError:
            pass
        except Exception as error:
            raise AssertionError(f"{error!r} for {[message.hex() for message in messages]}") from error
        counts.add("Session messages, decoded")


def fuzz_frames(count: int, seed: int, counts: Counts, limit: int = LIMIT_BYTES) -> None:
    """``FrameSocket``: frames within the limits, then a ConnectionError."""
    for number in range(count):
        rng = random.Random(f"{seed}-frames-{number}")
        data = frame_bytes(rng, limit)
        ours, theirs = socket.socketpair()
        link = FrameSocket(theirs, limit, 0.0)
        with ours:
            ours.setblocking(False)
            unsent: memoryview | None = memoryview(data)
            got = 0
            try:
                while True:
                    if unsent:
                        with contextlib.suppress(BlockingIOError, ConnectionError):
                            unsent = unsent[ours.send(unsent) :]
                    if unsent is not None and not unsent:
                        ours.shutdown(socket.SHUT_WR)
                        unsent = None
                    arrived = link.receive()
                    while arrived:
                        got += len(arrived.popleft()[3])
            except ConnectionError:
                pass
            except Exception as error:
                raise AssertionError(f"{error!r} for {shown(data)}") from error
            finally:
                link.close()
        assert got <= len(data), shown(data)
        counts.add("frames, decoded")


# ------------------------------------------------------------------------------------------------------ who is served


class Driver:
    """A proper driver of one worker."""

    def __init__(self, target: str, token: Token, tls: Tls | None, transport: Any = "grpc") -> None:
        self._reactor = Reactor() if transport != "grpc" else None
        self.broken: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.session = WorkerSession(
            target,
            target,
            token,
            tls,
            max_message_bytes=LIMIT_BYTES,
            on_break=self.broken.put,
            transport=transport,
            reactor=self._reactor,
        )
        try:
            self.session.open(time.monotonic() + LIMIT, lambda _: None)
            self.pid = self.session.init_worker(WORKER, {}, LIMIT).pid
        except BaseException:
            self.abort()
            raise

    def ask(self, method: str, *args: Any) -> Any:
        name, payload = encode_call(method, args, None)
        return decode_reply(name, self.session.call(name, payload).result(LIMIT))

    def close(self) -> None:
        """Returns when the worker has ended."""
        self.session.close()
        self.session.ended.wait(LIMIT)
        self.abort()
        wait_until(lambda: gone(self.pid), "the worker to end with its driver")

    def abort(self) -> None:
        self.session.abort()
        if self._reactor is not None:
            self._reactor.close()


@contextlib.contextmanager
def being_served(driver: Driver) -> Iterator[None]:
    """``driver`` makes calls all the while, and all are answered in order."""
    stop, errors, count = threading.Event(), [], 0

    def run() -> None:
        nonlocal count
        try:
            while not stop.is_set():
                assert driver.ask("append", count) == count + 1
                count += 1
        except (AssertionError, LightvllmError) as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LIMIT)
    assert not errors, errors
    assert count > 0
    assert driver.ask("read_log") == (list(range(count)), 0)
    assert driver.broken.empty()


@contextlib.contextmanager
def held_open(door: Door, count: int) -> Iterator[None]:
    """Connections that have begun to say something and say no more."""
    socks = []
    try:
        for number in range(count):
            sock = door.connect(secure=number % 2 == 0)
            socks.append(sock)
            sock.sendall((OPENING + frame(HEADERS, END_HEADERS, 1, header_block(f"{_HEALTH}/Check", [])))[: 5 * number])
        yield
    finally:
        for sock in socks:
            sock.close()


@dataclass(frozen=True)
class Figures:
    memory: int
    threads: int
    descriptors: int


class Watched:
    """A process whose size must not grow."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.before = self._at_rest(lambda _: True)

    def check(self) -> Figures:
        """Its figures when it has come to rest; AssertionError if they are not what they were."""
        before = self.before
        now = self._at_rest(
            lambda now: now.threads <= before.threads + _POOL_THREADS and now.descriptors <= before.descriptors
        )
        assert now.memory - before.memory <= MEMORY_BYTES, f"memory grew: {before} to {now}"
        return now

    def _at_rest(self, wanted: Callable[[Figures], bool]) -> Figures:
        seen: list[Figures] = []

        def look() -> Figures | None:
            with self.process.oneshot():
                now = Figures(self.process.memory_info().rss, self.process.num_threads(), self.process.num_fds())
            seen.append(now)
            same = {(some.threads, some.descriptors) for some in seen[-_LOOKS:]}
            return now if len(seen) >= _LOOKS and len(same) == 1 and wanted(now) else None

        try:
            found: Figures = wait_until(look, "the process to be at rest")
        except AssertionError:
            raise AssertionError(f"process {self.process.pid} is not as it was: {seen[0]}, now {seen[-1]}") from None
        return found


# ------------------------------------------------------------------------------------------------------------- a siege


@dataclass(frozen=True)
class Server:
    """A worker server. ``pid`` is its process, ``others`` those that must not suffer either (its supervisor)."""

    label: str
    door: Door
    token: Token
    tls: Tls | None
    pid: int
    others: tuple[int, ...] = ()

    def driver(self, transport: Any = "grpc") -> Driver:
        return Driver(self.door.address, self.token, self.tls, transport)


@dataclass(frozen=True)
class Siege:
    """What a server was before and after."""

    label: str
    seconds: float
    inputs: int
    before: Figures
    after: Figures

    def __str__(self) -> str:
        change = (self.after.memory - self.before.memory) / 2**20
        return (
            f"{self.label}: {self.inputs} inputs in {self.seconds:.1f} s; memory {self.before.memory / 2**20:.1f} MiB "
            f"{change:+.1f}, threads {self.before.threads} → {self.after.threads}, descriptors "
            f"{self.before.descriptors} → {self.after.descriptors}"
        )


def besiege(server: Server, count: int, seed: int, bait: Bait, counts: Counts, driver: Driver | None = None) -> Siege:
    """``count`` inputs from strangers, while others hold connections open; ``driver`` is served meanwhile if given."""
    state = "served" if driver else "idle"
    label = f"{server.label}, {state}"
    send = functools.partial(
        fuzz_grpc, server.door, bait=bait, token=server.token, served=driver is not None, label=label
    )
    with being_served(driver) if driver else contextlib.nullcontext():
        with held_open(server.door, _HELD):
            send(_WARM_UP, seed=-seed - 1, counts=Counts())
        watched, others = Watched(server.pid), [Watched(pid) for pid in server.others]
        started, before = time.monotonic(), counts.total
        with held_open(server.door, _HELD):
            send(count, seed=seed, counts=counts)
        seconds = time.monotonic() - started
        after = watched.check()
        for other in others:
            other.check()
    assert bait.traces() == []
    return Siege(label, seconds, counts.total - before, watched.before, after)


@contextlib.contextmanager
def served_by_command(
    label: str, folder: Path, tls: bool
) -> Iterator[tuple[Callable[[], Server], list[ssl.SSLContext]]]:
    """``lightvllm worker`` on loopback: what gives the server that runs at present, and contexts of those who must not
    get in."""
    token_file = write_token(folder)
    token = Token.read(token_file)
    options: tuple[str, ...] = ()
    ours: Tls | None = None
    strangers: list[ssl.SSLContext] = []
    if tls:
        group, other = Authority.new(), Authority.new()
        worker = _files(folder, "worker", group, group.issue("worker", "server", ["127.0.0.1"]))
        ours = _files(folder, "driver", group, group.issue("driver", "client"))
        theirs = [
            _files(folder, "wrong-ca", group, other.issue("driver", "client")),
            _files(folder, "wrong-use", group, group.issue("worker", "server", ["127.0.0.1"])),
        ]
        nobody = ssl.create_default_context(cafile=ours.ca)
        strangers = [nobody, *(some.context(server=False) for some in theirs)]
        options = ("--tls-cert", worker.cert, "--tls-key", worker.key, "--tls-ca", worker.ca)
        for context in strangers:
            context.set_alpn_protocols(["h2"])
    with worker_command("--listen", "127.0.0.1:0", "--token-file", token_file, *options) as command:
        address = command.address()
        context = None
        if ours is not None:
            context = ours.context(server=False)
            context.set_alpn_protocols(["h2"])

        def pid() -> int | None:
            line = [line for line in list(command.lines) if re.search("listening|ready", line)][-1]
            (found,) = re.findall(r"\(process (\d+)\)", line)
            return None if gone(int(found)) else int(found)

        def server() -> Server:
            running = wait_until(pid, "the supervisor to have a server process")
            return Server(label, Door(address, context), token, ours, running, (command.process.pid,))

        yield server, strangers


def _files(folder: Path, name: str, authority: Authority, certificate: Any) -> Tls:
    paths = [folder / f"{name}-{kind}.pem" for kind in ("cert", "key", "ca")]
    for path, content in zip(paths, (certificate.cert, certificate.key, authority.cert), strict=True):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return Tls(*map(str, paths))


@contextlib.contextmanager
def served_locally(label: str) -> Iterator[Server]:
    """A worker process on a Unix socket, as a driver starts one."""
    token = Token.new()
    with tempfile.TemporaryDirectory(prefix="lv-", dir="/tmp") as folder:
        env = {**os.environ, "PYTHONPATH": TESTS}
        process = WorkerProcess(f"unix:{folder}/0.sock", token, max_message_bytes=LIMIT_BYTES, env=env)
        try:
            yield Server(label, Door(process.wait_listening(LIMIT)), token, None, process.pid)
        finally:
            process.end(time.monotonic())


class BareDriver:
    """A driver by hand, up to its ticket and beyond."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._channel = wire.open_channel(server.door.address, server.tls, LIMIT_BYTES)
        self._metadata = (*server.token.metadata(), (wire.DRIVER_KEY, os.urandom(16).hex()))
        self.messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stubs = {name: wire.stub(self._channel, name) for name in ("Session", "OpenDirect", "InitWorker")}
        wait_until(self._take, "the worker to be taken")

    def _take(self) -> bool:
        """A worker that has just been left by another may need a moment."""
        self.stream = self._stubs["Session"](iter(self.messages.get, None), metadata=self._metadata)
        try:
            return wire.ACCEPTED in self.stream.initial_metadata()
        except grpc.RpcError:
            return False

    def open_direct(self) -> tuple[Door, bytes]:
        """The ticket's door, and the ticket."""
        reply = self._stubs["OpenDirect"](pb.OpenDirectRequest(), metadata=self._metadata, timeout=LIMIT)
        address = reply.address
        if not address.startswith("unix:"):
            address = f"{split_address(self._server.door.address)[0]}:{address}"
        tls = None if self._server.tls is None else self._server.tls.context(server=False)
        return Door(address, tls), reply.ticket

    def init_worker(self, carrier: Any) -> None:
        request = pb.InitWorkerRequest(worker_class=WORKER, carrier=carrier)
        assert not self._stubs["InitWorker"](request, metadata=self._metadata, timeout=LIMIT).failure

    def connect(self, door: Door, ticket: bytes) -> FrameSocket:
        return link.connect(door.address, ticket, LIMIT_BYTES, LIMIT, door.tls)

    def connect_socket(self, door: Door, ticket: bytes) -> socket.socket:
        """The direct connection as a plain socket, for what is no frame."""
        sock = door.connect()
        sock.sendall(b"lightvllm/1\n" + ticket)
        assert len(sock.recv(32, socket.MSG_WAITALL if door.tls is None else 0)) == 32
        return sock

    def leave(self) -> None:
        self.messages.put(None)
        self.stream.cancel()
        self._channel.close()


def besiege_ticket(server: Server, count: int, seed: int, counts: Counts) -> None:
    """Strangers at the door that is open for one with a ticket; then he comes, and is let in, once."""
    driver = BareDriver(server)
    watched = Watched(server.pid)
    used: list[bytes] = []
    try:
        for part in range(-(-count // _INPUTS_PER_TICKET)):
            door, ticket = driver.open_direct()
            with held_open(door, _HELD):
                some = min(_INPUTS_PER_TICKET, count - part * _INPUTS_PER_TICKET)
                fuzz_ticket(door, ticket, used, some, seed + part, counts, f"{server.label}: ticket")
                if part + 1 < -(-count // _INPUTS_PER_TICKET):
                    used.append(ticket)
                    continue
                direct = driver.connect(door, ticket)
        driver.init_worker(pb.DIRECT)
        for _ in range(20):  # the door is shut, and the ticket used up
            with contextlib.suppress(OSError):
                driver.connect(door, ticket).close()
                raise AssertionError("the ticket was good a second time")
            counts.add(f"{server.label}: ticket, replayed")
        name, payload = encode_call("echo", (7,), None)
        direct.write(frames.CALL, 1, name.encode(), payload, LIMIT)
        kind, number, _, reply = direct.read(LIMIT)
        assert (kind, number, decode_reply(name, reply)) == (frames.REPLY, 1, 7)
        watched.before = dataclasses.replace(watched.before, descriptors=watched.before.descriptors + 1)  # direct's own
        watched.check()
        direct.write(frames.CLOSE, 0, b"", b"", LIMIT)
        direct.close()
    finally:
        driver.leave()


def garbage_to_direct(server: Server, seed: int, counts: Counts) -> None:
    """One who was let in, and sends what is none of a driver's: his worker ends, and nothing else does."""
    rng = random.Random(f"{seed}-direct")
    driver = BareDriver(server)
    try:
        door, ticket = driver.open_direct()
        with driver.connect_socket(door, ticket) as sock:
            driver.init_worker(pb.DIRECT)
            data = b"".join(frame_bytes(rng, LIMIT_BYTES) for _ in range(5))
            with contextlib.suppress(OSError):  # it may have had enough before it has read all
                sock.sendall(data)
                socket.socket.shutdown(sock, socket.SHUT_WR)  # what came may be the beginning of a frame
            wait_until(lambda: gone(server.pid), f"the worker to end after {shown(data)}")
    finally:
        driver.leave()
    counts.add(f"{server.label}: direct connection")


def garbage_to_session(server: Server, seed: int, counts: Counts) -> None:
    """Likewise by the stream."""
    rng = random.Random(f"{seed}-session")
    driver = BareDriver(server)
    try:
        driver.init_worker(pb.STREAM)
        messages = [message for _ in range(5) for message in session_messages(rng, LIMIT_BYTES)]
        for message in (*messages, b"\xff"):
            driver.messages.put(message)
        wait_until(lambda: gone(server.pid), f"the worker to end after {[message.hex() for message in messages]}")
    finally:
        driver.leave()
    counts.add(f"{server.label}: Session stream")


def serves(server: Server, transport: Any = "auto") -> None:
    """A proper driver is served."""
    driver = server.driver(transport)
    assert driver.ask("echo", "proper") == "proper"
    driver.close()

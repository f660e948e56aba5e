"""Frames over sockets: whatever the sizes and however the bytes arrive, they come out as they went in."""

from __future__ import annotations

import random
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT

from lightvllm.transfer.frames import CALL, CLOSE, DATA, REPLY, FrameSocket

MIB = 1 << 20
Ends = tuple[FrameSocket, FrameSocket]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    return client, server


def tls_pair(folder: Path) -> tuple[socket.socket, socket.socket]:
    certs = pytest.importorskip("lightvllm.certs", reason="cryptography is not installed")
    authority = certs.Authority.new(days=1)
    contexts = []
    for purpose, protocol in (("client", ssl.PROTOCOL_TLS_CLIENT), ("server", ssl.PROTOCOL_TLS_SERVER)):
        pair = authority.issue("peer", purpose, ["127.0.0.1"], days=1)
        (folder / purpose).write_bytes(pair.key + pair.cert)
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(folder / purpose)
        context.load_verify_locations(cadata=authority.cert.decode())
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    client, server = tcp_pair()
    wrapped: list[socket.socket] = []
    thread = threading.Thread(target=lambda: wrapped.append(contexts[1].wrap_socket(server, server_side=True)))
    thread.start()
    client = contexts[0].wrap_socket(client, server_hostname="127.0.0.1")
    thread.join(LIMIT)
    return client, wrapped[0]


@pytest.fixture(params=["unix", "tcp", "tls"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ends]:
    pair = {"unix": socket.socketpair, "tcp": tcp_pair, "tls": lambda: tls_pair(tmp_path)}[request.param]()
    made = FrameSocket(pair[0], 64 * MIB), FrameSocket(pair[1], 64 * MIB)
    yield made
    for end in made:
        end.close()


def in_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_frames_of_every_size_arrive_in_order(ends: Ends) -> None:
    sizes = [0, 1, 1023, 32 * 1024 - 1, 32 * 1024, 32 * 1024 + 1, 100_000, 128 * 1024, 131_073, 3 * MIB + 7, 0, 5]
    blob = random.Random(0).randbytes(max(sizes))
    sent = [(CALL, number, f"m{number}".encode(), blob[:size]) for number, size in enumerate(sizes)]
    writer = in_thread(lambda: [ends[0].write(*frame, LIMIT) for frame in sent])
    assert [ends[1].read(LIMIT) for _ in sent] == sent
    writer.join(LIMIT)


def test_many_frames_in_one_go_are_all_found(ends: Ends) -> None:
    for number in range(300):
        ends[0].send(REPLY, number, b"", b"x" * (number % 7))
    writer = in_thread(lambda: ends[0].write(REPLY, 300, b"", b"", LIMIT))
    assert [ends[1].read(LIMIT)[1] for _ in range(301)] == list(range(301))
    writer.join(LIMIT)


def test_both_directions_at_once_do_not_hold_each_other_up(ends: Ends) -> None:
    """Each side writes more than the buffers between them hold before it reads: what cannot be written waits."""
    blob = bytes(24 * MIB)
    for number, end in enumerate(ends):
        end.send(DATA, number, b"", blob)
    received: dict[int, int] = {}
    while len(received) < 2:
        for end in ends:
            end.flush()
            frames = end.receive()
            while frames:
                _, number, _, payload = frames.popleft()
                received[number] = len(payload)
    assert received == {0: len(blob), 1: len(blob)}


def test_a_reader_waits_no_longer_than_it_was_told(ends: Ends) -> None:
    with pytest.raises(TimeoutError):
        ends[0].read(0.02)
    ends[1].write(CALL, 1, b"late", b"", LIMIT)
    assert ends[0].read(LIMIT) == (CALL, 1, b"late", b"")


def test_a_writer_waits_no_longer_than_it_was_told() -> None:
    left, right = socket.socketpair()
    end = FrameSocket(left, 64 * MIB)
    with right, pytest.raises(TimeoutError):
        end.write(CALL, 1, b"", bytes(16 * MIB), 0.05)
    end.close()


def test_what_was_sent_before_the_end_is_still_read(ends: Ends) -> None:
    ends[0].write(CLOSE, 0, b"", b"", LIMIT)
    ends[0].close()
    assert ends[1].read(LIMIT)[0] == CLOSE
    for _ in range(2):
        with pytest.raises(ConnectionError, match="the other side closed it"):
            ends[1].read(LIMIT)


def test_sending_to_one_that_has_gone_is_an_error(ends: Ends) -> None:
    ends[1].close()

    def send_much() -> None:
        for _ in range(1000):
            ends[0].write(CALL, 1, b"", bytes(100_000), LIMIT)

    with pytest.raises(ConnectionError, match="broke"):
        send_much()


def raw(number: int, size: int, name: int, kind: int) -> bytes:
    return struct.pack("<QQHB", number, size, name, kind)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (raw(1, 0, 0, 99), "no frame"),
        (raw(1, 0, 0, 0), "no frame"),
        (raw(1, 0, 5000, CALL), "a name of 5000 bytes"),
        (raw(1, 2**60, 0, CALL), "more than max_message_bytes=1000"),
        (raw(1, 1001, 1, CALL) + b"x", "more than max_message_bytes=1000"),
    ],
)
def test_what_breaks_the_protocol_is_refused_before_memory_is_taken(data: bytes, message: str) -> None:
    left, right = socket.socketpair()
    end = FrameSocket(left, 1000)
    right.sendall(raw(7, 2, 0, CALL) + b"ok" + data)
    assert end.read(LIMIT) == (CALL, 7, b"", b"ok")
    for _ in range(2):
        with pytest.raises(ConnectionError, match=message):
            end.read(LIMIT)
    right.close()
    end.close()


@pytest.mark.parametrize("seed", range(5))
def test_frames_survive_any_division_into_pieces(seed: int) -> None:
    chance = random.Random(seed)
    left, right = socket.socketpair()
    end = FrameSocket(left, MIB)
    sent = [
        (CALL, number, b"n" * chance.randrange(20), chance.randbytes(chance.choice([0, 3, 700, 40_000])))
        for number in range(60)
    ]
    stream = b"".join(raw(number, len(data), len(name), kind) + name + data for kind, number, name, data in sent)

    def dribble() -> None:
        rest = memoryview(stream)
        while rest:
            size = chance.choice([1, 2, 18, 19, 20, 500, 9000])
            right.sendall(rest[:size])
            rest = rest[size:]

    writer = in_thread(dribble)
    assert [end.read(LIMIT) for _ in sent] == sent
    writer.join(LIMIT)
    right.close()
    end.close()


def test_several_threads_may_send(ends: Ends) -> None:
    def send(first: int) -> None:
        for number in range(first, first + 200):
            ends[0].write(DATA, number, b"", bytes([number % 251]) * (number * 37 % 50_000), LIMIT)

    threads = [in_thread(lambda first=first: send(first)) for first in (0, 200, 400)]  # type: ignore[misc]
    seen = set()
    for _ in range(600):
        _, number, _, payload = ends[1].read(LIMIT)
        assert payload == bytes([number % 251]) * (number * 37 % 50_000)
        seen.add(number)
    assert len(seen) == 600
    for thread in threads:
        thread.join(LIMIT)

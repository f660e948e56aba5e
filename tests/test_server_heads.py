"""Requests whose head has no end, and the like: memory that nobody was asked a key for."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from server_process import ServerProcess, scripted

LIMIT = 10.0
MOST = 8192
MUCH = 16 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with scripted(listen={"max_header_bytes": MOST}) as server:
        server.ready()
        yield server


def talk(server: ServerProcess, begin: bytes, piece: bytes) -> tuple[int, bytes]:
    """How much the server took of ``begin`` and many a ``piece`` before it hung up, and what it said."""
    url = urlsplit(server.url)
    sent, said = 0, b""
    with socket.create_connection((str(url.hostname), url.port), LIMIT) as connection:
        try:
            connection.sendall(begin)
            while sent < MUCH:
                connection.sendall(piece)
                sent += len(piece)
        except (ConnectionResetError, BrokenPipeError):
            pass
        try:
            while more := connection.recv(65536):
                said += more
        except ConnectionResetError:
            pass
    return sent, said


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ", b"a" * 4096),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"X-Many: a\r\n" * 400),
        (
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Trail: ",
            b"a" * 4096,
        ),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;x=", b"a" * 4096),
    ],
    ids=["one header", "many headers", "trailer", "extension of a chunk"],
)
def test_what_has_no_end_is_ended(server: ServerProcess, begin: bytes, piece: bytes) -> None:
    sent, _ = talk(server, begin, piece)
    assert sent < MUCH, "it took all"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_client_is_told(server: ServerProcess) -> None:
    url = urlsplit(server.url)
    with socket.create_connection((str(url.hostname), url.port), LIMIT) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (MOST + 1))
        said = b""
        while more := connection.recv(65536):
            said += more
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "headers_too_large"


def test_what_is_within_the_bound_passes(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url) as client:
        for _ in range(5):  # of one connection: each head is counted by itself
            assert client.get("/health", headers={"X-Long": "a" * (MOST - 1000)}).status_code == 200
    body = b'{"prompt": "' + b"a" * (MOST * 8) + b'"}'

    def pieces() -> Iterator[bytes]:
        yield from (body[at : at + 100] for at in range(0, len(body), 100))

    answer = httpx.post(f"{server.url}/tokenize", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code != 431
    assert "error" not in answer.json() or answer.json()["error"]["code"] != "headers_too_large"

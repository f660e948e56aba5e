"""Connections by ticket: one for the right one, none for anybody else."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT, wait_until

from lightvllm.errors import AuthError
from lightvllm.transfer import link
from lightvllm.transfer.frames import CALL
from lightvllm.transfer.link import TicketListener, connect


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def start(where: str = "127.0.0.1", timeout: float = LIMIT) -> TicketListener:
            listener = TicketListener(where, 1 << 20, timeout)
            stack.callback(listener.close)
            return listener

        yield start


def where(kind: str, folder: Path) -> str:
    return f"unix:{folder}/s" if kind == "unix" else {"tcp": "127.0.0.1", "tcp6": "::1"}[kind]


@pytest.mark.parametrize("kind", ["unix", "tcp", "tcp6"])
def test_the_holder_of_the_ticket_is_connected(listen: Any, tmp_path: Path, kind: str) -> None:
    if kind == "tcp6" and not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    listener = listen(where(kind, tmp_path))
    ours = connect(listener.address, listener.ticket, 1 << 20, LIMIT)
    theirs = listener.accepted.result(LIMIT)
    ours.write(CALL, 1, b"hello", b"x", LIMIT)
    assert theirs.read(LIMIT) == (CALL, 1, b"hello", b"x")
    ours.close()
    theirs.close()
    assert list(tmp_path.iterdir()) == []


def test_all_addresses_are_those_of_ipv4_too(listen: Any) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no sockets of both families")
    listener = listen("::")
    ours = connect(f"127.0.0.1:{listener.address.rpartition(':')[2]}", listener.ticket, 1 << 20, LIMIT)
    listener.accepted.result(LIMIT).close()
    ours.close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_socket_in_the_file_system_is_its_owners_alone(listen: Any, tmp_path: Path) -> None:
    listen(f"unix:{tmp_path}/s")
    assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o600


def test_strangers_are_closed_out_and_do_not_use_the_ticket_up(listen: Any) -> None:
    listener = listen()
    for _ in range(20):
        with pytest.raises(OSError):
            connect(listener.address, os.urandom(32), 1 << 20, LIMIT)
    assert not listener.accepted.done()
    ours = connect(listener.address, listener.ticket, 1 << 20, LIMIT)
    listener.accepted.result(LIMIT).close()
    ours.close()


def test_a_ticket_is_good_for_one_connection(listen: Any) -> None:
    listener = listen()
    ours = connect(listener.address, listener.ticket, 1 << 20, LIMIT)
    theirs = listener.accepted.result(LIMIT)
    with pytest.raises(OSError):
        connect(listener.address, listener.ticket, 1 << 20, 2.0)
    ours.close()
    theirs.close()


def test_one_that_connects_and_says_nothing_keeps_nobody_out(listen: Any) -> None:
    listener = listen()
    host, _, port = listener.address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(2 * link._STRANGERS)]
    ours = connect(listener.address, listener.ticket, 1 << 20, LIMIT)
    listener.accepted.result(LIMIT).close()
    ours.close()
    for sock in silent:
        sock.close()


def test_who_says_nothing_is_dropped_in_time(listen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_HELLO_SECONDS", 0.05)
    listener = listen()
    host, _, port = listener.address.rpartition(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.settimeout(LIMIT)
        assert silent.recv(1) == b""


def test_nobody_waits_for_ever(listen: Any, tmp_path: Path) -> None:
    listener = listen(f"unix:{tmp_path}/s", 0.05)
    assert isinstance(listener.accepted.exception(LIMIT), TimeoutError)
    wait_until(lambda: not list(tmp_path.iterdir()), "the socket to be gone")


def test_a_closed_listener_accepts_nobody(listen: Any) -> None:
    listener = listen()
    listener.close()
    listener.close()
    assert isinstance(listener.accepted.exception(LIMIT), ConnectionAbortedError)
    with pytest.raises(OSError):
        connect(listener.address, listener.ticket, 1 << 20, 2.0)


def test_what_did_not_make_the_ticket_is_not_believed() -> None:
    """Somebody else may sit on the port by now; it gets a ticket that is good for nothing, and no calls."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        address = f"127.0.0.1:{impostor.getsockname()[1]}"

        def answer() -> None:
            peer, _ = impostor.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(bytes(32))
                peer.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(AuthError, match="did not make the ticket"):
            connect(address, os.urandom(32), 1 << 20, LIMIT)
        thread.join(LIMIT)


def test_no_repr_shows_the_ticket(listen: Any) -> None:
    listener = listen()
    assert str(listener.ticket) not in repr(listener)
    assert listener.ticket.hex() not in repr(listener)

"""Hostile input to a worker's listeners: nothing is executed, nothing grows, and the next driver is served.

A small part of what ``make fuzz`` sends (``benchmarks/fuzz.py``); seeded, and an input that fails is shown as hex.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

from fuzz_k8s import (
    Bait,
    Counts,
    Stranger,
    Watched,
    besiege,
    besiege_ticket,
    deliver,
    fuzz_frames,
    fuzz_handshake,
    fuzz_session_decoding,
    garbage_to_direct,
    garbage_to_session,
    in_threads,
    served_by_command,
    served_locally,
    serves,
)
from waiting import LIMIT, wait_until

from lightvllm.backends.k8s.security import Token
from lightvllm.errors import WorkerError
from lightvllm.messages import decode_reply

SEED = 1


@pytest.fixture
def bait(tmp_path: Path) -> Bait:
    (tmp_path / "traces").mkdir()
    return Bait(tmp_path / "traces")


def test_the_bait_leaves_traces_when_it_is_executed(bait: Bait) -> None:
    with served_locally("Unix") as server:
        driver = server.driver()
        for method, payload in bait.calls("x"):
            try:
                decode_reply(method, driver.session.call(method, payload).result(LIMIT))
            except WorkerError:  # what was made can be no argument
                assert method == "echo"
        driver.close()
    assert bait.traces() == ["x-callable", "x-method", "x-pickle"]


def test_strangers_at_a_tcp_port(tmp_path: Path, bait: Bait) -> None:
    counts = Counts()
    with served_by_command("TCP", tmp_path, tls=False) as (server, _):
        besiege(server(), 550, SEED, bait, counts)
        for transport in ("grpc", "direct"):
            driver = server().driver(transport)
            besiege(server(), 330, SEED, bait, counts, driver)
            driver.close()
            serves(server(), transport)
    assert counts.total == 1210


def test_calls_by_the_hundred_that_are_taken_back_at_once_fill_no_memory(bait: Bait) -> None:
    """HTTP/2's "rapid reset": gRPC keeps those that have not been looked at, by default by the thousand."""
    token = Token.new()
    with served_locally("Unix") as server:

        def send(number: int, kind: str, *args: int) -> None:
            stranger = Stranger(random.Random(f"{SEED}-{number}"), bait, token, served=False)
            deliver(server.door, getattr(stranger, kind)(*args), "whole")

        in_threads(lambda number: send(number, "without_the_token"), 100)
        watched = Watched(server.pid)
        in_threads(lambda number: send(number, "rapid_reset", 200), 400)
        watched.check()
        serves(server)


@pytest.mark.slow
def test_who_connects_and_says_nothing_is_dropped(tmp_path: Path) -> None:
    with served_by_command("TCP", tmp_path, tls=False) as (server, _), server().door.connect() as silent:
        silent.settimeout(30.0)
        while silent.recv(1000):  # the server has opened with its settings
            pass


def test_strangers_at_a_tls_port(tmp_path: Path, bait: Bait) -> None:
    """Those whom TLS keeps out, and members of the group without the token."""
    counts = Counts()
    with served_by_command("TLS", tmp_path, tls=True) as (server, strangers):
        fuzz_handshake(server().door, strangers, 100, SEED, counts)
        besiege(server(), 110, SEED, bait, counts)
        driver = server().driver("direct")
        fuzz_handshake(server().door, strangers, 50, SEED, counts)
        besiege(server(), 110, SEED, bait, counts, driver)
        driver.close()
        serves(server())
    assert counts.total == 370


def test_strangers_at_a_local_workers_socket(bait: Bait) -> None:
    counts = Counts()
    with served_locally("Unix") as server:
        besiege(server, 550, SEED, bait, counts)
        driver = server.driver()
        besiege(server, 330, SEED, bait, counts, driver)
        driver.close()
    assert counts.total == 880


def test_strangers_at_a_local_workers_ticket_door() -> None:
    with served_locally("Unix") as server:
        besiege_ticket(server, 300, SEED, Counts())


@pytest.mark.parametrize("tls", [False, True], ids=["TCP", "TLS"])
def test_strangers_at_a_ticket_door(tmp_path: Path, tls: bool) -> None:
    with served_by_command("TLS" if tls else "TCP", tmp_path, tls) as (server, _):
        besiege_ticket(server(), 60 if tls else 300, SEED, Counts())
        serves(server(), "direct")


@pytest.mark.parametrize("garbage", [garbage_to_direct, garbage_to_session])
def test_garbage_from_a_driver_ends_its_worker_and_the_next_is_served(tmp_path: Path, garbage: object) -> None:
    with served_by_command("TCP", tmp_path, tls=False) as (server, _):
        for seed in range(2):
            before = server()
            garbage(before, seed, Counts())  # type: ignore[operator]
            wait_until(lambda before=before: server().pid != before.pid, "a fresh worker process")
        serves(server())


def test_no_message_of_a_session_is_taken_for_what_it_is_not() -> None:
    fuzz_session_decoding(1000, SEED, Counts())


def test_no_frame_of_a_direct_connection_is_taken_for_what_it_is_not() -> None:
    fuzz_frames(1000, SEED, Counts())

"""Who waits, reads; and when nobody waits, the reactor's own thread does."""

from __future__ import annotations

import collections
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from waiting import LIMIT, no_more_files_than, open_files, wait_until

pytest.importorskip("grpc", reason="the k8s extra is not installed")

from lightvllm.backends.k8s.reactor import Reactor
from lightvllm.transfer.frames import CALL, REPLY, FrameSocket

MIB = 1 << 20


class Peer:
    """A connection that the reactor reads, and its other end, which the test moves by hand.

    Attributes:
        replies: futures by sequence number, completed by whoever reads.
        readers: the names of the threads that read.
        broken: reasons told.
    """

    def __init__(self, reactor: Reactor) -> None:
        ours, theirs = socket.socketpair()
        self.reactor = reactor
        self.link = FrameSocket(ours, 64 * MIB)
        self.far = FrameSocket(theirs, 64 * MIB)
        self.replies: dict[int, Future[bytes]] = collections.defaultdict(Future)
        self.readers: list[str] = []
        self.broken: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.then: Callable[[int], None] = lambda _: None
        reactor.add(self.link, self._take, self.broken.put)

    def _take(self, frames: Any) -> None:
        while frames:
            _, number, _, payload = frames.popleft()
            self.readers.append(threading.current_thread().name)
            self.replies[number].set_result(bytes(payload))
            self.then(number)

    def answer(self, number: int, payload: bytes = b"") -> None:
        self.far.write(REPLY, number, b"", payload, LIMIT)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()


@pytest.fixture
def peer(reactor: Reactor) -> Iterator[Peer]:
    made = Peer(reactor)
    yield made
    reactor.remove(made.link)
    made.link.close()
    made.far.close()


def in_thread(work: Callable[[], Any], name: str = "other") -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def test_who_waits_reads(peer: Peer, reactor: Reactor) -> None:
    def far_end() -> None:
        for number in range(1, 201):
            assert peer.far.read(LIMIT)[1] == number
            peer.answer(number, b"%d" % number)

    thread = in_thread(far_end)
    for number in range(1, 201):
        peer.link.send(CALL, number, b"", b"")
        reactor.wait(peer.replies[number], LIMIT)
        assert peer.replies[number].result(0) == b"%d" % number
    thread.join(LIMIT)
    assert peer.readers.count(threading.current_thread().name) > 100  # the first few may be the reactor's own


def test_while_nobody_waits_replies_come_all_the_same(peer: Peer, reactor: Reactor) -> None:
    peer.answer(1)
    assert peer.replies[1].result(LIMIT) == b""
    reactor.wait(peer.replies[1], LIMIT)
    in_thread(lambda: peer.answer(2))
    reactor.wait(peer.replies[2], LIMIT)
    peer.answer(3)  # just after somebody has waited
    assert peer.replies[3].result(LIMIT) == b""
    assert peer.readers[0] == "lightvllm-reactor"


def test_a_wait_ends_in_time(peer: Peer, reactor: Reactor) -> None:
    reactor.wait(peer.replies[1], 0.02)
    assert not peer.replies[1].done()
    reactor.wait(peer.replies[1], 0)
    peer.answer(1)
    reactor.wait(peer.replies[1], LIMIT)
    assert peer.replies[1].done()


def test_a_wait_ends_in_time_though_replies_keep_coming(peer: Peer, reactor: Reactor) -> None:
    stop = threading.Event()

    def talk() -> None:
        number = 1
        while not stop.is_set():
            peer.answer(number)
            number += 1

    thread = in_thread(talk)
    reactor.wait(Future(), 0.05)
    stop.set()
    while thread.is_alive():
        thread.join(0.01)


def test_a_future_that_others_complete_ends_the_wait(peer: Peer, reactor: Reactor) -> None:
    future: Future[None] = Future()
    waiting = in_thread(lambda: reactor.wait(future, LIMIT))
    wait_until(lambda: reactor._reader == waiting.ident, "the other thread to read")
    future.set_result(None)
    waiting.join(LIMIT)
    assert not waiting.is_alive()


def test_several_may_wait_at_once(peer: Peer, reactor: Reactor) -> None:
    threads = [in_thread(lambda n=n: reactor.wait(peer.replies[n], LIMIT)) for n in range(1, 5)]  # type: ignore[misc]
    wait_until(lambda: reactor._waiting.locked(), "one to read")
    for number in (3, 1, 4, 2):
        peer.answer(number)
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()


def test_a_callback_may_wait(peer: Peer, reactor: Reactor) -> None:
    done: Future[None] = Future()

    def ask_again(number: int) -> None:
        if number == 1:
            in_thread(lambda: peer.answer(2))
            reactor.wait(peer.replies[2], LIMIT)
            assert peer.replies[2].done()
            done.set_result(None)

    peer.then = ask_again
    in_thread(lambda: peer.answer(1))
    reactor.wait(peer.replies[1], LIMIT)
    done.result(LIMIT)
    peer.answer(3)
    assert peer.replies[3].result(LIMIT) == b""
    done = Future()
    peer.replies.clear()
    peer.answer(1)  # and now in the reactor's own thread
    done.result(LIMIT)


def test_what_could_not_be_written_at_once_is_written_later(peer: Peer, reactor: Reactor) -> None:
    blob = os.urandom(MIB) * 16
    assert not peer.link.send(CALL, 1, b"", blob)
    reactor.flush_when_possible(peer.link)
    assert peer.far.read(LIMIT)[3] == blob
    assert not peer.link.send(CALL, 2, b"", blob)
    reactor.flush_when_possible(peer.link)
    thread = in_thread(lambda: (peer.far.read(LIMIT), peer.answer(2)))
    reactor.wait(peer.replies[2], LIMIT)
    assert peer.replies[2].done()
    thread.join(LIMIT)


def test_what_is_sent_while_the_rest_of_another_is_flushed_is_not_forgotten(peer: Peer, reactor: Reactor) -> None:
    """The reader has just found nothing left to write when a sender finds no room: it must still be woken for that."""
    blob, sent, flush = os.urandom(MIB) * 16, threading.Event(), peer.link.flush

    def send_more() -> None:
        assert not peer.link.send(CALL, 2, b"", blob)
        sent.set()
        reactor.flush_when_possible(peer.link)

    def flush_and_be_overtaken() -> bool:
        done = flush()
        if done and not sent.is_set():
            sender = in_thread(send_more)
            assert sent.wait(LIMIT)
            sender.join(0.2)  # it may, but need not, get any further before the reader goes on
        return done

    peer.link.flush = flush_and_be_overtaken  # type: ignore[method-assign]
    assert not peer.link.send(CALL, 1, b"", blob)
    reactor.flush_when_possible(peer.link)
    assert peer.far.read(LIMIT)[1] == 1
    assert sent.wait(LIMIT)
    assert peer.far.read(LIMIT)[1] == 2


def test_an_end_is_told_once_with_its_reason(peer: Peer) -> None:
    peer.far.close()
    assert "the other side closed it" in peer.broken.get(timeout=LIMIT)
    assert peer.broken.empty()


def test_a_protocol_error_of_the_handler_ends_the_connection(peer: Peer, reactor: Reactor) -> None:
    def refuse(_: int) -> None:
        raise ConnectionError("not what was expected")

    peer.then = refuse
    peer.answer(1)
    assert peer.broken.get(timeout=LIMIT) == "not what was expected"


def test_an_interrupt_while_reading_is_not_passed_over(peer: Peer, reactor: Reactor) -> None:
    """Nobody knows how much of the frame has been lost: the connection is given up, loudly."""

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    peer.then = interrupt
    me, never = threading.get_ident(), Future[None]()

    def answer() -> None:
        wait_until(lambda: reactor._reader == me, "the waiting thread to read")
        peer.answer(1)

    thread = in_thread(answer)
    with pytest.raises(KeyboardInterrupt):
        reactor.wait(never, LIMIT)
    assert "interrupted (KeyboardInterrupt)" in peer.broken.get(timeout=LIMIT)
    thread.join(LIMIT)
    other = Peer(reactor)  # the reading goes on
    other.answer(1)
    assert other.replies[1].result(LIMIT) == b""
    reactor.remove(other.link)
    other.link.close()
    other.far.close()


def test_a_callback_that_raises_does_not_end_the_reading(peer: Peer, reactor: Reactor, caplog: Any) -> None:
    def fail(_: int) -> None:
        raise ValueError("no good")

    peer.then = fail
    peer.answer(1)
    assert "interrupted (ValueError)" in peer.broken.get(timeout=LIMIT)
    other = Peer(reactor)
    other.answer(1)
    assert other.replies[1].result(LIMIT) == b""
    assert "no good" in caplog.text
    reactor.remove(other.link)
    other.link.close()
    other.far.close()


def test_one_connection_that_ends_does_not_disturb_another(peer: Peer, reactor: Reactor) -> None:
    other = Peer(reactor)
    other.far.close()
    other.broken.get(timeout=LIMIT)
    other.link.close()
    peer.answer(1)
    assert peer.replies[1].result(LIMIT) == b""


def test_closing_ends_its_thread_and_leaves_no_descriptor() -> None:
    before = open_files()
    reactor = Reactor()
    never: Future[None] = Future()
    waiting = in_thread(lambda: reactor.wait(never, LIMIT))
    wait_until(lambda: reactor._reader == waiting.ident, "the other thread to read")
    reactor.close()
    reactor.close()
    never.set_result(None)
    waiting.join(LIMIT)
    wait_until(lambda: not reactor._thread.is_alive(), "its thread to end")
    no_more_files_than(before)

"""``Link``: the engine's loop never waits for its parent, and what the parent has not taken is merged."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from waiting import wait_until

from lightvllm.engine.core_main import Link
from lightvllm.engine.core_messages import (
    MAX_FRAME_BYTES,
    Abort,
    Command,
    Delta,
    Ended,
    Failure,
    Outputs,
    decode_event,
    encode,
)
from lightvllm.engine.outputs import CompletionOutput
from lightvllm.engine.stats import EngineStats
from lightvllm.transfer.frames import DATA, FrameSocket

COUNT, TEXT = 2000, "x" * 1000


class Ends:
    """A link, and the parent's end of its connection."""

    def __init__(self) -> None:
        parent, child = socket.socketpair()
        child.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.parent = FrameSocket(parent, MAX_FRAME_BYTES, spin=0)
        self.child = FrameSocket(child, MAX_FRAME_BYTES, spin=0)
        self.commands: list[Command] = []
        self.gone = threading.Event()
        self.link = Link(self.child, self.commands.append, self.gone.set)
        self.link.start()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.parent.close()
    assert ends.gone.wait(10)
    ends.child.close()


def step(number: int) -> Outputs:
    return Outputs([Delta(7, [CompletionOutput(0, TEXT, [number])], False)], EngineStats(total_steps=number))


def test_a_parent_that_does_not_read_holds_nobody_up_and_loses_nothing(ends: Ends) -> None:
    for number in range(COUNT):
        ends.link.emit(step(number))
    ends.link.emit(Ended(Failure("Shutdown", "over")))
    received, tokens, text = 0, [], 0
    while True:
        event = decode_event(ends.parent.read(10)[3])
        if isinstance(event, Ended):
            break
        assert isinstance(event, Outputs)
        received += 1
        (delta,) = event.deltas
        tokens += delta.outputs[0].token_ids
        text += len(delta.outputs[0].text)
        assert event.stats.total_steps == tokens[-1]
    assert tokens == list(range(COUNT))
    assert text == COUNT * len(TEXT)
    assert received < COUNT / 2
    ends.link.flush(10)


def test_commands_come_while_nothing_can_be_written(ends: Ends) -> None:
    for number in range(COUNT):
        ends.link.emit(step(number))
    for number in range(100):
        ends.parent.write(DATA, 0, b"", encode(Abort(number)), 10)
    wait_until(lambda: len(ends.commands) == 100, "the commands have come")
    assert ends.commands == [Abort(number) for number in range(100)]


def test_a_parent_that_has_gone_is_no_error_where_something_is_said(ends: Ends) -> None:
    ends.parent.close()
    assert ends.gone.wait(10)
    ends.link.emit(step(1))

"""``Admission``: who may wait, and when who may not should come again."""

from __future__ import annotations

import pytest

from lightvllm.engine import admission
from lightvllm.engine.admission import Admission
from lightvllm.engine.stats import EngineStats
from lightvllm.errors import QueueFull

IDLE = EngineStats()


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock.now)
    return clock


def fill(room: Admission, stats: EngineStats = IDLE) -> int:
    """How many are admitted before one is refused."""
    count = 0
    while True:
        try:
            room.admit(1, stats)
        except QueueFull:
            return count
        count += 1


def test_as_many_as_run_and_as_may_wait() -> None:
    room = Admission(max_num_seqs=4, max_num_waiting=3)
    assert fill(room) == 7
    room.left(1)
    room.ended(1)
    assert fill(room) == 2


def test_none_may_wait() -> None:
    assert fill(Admission(max_num_seqs=4, max_num_waiting=0)) == 4


def test_a_request_of_many_sequences_is_not_refused_for_ever() -> None:
    room = Admission(max_num_seqs=4, max_num_waiting=0)
    room.admit(100, IDLE)
    with pytest.raises(QueueFull):
        room.admit(1, IDLE)
    room.left(100)
    room.admit(1, IDLE)


def test_where_fewer_run_than_could_the_others_wait() -> None:
    room = Admission(max_num_seqs=4, max_num_waiting=3)
    room.admit(4, IDLE)
    assert fill(room, EngineStats(num_running=2, num_waiting=2)) == 1


def test_when_to_come_again(clock: Clock) -> None:
    room = Admission(max_num_seqs=10, max_num_waiting=0)
    fill(room)
    with pytest.raises(QueueFull, match="try again in about 1 s") as refused:
        room.admit(1, IDLE)
    assert refused.value.retry_after == 1.0  # nothing is known yet
    room.ended(1)
    clock.now += 10
    room.ended(1)
    room.admit(2, IDLE)
    clock.now += 10
    with pytest.raises(QueueFull, match="0 sequences are waiting and max_num_waiting=0") as refused:
        room.admit(1, IDLE)
    assert refused.value.retry_after == 10.0  # two have ended in twenty seconds
    clock.now += 10_000
    with pytest.raises(QueueFull) as refused:
        room.admit(1, IDLE)
    assert refused.value.retry_after == 60.0

"""Which requests' time has come; that they are ended then is in test_engine_engine.py."""

from __future__ import annotations

from lightvllm.engine.deadlines import Deadlines


def test_those_whose_time_has_come_the_earliest_first() -> None:
    deadlines = Deadlines(lambda time, request_id: request_id != "gone")
    for time, request_id in ((3.0, "c"), (1.0, "a"), (2.0, "gone"), (2.5, "b"), (9.0, "d")):
        deadlines.add(time, request_id)
    assert list(deadlines.pop_due(0.5)) == []
    assert list(deadlines.pop_due(3.0)) == ["a", "b", "c"]
    assert list(deadlines.pop_due(3.0)) == []
    assert len(deadlines) == 1


def test_those_that_count_no_more_are_not_kept_and_the_others_are() -> None:
    alive: set[str] = set()
    deadlines = Deadlines(lambda time, request_id: request_id in alive)
    for i in range(5000):
        if i % 10 == 0:
            alive.add(str(i))
        deadlines.add(float(i), str(i))
        assert len(deadlines) <= 2 * (len(alive) + 1) + 64
    assert list(deadlines.pop_due(1e9)) == [str(i) for i in range(0, 5000, 10)]

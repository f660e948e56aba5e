"""The thread for late work."""

from __future__ import annotations

import threading
import weakref

from waiting import LIMIT

from lightvllm.backends.late import LateThread


def test_it_starts_at_first_need_keeps_the_order_and_ends_after_what_was_put() -> None:
    before = threading.active_count()
    late = LateThread("late-test")
    done: list[object] = []
    go = threading.Event()
    assert threading.active_count() == before
    late.put(lambda: go.wait(LIMIT))
    for number in range(100):
        late.put(lambda number=number: done.append(number))  # type: ignore[misc]
    late.put(lambda: done.append(threading.current_thread().name))
    late.end()
    late.join(0.0)
    assert done == []
    go.set()
    late.join(LIMIT)
    assert done == [*range(100), "late-test"]
    assert threading.active_count() == before


def test_what_a_task_held_is_let_go_when_it_is_done() -> None:
    class Held:
        pass

    late = LateThread("late-test")
    held, done = Held(), threading.Event()
    gone = threading.Event()
    weakref.finalize(held, gone.set)
    late.put(lambda held=held: done.set())  # type: ignore[misc]
    del held
    assert done.wait(LIMIT)
    assert gone.wait(LIMIT)  # though the thread waits for more
    late.end()
    late.join(LIMIT)


def test_one_that_was_never_needed_ends_as_well() -> None:
    late = LateThread("late-test")
    late.end()
    late.join()


def test_its_own_task_may_wait_for_its_end() -> None:
    late = LateThread("late-test")
    joined = threading.Event()

    def task() -> None:
        late.end()
        late.join()
        joined.set()

    late.put(task)
    assert joined.wait(LIMIT)
    late.join(LIMIT)

"""``EngineCore``: what its loop says, and when it says nothing. The rest is in AsyncLLM's tests."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest
from async_engines import SMALL, write_model
from fake_core import FakeCoreExecutor

from lightvllm import SamplingParams
from lightvllm.backends.base import WorkerRef
from lightvllm.engine.core import EngineCore
from lightvllm.engine.core_messages import Abort, Add, CheckHealth, Ended, Event, Health, Outputs, Progress, Ready, Stop
from lightvllm.engine.options import Options
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError, Shutdown, WorkerDied, WorkerError

LIMIT = 30.0
E = TypeVar("E", bound=Event)


class Running:
    """A core in a thread, and what it has said."""

    def __init__(self, folder: Path) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        configured = Options.check(SMALL).configure(folder)
        self.core = EngineCore(configured.engine, Tokenizer.from_dir(folder), self._make, self.events.put)
        self._configured = configured
        self.thread = threading.Thread(target=self.core.run, daemon=True)
        self.thread.start()

    def _make(self, progress: Callable[[str], None]) -> FakeCoreExecutor:
        progress("making it")
        self.executor = FakeCoreExecutor(self._configured.executor, self._configured.engine)
        return self.executor

    def next(self, kind: type[E]) -> E:
        event = self.events.get(timeout=LIMIT)
        assert isinstance(event, kind)
        return event

    def add(self, number: int, stream: bool = True, timeout: float | None = None, waited: float = 0.0) -> None:
        asked = SamplingParams(max_tokens=4, ignore_eos=True, seed=number)
        arrival_time = time.monotonic() - waited
        self.core.post(Add(number, [5, 6, 7], asked, stream, arrival_time, timeout=timeout))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(write_model(tmp_path))
    assert running.next(Progress).text == "making it"
    ready = running.next(Ready)
    assert (len(ready.ranks), ready.start_seconds, ready.stats.num_kv_blocks) == (1, 0.25, 128)
    yield running
    running.core.post(Stop())
    running.thread.join(LIMIT)
    assert not running.thread.is_alive()
    assert running.executor.num_shutdowns == 1


def test_one_event_for_each_step_with_all_that_is_new(running: Running) -> None:
    for number in range(4):
        running.add(number, stream=number != 3)
    texts = dict.fromkeys(range(4), "")
    last = {}
    while len(last) < 4:
        event = running.next(Outputs)
        assert len({delta.number for delta in event.deltas}) == len(event.deltas)
        for delta in event.deltas:
            first = not texts[delta.number]
            (output,) = delta.outputs
            texts[delta.number] += output.text + "."
            assert (delta.metrics is not None) == (first or delta.finished)
            assert (delta.num_cached_tokens is not None) == first
            if delta.finished:
                last[delta.number] = event.stats.total_steps
    assert [text.count(".") for text in texts.values()] == [4, 4, 4, 1]
    assert event.stats.num_free_kv_blocks == event.stats.num_kv_blocks


def test_it_says_nothing_while_there_is_nothing_to_say(running: Running) -> None:
    running.core.post(Abort(77))
    stats = running.next(Outputs).stats
    running.core.post(CheckHealth())
    said = [running.events.get(timeout=LIMIT), running.events.get(timeout=LIMIT)]
    assert {type(event) for event in said} == {Outputs, Health}
    assert (stats.total_steps, running.events.qsize(), running.executor.steps) == (0, 0, [])


def test_what_the_engine_refuses_is_said_of_that_request_alone(running: Running) -> None:
    running.core.post(Add(1, [], SamplingParams(), True, time.monotonic()))
    assert isinstance(running.next(Outputs).refused[1].error(), ConfigError)
    running.add(2)
    while not any(delta.finished for delta in running.next(Outputs).deltas):
        pass


def test_time_that_a_request_has_waited_for_the_loop_counts(running: Running) -> None:
    running.add(1, timeout=5.0, waited=6.0)
    (delta,) = running.next(Outputs).deltas
    assert (delta.finished, delta.outputs[0].finish_reason) == (True, "timeout")


def test_the_end_is_said_before_the_workers_are_ended(running: Running) -> None:
    running.core.post(Stop())
    assert isinstance(running.next(Ended).failure.error(), Shutdown)


def test_an_error_that_came_of_a_peers_death_is_told_as_that_death(running: Running) -> None:
    executor = running.executor
    executor.workers.append(WorkerRef("fake-1", "here", pid=1001))

    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise WorkerError(0, "execute_model", "RuntimeError", "Connection closed by peer")

    def die(callback: Callable[[], None]) -> None:
        executor._failure = WorkerDied("fake-1", "killed by SIGKILL", 1)
        threading.Thread(target=callback, daemon=True).start()

    executor.execute_model = fail  # type: ignore[method-assign]
    executor.register_failure_callback = die  # type: ignore[method-assign]
    running.add(1)
    failure = running.next(Ended).failure.error()
    assert isinstance(failure, WorkerDied)
    assert failure.rank == 1


def test_a_workers_error_of_its_own_stays_one(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightvllm.engine.core.DEATH_SECONDS", 0.01)
    running.executor.workers.append(WorkerRef("fake-1", "here", pid=1001))

    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise WorkerError(0, "execute_model", "ValueError", "of its own")

    running.executor.execute_model = fail  # type: ignore[method-assign]
    running.add(1)
    assert isinstance(running.next(Ended).failure.error(), WorkerError)

"""The two halves of a step in our executors: what vLLM is told of the first one, and when. No engine is started."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_process import MARKS

pytestmark = [pytest.mark.smoke, *MARKS]

SCHEDULED, EMPTY = SimpleNamespace(total_num_scheduled_tokens=3), SimpleNamespace(total_num_scheduled_tokens=0)


class Halves:
    """Stands for the workers: a future for each half that has been sent; ``abandon`` as ``DistributedExecutor``'s."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Future[Any]]] = []

    def send(self, method: str, argument: object) -> Future[Any]:
        self.sent.append((method, Future()))
        return self.sent[-1][1]

    def abandon(self, future: Future[Any], error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)


def executor(plain: bool, halves: Halves) -> Any:
    from lightvllm.adapters.vllm.executor import KubernetesExecutor

    made = object.__new__(KubernetesExecutor)
    made._is_plain, made.executor, made._step = plain, halves, halves.send
    return made


def answered_at_once(halves: Halves, first: Any, second: Any) -> Any:
    """``send`` of workers that have done both halves by the time the second is waited for."""

    def send(method: str, argument: object) -> Future[Any]:
        future = halves.send(method, argument)
        if method == "sample_tokens":
            for (_, half), outcome in zip(halves.sent, (first, second), strict=True):
                if isinstance(outcome, Exception):
                    half.set_exception(outcome)
                else:
                    half.set_result(outcome)
        return future

    return send


def test_a_plain_step_does_not_wait_for_its_first_half() -> None:
    halves = Halves()
    told = executor(True, halves).execute_model(SCHEDULED, non_block=True)
    assert told.result(0) is None
    assert not halves.sent[0][1].done()


@pytest.mark.parametrize(("plain", "scheduled"), [(False, SCHEDULED), (True, EMPTY)])
def test_what_may_come_to_more_than_none_is_waited_for(plain: bool, scheduled: Any) -> None:
    halves = Halves()
    assert executor(plain, halves).execute_model(scheduled, non_block=True) is halves.sent[0][1]


@pytest.mark.parametrize(
    ("first", "second", "output"),
    [(None, "tokens", "tokens"), ("all there is", None, "all there is")],
    ids=["sampled", "nothing to sample"],
)
def test_the_second_half_gives_the_steps_output(first: Any, second: Any, output: str) -> None:
    halves = Halves()
    one = executor(True, halves)
    one._step = answered_at_once(halves, first, second)
    one.execute_model(SCHEDULED, non_block=True)
    assert one.sample_tokens(None) == output


def test_the_second_half_raises_what_the_first_one_raised() -> None:
    halves = Halves()
    one = executor(True, halves)
    one.execute_model(SCHEDULED, non_block=True)

    def send(method: str, argument: object) -> Future[Any]:
        halves.sent[0][1].set_exception(ValueError("in the first half"))
        return halves.send(method, argument)  # which nobody answers

    one._step = send
    with pytest.raises(ValueError, match="in the first half"):
        one.sample_tokens(None)

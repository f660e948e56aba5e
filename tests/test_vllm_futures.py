"""The futures of vLLM's steps."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from lightvllm.adapters.vllm.futures import Aggregated, fail_with


class Adding:
    """An aggregator like vLLM's: puts what all ranks say into one rank's output, and gives that."""

    def __init__(self, key: str) -> None:
        self.key = key

    def aggregate(self, outputs: list[dict[str, Any]], output_rank: int) -> dict[str, Any]:
        outputs[output_rank][self.key] = sum(output["value"] for output in outputs)
        return outputs[output_rank]


class Abandoning:
    """Of a ``DistributedExecutor`` that alone which is needed here."""

    def __init__(self) -> None:
        self.abandoned: list[tuple[Future[Any], BaseException]] = []

    def abandon(self, future: Future[Any], error: BaseException) -> None:
        self.abandoned.append((future, error))


def test_every_aggregator_adds_its_part_to_one_ranks_output() -> None:
    source: Future[Any] = Future()
    one = Aggregated(source, [Adding("kv"), Adding("ec")], 1)
    assert not one.done()
    source.set_result([{"value": 1}, {"value": 2}, {"value": 4}])
    assert one.done()
    assert one.result() == {"value": 2, "kv": 7, "ec": 7}


def test_the_ranks_error_is_the_outputs_error() -> None:
    source: Future[Any] = Future()
    one = Aggregated(source, [Adding("kv")], 0)
    source.set_exception(ValueError("rank 1"))
    with pytest.raises(ValueError, match="rank 1"):
        one.result()


def test_an_aggregators_error_is_raised_where_the_result_is_asked_for() -> None:
    source: Future[Any] = Future()
    one = Aggregated(source, [Adding("kv")], 0)
    source.set_result([{"value": 1}, {}])
    with pytest.raises(KeyError, match="value"):
        one.result()


def test_a_time_out_is_the_sources() -> None:
    source: Future[Any] = Future()
    one = Aggregated(source, [Adding("kv")], 0)
    with pytest.raises(TimeoutError):
        one.result(0.01)
    assert not one.done()


@pytest.mark.parametrize("aggregated", [False, True])
def test_the_second_half_of_a_step_fails_with_the_first(aggregated: bool) -> None:
    executor: Any = Abandoning()
    first, source = Future[Any](), Future[Any]()
    second = Aggregated(source, [Adding("kv")], 0) if aggregated else source
    error = ValueError("a rank")
    first.set_exception(error)
    fail_with(executor, second, first)
    assert executor.abandoned == [(source, error)]


def test_a_first_half_that_went_well_leaves_the_second_alone() -> None:
    executor: Any = Abandoning()
    first = Future[Any]()
    first.set_result(None)
    fail_with(executor, Future(), first)
    assert executor.abandoned == []

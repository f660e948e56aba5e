"""The futures of vLLM's steps. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from lightvllm.executors.distributed import DistributedExecutor


class Aggregated(Future[Any]):
    """One output made of all ranks' outputs, as soon as they are there."""

    def __init__(self, outputs: Future[Any], aggregators: Sequence[Any], rank: int) -> None:
        super().__init__()
        self.source, self._aggregators, self._rank = outputs, aggregators, rank
        self.set_running_or_notify_cancel()
        outputs.add_done_callback(self._aggregate)

    def _aggregate(self, outputs: Future[Any]) -> None:
        try:
            all_ranks = outputs.result()
            result = all_ranks[self._rank]
            for aggregator in self._aggregators:  # each adds its part to that rank's output
                result = aggregator.aggregate(all_ranks, output_rank=self._rank)
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            self.set_exception(error)
        else:
            self.set_result(result)

    def result(self, timeout: float | None = None) -> Any:
        if not self.source.done():
            self.source.result(timeout)  # which may read the replies in this thread, and knows its own time-out
        return super().result()


def fail_with(executor: DistributedExecutor, future: Future[Any], first_half: Future[Any]) -> None:
    """When ``first_half`` is done: have ``future``, a call of ``executor``, fail if that has failed, and as it has."""
    error = first_half.exception()
    if error is not None:
        executor.abandon(future.source if isinstance(future, Aggregated) else future, error)

"""One request's figures, from its outputs as they come."""

from __future__ import annotations

import time

import pytest

from lightvllm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from lightvllm.sampling_params import SamplingParams
from lightvllm.server.tracker import RequestHistograms, RequestTracker


def test_time_to_first_token_is_from_arrival_to_the_engines_first_token() -> None:
    totals = RequestHistograms(1000)
    tracker = RequestTracker(totals, SamplingParams(), "delta")
    times = RequestMetrics(tracker.arrival + 0.1, tracker.arrival + 1, tracker.arrival + 2, tracker.arrival + 2)
    tracker.update(RequestOutput("r", None, [1, 2], [CompletionOutput(1, "", [7])], False, times))
    assert (totals.first_token.count, totals.first_token.total) == (1, pytest.approx(2.0))
    assert totals.inter_token.count == 0
    tracker.end("abort")
    tracker.end("error")
    assert totals.endings["abort"] == 1
    assert totals.endings["error"] == 0
    assert totals.e2e.count == 0


def test_an_engine_may_tell_its_times_at_the_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = RequestHistograms(1000)
    tracker = RequestTracker(totals, SamplingParams(), "delta")
    begin = tracker.arrival

    def output(at: float, last: float, finished: bool = False) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: begin + at)
        reason = "stop" if finished else None
        times = RequestMetrics(begin, begin, begin + 1, begin + last)
        tracker.update(
            RequestOutput("r", None, [1], [CompletionOutput(0, "", [7], None, None, reason)], finished, times)
        )

    output(1.5, last=1)
    output(3, last=1)  # 2 seconds after the first token, as far as can be told
    output(5, last=1)  # 2 more
    assert (totals.inter_token.count, totals.inter_token.total) == (2, pytest.approx(4.0))
    output(7, last=6.5, finished=True)
    assert (totals.inter_token.count, totals.inter_token.total) == (3, pytest.approx(5.5)), "as the engine says it"
    assert totals.decode.total == pytest.approx(5.5)

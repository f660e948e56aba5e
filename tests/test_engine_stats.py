"""The engine's counters: what they count, and that steps that overlap are not counted twice."""

from __future__ import annotations

import pytest
from fake_engine import engine, finish
from fake_executor import scrambled

from lightvllm.engine.stats import StepClock
from lightvllm.sampling_params import SamplingParams


def test_an_engine_that_has_done_nothing() -> None:
    e, _ = engine(scrambled(200))
    stats = e.stats()
    assert (stats.num_kv_blocks, stats.num_free_kv_blocks, stats.kv_cache_usage) == (64, 64, 0.0)
    assert (stats.num_running, stats.num_waiting, stats.total_steps, stats.step_tokens) == (0, 0, 0, 0)


def test_tokens_blocks_and_sequences_are_counted() -> None:
    e, _ = engine(scrambled(200), max_num_seqs=1)
    prompt = list(range(5, 14))  # nine tokens: two full blocks
    for name in "ab":
        e.add_request(name, prompt, SamplingParams(max_tokens=3, ignore_eos=True))
    assert e.stats().num_waiting == 2
    e.step()
    stats = e.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_kv_blocks) == (1, 1, 61)
    assert stats.kv_cache_usage == pytest.approx(3 / 64)
    assert (stats.total_prompt_tokens, stats.total_generation_tokens, stats.step_tokens) == (9, 1, 9)
    finish(e)
    stats = e.stats()
    assert (stats.total_prompt_tokens, stats.total_generation_tokens) == (9 + 1, 6), "eight were in the cache"
    assert (stats.total_prefix_cache_queries, stats.total_prefix_cache_hits) == (18, 8)
    assert (stats.num_running, stats.num_waiting, stats.num_free_kv_blocks, stats.step_tokens) == (0, 0, 64, 1)
    assert stats.total_steps == len(e.timings) == 6
    assert stats.total_model_seconds == pytest.approx(6e-6)
    assert stats.total_step_seconds >= stats.total_model_seconds + stats.total_executor_seconds > 0


def test_preemptions_are_counted() -> None:
    e, _ = engine(scrambled(200), num_kv_blocks=8, caching=False)
    for i in range(4):
        e.add_request(str(i), [i + 5] * 4, SamplingParams(max_tokens=12, ignore_eos=True))
    out = finish(e)
    told = sum(out[str(i)].metrics.num_preemptions for i in range(4))
    assert e.stats().total_preemptions == told > 0
    assert e.stats().total_prompt_tokens > 16, "what is computed anew is computed"
    assert e.stats().total_generation_tokens == 48
    assert (e.stats().total_prefix_cache_queries, e.stats().total_prefix_cache_hits) == (0, 0)


def test_steps_that_overlap_are_counted_one_after_the_other() -> None:
    clock = StepClock()
    clock.add(planned=0.0, sent=1.0, replied=5.0, ended=6.0, model_seconds=3.0)
    assert (clock.step_seconds, clock.model_seconds, clock.executor_seconds) == (6.0, 3.0, 1.0)
    clock.add(planned=2.0, sent=3.0, replied=8.0, ended=9.0, model_seconds=2.5)  # sent while the first one ran
    assert (clock.step_seconds, clock.model_seconds, clock.executor_seconds) == (9.0, 5.5, 1.5)
    clock.add(planned=20.0, sent=21.0, replied=22.0, ended=23.0, model_seconds=1.0)  # after a pause
    assert (clock.step_seconds, clock.steps) == (12.0, 3)


def test_a_reply_that_is_looked_at_late_is_no_overhead_twice() -> None:
    clock = StepClock()
    clock.add(planned=0.0, sent=0.0, replied=5.0, ended=5.0, model_seconds=3.0)  # it came at 3, say
    clock.add(planned=0.0, sent=0.0, replied=6.0, ended=6.0, model_seconds=3.0)
    assert clock.executor_seconds == 2.0, "a counter does not fall"
    clock.add(planned=6.0, sent=6.0, replied=10.0, ended=10.0, model_seconds=3.0)
    assert clock.executor_seconds == 2.0
    clock.add(planned=10.0, sent=10.0, replied=15.0, ended=15.0, model_seconds=3.0)
    assert clock.executor_seconds == 3.0
    assert clock.step_seconds - clock.model_seconds == 3.0

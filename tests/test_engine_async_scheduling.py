"""Asynchronous scheduling, from the engine down to real workers: on or off, a request gets the same tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from fake_engine import EOS, engine, finish
from fake_executor import scrambled
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvllm import LLM, SamplingParams
from lightvllm.engine import engine as engine_module
from lightvllm.engine.engine import LLMEngine
from lightvllm.engine.outputs import RequestOutput
from lightvllm.messages import SAMPLED_LAST, StepInput, StepOutput
from lightvllm.sampling_params import StructuredOutputs

# ---------------------------------------------------------------------------------------- step by step


def test_the_next_step_is_sent_before_the_one_before_is_waited_for() -> None:
    e, executor = engine(scrambled(200), async_scheduling=True)
    e.add_request("a", [5], SamplingParams(max_tokens=4, ignore_eos=True))
    sent = []
    while e.has_unfinished_requests():
        e.step()
        sent.append(len(executor.steps))
    assert sent == [2, 3, 4, 4], "the last one's end was foreseen"
    assert [s.scheduled[0].new_token_ids for s in executor.steps] == [[], *[[SAMPLED_LAST]] * 3]


def test_what_is_sent_behind_an_end_that_comes_unforeseen_is_one_row_and_nothing_to_anybody() -> None:
    seen: list[tuple[int, list[int], list[int]]] = []

    def observe(step: StepInput, output: StepOutput, batch: Any) -> None:
        assert [seq.seq_id for seq in batch.sampled] == output.seq_ids
        seen.append((step.step, output.seq_ids, output.token_ids))

    # The first request's second token ends it; the other one goes on.
    e, executor = engine(
        lambda tokens, seed: EOS if tokens[0] == 5 and len(tokens) == 2 else 9, async_scheduling=True, on_step=observe
    )
    e.add_request("a", [5], SamplingParams(max_tokens=9))
    e.add_request("b", [6], SamplingParams(max_tokens=4))
    out = finish(e)
    assert [out[name].outputs[0].token_ids for name in "ab"] == [[9, EOS], [9] * 4]
    rows = [[row.seq_id for row in step.scheduled] for step in executor.steps]
    assert rows == [[0, 1], [0, 1], [0, 1], [1]]
    assert seen == [(1, [0, 1], [9, 9]), (2, [0, 1], [EOS, 9]), (3, [1], [9]), (4, [1], [9])]
    assert executor.steps[3].finished == [0]
    assert e.stats().total_generation_tokens == 6


def test_a_step_in_flight_behind_the_last_end_disturbs_no_later_request() -> None:
    e, executor = engine(lambda tokens, seed: EOS if len(tokens) == 3 else 9, async_scheduling=True)
    for _ in range(3):
        e.add_request("a", [5], SamplingParams(max_tokens=9))
        assert finish(e)["a"].outputs[0].token_ids == [9, 9, EOS]
        assert not e.has_unfinished_requests()
    assert e.scheduler.blocks.num_free == executor.num_kv_blocks


# ------------------------------------------------------------------------------------- whatever happens


@dataclass(frozen=True)
class Ask:
    """One request, and what happens to it: aborted or past its time-out after so many steps, if ever."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: int
    n: int
    priority: int
    arrives: int
    aborted: int | None
    expires: int | None
    delta: bool
    prompt_logprobs: int | None


asks = st.builds(
    Ask,
    prompt=st.lists(st.integers(5, 6), min_size=1, max_size=10).map(tuple),
    max_tokens=st.integers(1, 14),
    stop=st.integers(5, 12),
    n=st.integers(1, 2),
    priority=st.integers(-1, 1),
    arrives=st.integers(0, 9),
    aborted=st.none() | st.integers(1, 12),
    expires=st.none() | st.integers(1, 12),
    delta=st.booleans(),
    prompt_logprobs=st.none() | st.integers(0, 2),
)
plans = st.fixed_dictionaries(
    {
        "num_kv_blocks": st.integers(3, 12),
        "max_num_seqs": st.integers(1, 6),
        "budget": st.integers(6, 16),
        "caching": st.booleans(),
    }
)


def play(plan: dict[str, Any], given: list[Ask], ends: bool, **options: Any) -> tuple[LLMEngine, dict[str, Any], Any]:
    """Run the requests; with ``ends``, abort them and let them expire as they say. Their merged last outputs."""
    now = [0.0]
    e, executor = engine(scrambled(13), **plan, **options)
    last: dict[str, RequestOutput] = {}

    def take(output: RequestOutput, ask: Ask) -> None:
        before = last.get(output.request_id)
        assert before is None or not before.finished, "nothing follows a finished output"
        if before is not None and ask.delta:
            assert before.prompt_logprobs is None or output.prompt_logprobs is None, "they are told once"
            before.add(output)
        else:
            last[output.request_id] = output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module.time, "monotonic", lambda: now[0])
        for number in range(2000):
            for i, ask in enumerate(given):
                if ask.arrives == number:
                    params = SamplingParams(
                        max_tokens=ask.max_tokens,
                        stop_token_ids=[ask.stop],
                        n=ask.n,
                        seed=3,
                        logprobs=1,
                        prompt_logprobs=ask.prompt_logprobs,
                    )
                    timeout = ask.expires if ends else None
                    stream: Any = "delta" if ask.delta else True
                    e.add_request(str(i), ask.prompt, params, stream=stream, priority=ask.priority, timeout=timeout)
                if ends and ask.aborted is not None and ask.arrives + ask.aborted == number:
                    output = e.abort(str(i))
                    if output is not None:
                        take(output, ask)
            if number > 9 and not e.has_unfinished_requests():
                break
            for output in e.step():
                take(output, given[int(output.request_id)])
            now[0] += 1
        else:
            raise AssertionError("it goes on for ever")
    assert len(last) == len(given)
    assert e.scheduler.blocks.num_free == executor.num_kv_blocks, "no block is leaked"
    return e, last, executor


def check_prompt_logprobs(ask: Ask, output: RequestOutput) -> None:
    """Each token's once, in order, whatever chunks and preemptions there were; and nothing from the cache."""
    if ask.prompt_logprobs is None:
        assert output.prompt_logprobs is None
        return
    assert output.num_cached_tokens == 0
    first, *others = output.prompt_logprobs or ()
    assert first is None
    assert [next(iter(found)) for found in others if found] == list(ask.prompt[1:])
    assert all(len(found or ()) == max(1, ask.prompt_logprobs) for found in others)


@settings(max_examples=150, deadline=None)
@given(plans, st.lists(asks, min_size=1, max_size=6))
def test_the_same_tokens_with_and_without(plan: dict[str, Any], given: list[Ask]) -> None:
    _, off, _ = play(plan, given, ends=False, async_scheduling=False)
    _, on, _ = play(plan, given, ends=False, async_scheduling=True)
    for i in range(len(given)):
        mine, theirs = on[str(i)], off[str(i)]
        assert sorted(mine.outputs, key=lambda c: c.index) == sorted(theirs.outputs, key=lambda c: c.index)
        assert mine.prompt_logprobs == theirs.prompt_logprobs
        check_prompt_logprobs(given[i], mine)


@settings(max_examples=150, deadline=None)
@given(plans, st.lists(asks, min_size=1, max_size=6))
def test_aborts_and_time_outs_cut_a_request_short_and_change_no_other_token(
    plan: dict[str, Any], given: list[Ask]
) -> None:
    _, whole, _ = play(plan, given, ends=False, async_scheduling=False)
    e, cut, _ = play(plan, given, ends=True, async_scheduling=True)
    for i, ask in enumerate(given):
        mine = {c.index: c for c in cut[str(i)].outputs}
        for theirs in whole[str(i)].outputs:
            found = mine[theirs.index]
            assert len(found.logprobs or ()) == len(found.token_ids)
            if found.finish_reason in ("abort", "timeout"):
                assert found.token_ids == theirs.token_ids[: len(found.token_ids)]
                assert (ask.aborted if found.finish_reason == "abort" else ask.expires) is not None
            else:
                assert found == theirs
                check_prompt_logprobs(ask, cut[str(i)])
    assert e.stats().num_running == e.stats().num_waiting == 0


@settings(max_examples=50, deadline=None)
@given(plans, st.lists(asks, min_size=1, max_size=6))
def test_the_same_calls_give_the_same_steps(plan: dict[str, Any], given: list[Ask]) -> None:
    first, second = (play(plan, given, ends=True, async_scheduling=True)[2].steps for _ in range(2))
    assert first == second


# ------------------------------------------------------------------------------------------ real models


PROMPTS = [
    "The quick brown",
    "Paris is",
    "1 2 3 4 5 6 7 8 9 10 1 2 3",
    "Grüße",
    "One token after another, the model",
] * 2
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=1.3, seed=4, max_tokens=20, n=2),
    SamplingParams(temperature=0, repetition_penalty=1.4, presence_penalty=0.5, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=9, frequency_penalty=1.0, min_tokens=12, max_tokens=20),
    SamplingParams(temperature=0.9, top_p=0.8, seed=2, max_tokens=20, logprobs=2, stop=["e", "a"]),
    SamplingParams(temperature=1.0, seed=5, max_tokens=20, structured_outputs=StructuredOutputs(regex="[a-z ]{3,12}")),
    SamplingParams(temperature=0, max_tokens=20, structured_outputs=StructuredOutputs(choice=["Paris", "Rome"])),
    SamplingParams(temperature=1.0, seed=6, max_tokens=20, bad_words=["the", "a"], logit_bias={5: 4.0, 60: -9.0}),
    SamplingParams(temperature=1.0, seed=7, max_tokens=20, allowed_token_ids=list(range(1, 40)), min_tokens=4),
    SamplingParams(temperature=0, max_tokens=20, stop_token_ids=list(range(100, 200)), prompt_logprobs=1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@functools.cache
def said(folder: Path, **options: Any) -> list[list[tuple[list[int], str, str | None]]]:
    """What the model says to the prompts; the cache is so small that sequences are preempted."""
    settings: dict[str, Any] = {"threads": 1, "block_size": 4, "num_kv_blocks": 32, "max_model_len": 96}
    with LLM(folder, **(settings | options)) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert sum(o.metrics.num_preemptions for o in outputs) > 0
        assert llm.engine.stats().num_free_kv_blocks == 32
        return [[(c.token_ids, c.text, c.finish_reason) for c in o.outputs] for o in outputs]


def test_one_process_says_the_same(folder: Path) -> None:
    off, on = said(folder, async_scheduling=False), said(folder, async_scheduling=True)
    assert on == off
    assert {reason for request in on for _, _, reason in request} == {"stop", "length"}
    assert on[6][0][1] in ("Paris", "Rome")


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_kubernetes_workers_say_the_same(folder: Path, tensor_parallel_size: int) -> None:
    options: dict[str, Any] = {"executor": "k8s", "tensor_parallel_size": tensor_parallel_size}
    assert said(folder, async_scheduling=True, **options) == said(folder, async_scheduling=False)


def test_a_step_that_fails_while_the_next_is_in_flight_ends_the_engine_with_its_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightvllm.errors import LightvllmError, WorkerError
    from lightvllm.worker import model_runner

    calls: list[int] = []
    sample: Callable[..., Any] = model_runner.sample

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise LightvllmError("the third step fails")
        return sample(*args)

    with LLM(folder, threads=1, async_scheduling=True) as llm:
        monkeypatch.setattr(model_runner, "sample", failing)
        with pytest.raises(WorkerError, match="the third step fails"):
            llm.generate("Paris is", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        with pytest.raises(LightvllmError, match="the engine stopped after WorkerError"):
            llm.generate("Paris is")

"""The step loop over a fake executor whose tokens are known: nothing that the scheduler does may change a text."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from fake_engine import EOS, OTHER_EOS, engine, finish
from fake_executor import NextToken, scrambled, scripted

from lightvllm.engine.engine import LLMEngine, Prompt
from lightvllm.engine.outputs import CompletionOutput, RequestOutput
from lightvllm.engine.request import Stream
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout, Shutdown, WorkerDied
from lightvllm.messages import StepInput, StepOutput
from lightvllm.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_dir(tiny_tokenizers.byte_level(folder))


def one(e: LLMEngine, prompt: Prompt, **params: Any) -> CompletionOutput:
    e.add_request("only", prompt, SamplingParams(**({"temperature": 0, "max_tokens": 50} | params)))
    return finish(e)["only"].outputs[0]


def saying(tokenizer: Tokenizer, text: str, *then: int) -> NextToken:
    """What follows the one-token prompt "x"."""
    return scripted([*tokenizer.encode(text), *then], prompt_len=1)


# ---------------------------------------------------------------------------------- what ends a sequence


def test_vllm_s_default_is_sixteen_tokens() -> None:
    e, _ = engine(lambda tokens, seed: 9)
    e.add_request("a", [5])
    assert len(finish(e)["a"].outputs[0].token_ids) == 16


@pytest.mark.parametrize("eos", [EOS, OTHER_EOS])
def test_an_end_of_sequence_token_ends_it(tokenizer: Tokenizer, eos: int) -> None:
    e, _ = engine(saying(tokenizer, "hello", eos), tokenizer)
    out = one(e, "x")
    assert (out.text, out.finish_reason, out.token_ids[-1]) == ("hello", "stop", eos)


@pytest.mark.parametrize(("ignore_eos", "expected"), [(False, [EOS, OTHER_EOS, 9]), (True, [9])])
def test_the_workers_know_which_tokens_end_it(ignore_eos: bool, expected: list[int]) -> None:
    e, executor = engine(scrambled(200))
    one(e, [5], stop_token_ids=[9], ignore_eos=ignore_eos)
    assert executor.steps[0].new[0].stop_token_ids == expected


def test_the_context_s_end_ends_it() -> None:
    e, _ = engine(scrambled(200), max_model_len=20)
    out = one(e, [5] * 12, max_tokens=None, ignore_eos=True)
    assert (len(out.token_ids), out.finish_reason) == (8, "length")


def test_the_cache_s_end_ends_it() -> None:
    e, _ = engine(scrambled(200), num_kv_blocks=3)
    e.add_request("a", [5] * 4, SamplingParams(max_tokens=None, ignore_eos=True))
    e.add_request("b", [6] * 4, SamplingParams(max_tokens=None, ignore_eos=True))
    out = finish(e)
    assert [len(out[i].outputs[0].token_ids) for i in "ab"] == [9, 9], "12 in the cache, and the one after them"
    assert {out[i].outputs[0].finish_reason for i in "ab"} == {"length"}


# ------------------------------------------------------------------------------- what may not matter


def texts(**options: Any) -> tuple[list[list[int]], int]:
    """The tokens of twenty requests with common beginnings, and how often one was preempted."""
    e, _ = engine(scrambled(200), **options)
    for i in range(20):
        prompt = [7] * (i % 5 * 4) + list(range(10, 10 + i % 7 + 1))
        e.add_request(str(i), prompt, SamplingParams(max_tokens=5 + i, ignore_eos=True), stream=i % 2 == 0)
    out = finish(e)
    assert e.scheduler.blocks.num_free == e.executor.num_kv_blocks
    preemptions = sum(out[str(i)].metrics.num_preemptions for i in range(20))
    return [out[str(i)].outputs[0].token_ids for i in range(20)], preemptions


def test_batching_chunks_caching_preemption_and_depth_do_not_change_a_token() -> None:
    expected, preemptions = texts(max_num_seqs=1, caching=False, budget=200)
    assert preemptions == 0
    assert len({tuple(ids) for ids in expected}) == 20
    for depth in (1, 2, 3):
        assert texts(depth=depth) == (expected, 0)
        assert texts(depth=depth, caching=False, budget=8) == (expected, 0)
        for caching in (True, False):
            tokens, preemptions = texts(depth=depth, num_kv_blocks=13, caching=caching)
            assert tokens == expected
            assert preemptions > 0


def test_the_pipeline_is_kept_full() -> None:
    e, executor = engine(scrambled(200), depth=3)
    for i in range(6):
        e.add_request(str(i), [i + 5], SamplingParams(max_tokens=4, ignore_eos=True))
    e.step()
    assert [len(step.scheduled) for step in executor.steps] == [2, 2, 2]
    e.step()
    assert len(executor.steps) == 4


def test_the_same_requests_give_the_same_steps_and_the_engine_s_seed_counts() -> None:
    def steps(seed: int) -> list[StepInput]:
        e, executor = engine(scrambled(200), seed=seed, depth=2)
        for i in range(5):
            e.add_request(str(i), [i + 5], SamplingParams(max_tokens=9))
        finish(e)
        return executor.steps

    assert steps(3) == steps(3)
    assert steps(3) != steps(4)


def test_a_user_s_seed_moves_no_other_request_s() -> None:
    def seeds(seed: int | None) -> list[int]:
        e, executor = engine(scrambled(200))
        for params in (SamplingParams(seed=seed, n=2), SamplingParams()):
            e.add_request(str(params), [5], params)
        e.step()
        return [new.seed for new in executor.steps[0].new]

    drawn, given = seeds(None), seeds(77)
    assert given == [77, 78, drawn[2]]
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**63 for seed in (*drawn, *seeds(-1), *seeds(2**63 - 1)))


# ------------------------------------------------------------------------------------------- outputs


def test_a_stream_grows_and_holds_back_what_is_not_yet_text(tokenizer: Tokenizer) -> None:
    e, _ = engine(saying(tokenizer, "aß東", EOS), tokenizer)
    e.add_request("a", "x", SamplingParams(max_tokens=20))
    seen = []
    while e.has_unfinished_requests():
        seen += e.step()
    assert [o.outputs[0].text for o in seen] == ["a", "a", "aß", "aß", "aß", "aß東", "aß東"]
    assert [len(o.outputs[0].token_ids) for o in seen] == [1, 2, 3, 4, 5, 6, 7], "an output is a snapshot"
    assert [o.finished for o in seen] == [False] * 6 + [True]


def test_without_streaming_only_the_end_is_reported() -> None:
    e, _ = engine(scrambled(200))
    e.add_request("a", [5], SamplingParams(max_tokens=3, ignore_eos=True), stream=False)
    assert [[o.finished for o in e.step()] for _ in range(3)] == [[], [], [True]]


def test_a_request_with_several_sequences_shares_its_prompt() -> None:
    e, executor = engine(scrambled(200))
    prompt = list(range(5, 14))
    e.add_request("a", prompt, SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    out = finish(e)["a"]
    assert [c.index for c in out.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in out.outputs}) == 3
    assert [(row.start, row.count) for row in executor.steps[0].scheduled] == [(0, 9), (8, 1), (8, 1)]
    assert (out.prompt, out.prompt_token_ids, out.num_cached_tokens) == (None, prompt, 0)


def test_logprobs_are_collected(tokenizer: Tokenizer) -> None:
    e, _ = engine(saying(tokenizer, "hello w"), tokenizer)
    out = one(e, "x", max_tokens=2, logprobs=2)
    assert out.logprobs is not None
    assert out.cumulative_logprob == -1.0
    for token_id, found in zip(out.token_ids, out.logprobs, strict=True):
        assert list(found) == [token_id, token_id + 1]
        assert (found[token_id].logprob, found[token_id].rank) == (-0.5, 1)
        assert (found[token_id + 1].logprob, found[token_id + 1].rank) == (-1.5, 2)
    assert [found[i].decoded_token for i, found in zip(out.token_ids, out.logprobs, strict=True)] == ["hello", " w"]
    e, _ = engine(saying(tokenizer, "hello w"), tokenizer)
    assert (one(e, "x").logprobs, one(e, "x").cumulative_logprob) == (None, None)


def test_metrics_and_timings(tokenizer: Tokenizer) -> None:
    e, _ = engine(saying(tokenizer, "hello world"), tokenizer)
    e.add_request("a", "x", SamplingParams(max_tokens=3))
    m = finish(e)["a"].metrics
    assert m.first_scheduled_time is not None
    assert m.first_token_time is not None
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time
    assert m.finished_time == m.last_token_time
    assert [(t.step, t.num_seqs, t.num_tokens) for t in e.timings] == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]
    assert all(t.seconds >= t.model_seconds == 1e-6 for t in e.timings)


def test_each_step_can_be_observed(tokenizer: Tokenizer) -> None:
    seen: list[tuple[int, int, list[str]]] = []
    e, _ = engine(
        scrambled(200),
        budget=8,
        on_step=lambda step_input, output, batch: seen.append(
            (step_input.step, output.step, [seq.request_id for seq in batch.sampled])
        ),
    )
    e.add_request("a", [5] * 12, SamplingParams(max_tokens=2, ignore_eos=True))
    finish(e)
    assert seen == [(1, 1, []), (2, 2, ["a"]), (3, 3, ["a"])]


# ------------------------------------------------------------------------------- streams of what is new


@pytest.mark.parametrize("depth", [1, 2])
def test_a_delta_stream_tells_everything_once(tokenizer: Tokenizer, depth: int) -> None:
    def outputs(stream: Stream) -> list[RequestOutput]:
        e, _ = engine(saying(tokenizer, "aß東 hello world", EOS), tokenizer, depth=depth)
        e.add_request("a", "x", SamplingParams(n=2, max_tokens=20, logprobs=1, stop="wor"), stream=stream)
        seen = []
        while e.has_unfinished_requests():
            seen += e.step()
        return seen

    cumulative, deltas = outputs(True), outputs("delta")
    assert len(cumulative) == len(deltas) > 3
    assert all(len(c.token_ids) == len(c.logprobs or ()) == 1 for o in deltas for c in o.outputs)
    merged = deltas[0]
    for number, delta in enumerate(deltas):
        if number:
            merged.add(delta)
        expected = cumulative[number]
        for mine, theirs in zip(merged.outputs, expected.outputs, strict=False):
            assert mine == theirs
        assert merged.finished == expected.finished
    assert [c.text for c in merged.outputs] == ["aß東 hello "] * 2
    assert deltas[0].prompt_token_ids == cumulative[0].prompt_token_ids


def test_a_delta_stream_that_is_aborted_tells_the_rest(tokenizer: Tokenizer) -> None:
    e, _ = engine(saying(tokenizer, "hello world"), tokenizer)
    e.add_request("a", "x", SamplingParams(max_tokens=20, stop="hello there"), stream="delta")
    (out,) = e.step()[0].outputs
    assert (out.text, len(out.token_ids)) == ("", 1), "it may become the stop string"
    end = e.abort("a")
    assert end is not None
    assert (end.outputs[0].text, end.outputs[0].token_ids, end.outputs[0].finish_reason) == ("hello", [], "abort")


# --------------------------------------------------------------------------------- priorities, time-outs


def test_a_lower_priority_number_goes_first_and_is_preempted_last() -> None:
    e, executor = engine(scrambled(200), max_num_seqs=2, num_kv_blocks=6, caching=False)
    for name, priority in (("late", 5), ("first", -1), ("second", 5), ("middle", 0)):
        e.add_request(name, [7] * 4, SamplingParams(max_tokens=16, ignore_eos=True), priority=priority)
    ended = []
    while e.has_unfinished_requests():
        ended += [o for o in e.step() if o.finished]
    assert [o.request_id for o in ended] == ["first", "middle", "late", "second"]
    assert [row.seq_id for row in executor.steps[0].scheduled] == [1, 3]
    preempted = {o.request_id: o.metrics.num_preemptions for o in ended}
    assert preempted["first"] == 0
    assert preempted["middle"] > 0


def test_a_waiting_request_never_preempts() -> None:
    e, _ = engine(scrambled(200), max_num_seqs=1)
    e.add_request("running", [5], SamplingParams(max_tokens=4, ignore_eos=True))
    e.step()
    e.add_request("urgent", [5], SamplingParams(max_tokens=4, ignore_eos=True), priority=-9)
    assert [o.request_id for _ in range(3) for o in e.step()] == ["running"] * 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The engine's time, in its one element."""
    now = [1000.0]
    monkeypatch.setattr("lightvllm.engine.engine.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_past_its_time_out_ends_where_it_stands(tokenizer: Tokenizer, clock: list[float], depth: int) -> None:
    e, executor = engine(saying(tokenizer, "hello 東", 9, 9, 9), tokenizer, max_num_seqs=2, depth=depth)
    params = SamplingParams(max_tokens=9, stop="o tt")
    for name, timeout in (("running", 5), ("other", None), ("waiting", 4.5), ("in time", 100.0)):
        e.add_request(name, "x", params, timeout=timeout, stream=name != "waiting")
    for _ in range(2 * depth):
        e.step()
    clock[0] += 4.9
    (gone,) = e.expire()
    assert (gone.request_id, gone.finished, gone.outputs[0].finish_reason) == ("waiting", True, "timeout")
    assert gone.outputs[0].token_ids == []
    clock[0] += 0.2
    gone = e.step()[0]
    assert (gone.request_id, gone.outputs[0].finish_reason, gone.outputs[0].text) == ("running", "timeout", "hello ")
    assert gone.metrics.finished_time == clock[0]
    out = finish(e)
    assert {name: o.outputs[0].finish_reason for name, o in out.items()} == {"other": "length", "in time": "length"}
    assert [seq_id for step in executor.steps for seq_id in step.finished].count(0) == 1
    assert e.scheduler.blocks.num_free == 64
    clock[0] += 1000
    assert e.step() == e.expire() == []


def test_the_time_out_of_a_name_s_former_bearer_does_not_count(clock: list[float]) -> None:
    e, _ = engine(scrambled(200))
    e.add_request("a", [5], timeout=1)
    e.abort("a")
    e.add_request("a", [5], timeout=9)
    clock[0] += 2
    assert e.expire() == []
    clock[0] += 8
    assert [o.request_id for o in e.expire()] == ["a"]


def test_time_outs_of_requests_that_ended_are_not_kept_for_ever() -> None:
    e, _ = engine(scrambled(200))
    for i in range(1000):
        e.add_request(str(i), [5], SamplingParams(max_tokens=1), timeout=3600)
        assert finish(e)[str(i)].finished
    assert len(e._deadlines) < 100


# ------------------------------------------------------------------------------------------- aborts


def test_an_abort_ends_a_request_wherever_it_stands(tokenizer: Tokenizer) -> None:
    e, executor = engine(saying(tokenizer, "hello 東", 9, 9, 9), tokenizer, max_num_seqs=1)
    for name in ("running", "waiting", "other"):
        e.add_request(name, "x", SamplingParams(max_tokens=9, stop="o tt"))
    e.step()
    e.step()
    out = e.abort("running")
    assert out is not None
    assert (out.finished, out.outputs[0].finish_reason, out.outputs[0].text) == (True, "abort", "hello ")
    assert e.abort("running") is None
    waiting = e.abort("waiting")
    assert waiting is not None
    assert waiting.outputs[0].token_ids == []
    assert waiting.num_cached_tokens is None
    assert list(finish(e)) == ["other"]
    assert [seq_id for step in executor.steps for seq_id in step.finished] == [0]


def test_an_abort_in_flight_leaves_the_others_alone() -> None:
    e, _ = engine(scrambled(200), depth=2)
    for i in range(4):
        e.add_request(str(i), [i + 5], SamplingParams(max_tokens=6, ignore_eos=True))
    e.step()
    for i in (1, 2):  # one waits for its next step, one is in flight
        e.abort(str(i))
    assert sorted(finish(e)) == ["0", "3"]
    assert e.scheduler.blocks.num_free == 64


def test_a_request_id_may_be_used_again_when_it_is_free() -> None:
    e, _ = engine(scrambled(200))
    e.add_request("a", [5])
    with pytest.raises(ConfigError, match="request_id='a' is in use"):
        e.add_request("a", [5])
    e.abort("a")
    e.add_request("a", [5])


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([5, 266], {}, "token id 266 is not in the vocabulary; use 0 to 265"),
        ([-1], {}, "token id -1 is not"),
        ([5] * 20, {}, "20 tokens, but max_model_len=20 .* shorten it to 19"),
        ([5] * 17, {}, "17 tokens, but the whole KV cache holds 16 .*num_kv_blocks=4 × block_size=4"),
        ([1.5], {}, "expected text or a list of token ids"),
        (None, {}, "expected text or a list of token ids"),
        ({"text": "x"}, {}, r"keys \['text'\]; expected prompt_token_ids"),
        ([5], {"stop_token_ids": [300]}, r"stop_token_ids=\[300\] are not in the vocabulary"),
    ],
)
def test_bad_requests_are_refused(tokenizer: Tokenizer, prompt: Any, params: dict[str, Any], text: str) -> None:
    e, _ = engine(scrambled(200), tokenizer, max_model_len=20, num_kv_blocks=4)
    with pytest.raises(ConfigError, match=text):
        e.add_request("a", prompt, SamplingParams(**params))
    assert not e.has_unfinished_requests()
    assert e.step() == []


def test_what_is_no_sampling_params_is_refused() -> None:
    e, _ = engine(scrambled(200))
    with pytest.raises(ConfigError, match=r"sampling_params is \{'n': 2\}; expected SamplingParams"):
        e.add_request("a", [5], {"n": 2})  # type: ignore[arg-type]


def test_without_a_tokenizer_there_is_no_text() -> None:
    e, _ = engine(scrambled(200))
    with pytest.raises(ConfigError, match="no tokenizer; give prompt_token_ids"):
        e.add_request("a", "x")
    with pytest.raises(ConfigError, match="no tokenizer; use stop_token_ids"):
        e.add_request("a", [5], SamplingParams(stop="x"))
    assert one(e, {"prompt_token_ids": [5], "prompt": "five"}).text == ""


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("error", [WorkerDied("w0", "killed by SIGKILL", 0), RpcTimeout("no reply")])
def test_after_a_failed_step_the_engine_says_so(error: LightvllmError) -> None:
    e, executor = engine(scrambled(200))
    executor.fail_at[2] = error
    e.add_request("a", [5])
    e.step()
    with pytest.raises(type(error)):
        e.step()
    for call in (e.step, lambda: e.add_request("b", [5])):
        with pytest.raises(LightvllmError, match=f"the engine stopped after {type(error).__name__}: .*make a new one"):
            call()


def test_an_answer_to_another_question_is_not_taken() -> None:
    e, executor = engine(scrambled(200))
    e.add_request("a", [5])
    wrong: Future[StepOutput] = Future()
    wrong.set_result(StepOutput(step=1, seq_ids=[4], token_ids=[5]))
    executor.execute_model = lambda scheduler_output, non_block=False: wrong  # type: ignore[method-assign]
    with pytest.raises(LightvllmError, match=r"for sequences \[4\]; expected step 1 for \[0\]"):
        e.step()


def test_an_interrupted_wait_can_be_taken_up_again() -> None:
    e, executor = engine(scrambled(200))
    e.add_request("a", [5], SamplingParams(max_tokens=3, ignore_eos=True))
    execute = executor.execute_model

    class Interrupted(Future[StepOutput]):
        """As when Ctrl-C arrives while the engine waits for a worker."""

        def __init__(self, real: Future[StepOutput]) -> None:
            super().__init__()
            self.real, self.waits = real, 0

        def result(self, timeout: float | None = None) -> StepOutput:
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return self.real.result(timeout)

    def interrupted(scheduler_output: StepInput, non_block: bool = False) -> Future[StepOutput]:
        executor.execute_model = execute  # type: ignore[method-assign]
        return Interrupted(execute(scheduler_output, non_block))

    executor.execute_model = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        e.step()
    assert len(finish(e)["a"].outputs[0].token_ids) == 3
    assert len(executor.steps) == 3


@pytest.mark.parametrize("method", ["schedule", "update"])
def test_an_engine_that_is_interrupted_while_it_plans_or_takes_in_a_step_says_so(method: str) -> None:
    e, _ = engine(scrambled(200))
    e.add_request("a", [5], SamplingParams(max_tokens=3, ignore_eos=True))
    real = getattr(e.scheduler, method)

    def interrupted(*given: object) -> None:
        real(*given)
        raise KeyboardInterrupt

    setattr(e.scheduler, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        e.step()
    setattr(e.scheduler, method, real)
    with pytest.raises(LightvllmError, match="the engine stopped after KeyboardInterrupt"):
        e.step()
    assert e.abort("a") is not None


def test_after_shutdown_the_engine_says_so() -> None:
    e, executor = engine(scrambled(200))
    e.add_request("a", [5])
    e.shutdown()
    e.shutdown()
    assert executor.num_shutdowns == 2, "the executor's own shutdown is idempotent"
    assert not e.has_unfinished_requests()
    with pytest.raises(Shutdown):
        e.step()

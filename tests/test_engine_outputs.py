"""What a delta stream tells, put together again."""

from __future__ import annotations

import pytest

from lightvllm.engine.outputs import CompletionOutput, EmbeddingOutput, Logprob, RequestMetrics, RequestOutput
from lightvllm.errors import LightvllmError


def completion(index: int, text: str, token_id: int, finish_reason: str | None = None) -> CompletionOutput:
    logprobs = [{token_id: Logprob(-1.0, 1, text)}]
    return CompletionOutput(index, text, [token_id], -float(token_id), logprobs, finish_reason)  # type: ignore[arg-type]


def output(outputs: list[CompletionOutput], finished: bool = False, cached: int | None = 2) -> RequestOutput:
    return RequestOutput("a", "x", [1, 2, 3], outputs, finished, RequestMetrics(1.0), cached)


def test_deltas_of_a_completion_become_one_which_says_what_the_last_one_says_of_the_whole() -> None:
    told, later = completion(0, "a", 5), completion(0, "b", 6, "length")
    logprobs = told.logprobs
    told.add(later)
    assert told == CompletionOutput(
        0, "ab", [5, 6], -6.0, [{5: Logprob(-1.0, 1, "a")}, {6: Logprob(-1.0, 1, "b")}], "length"
    )
    assert told.finished
    assert told.logprobs is logprobs, "it costs what is new, not what there is"
    assert later == completion(0, "b", 6, "length")


def test_what_comes_without_log_probabilities_adds_none() -> None:
    told = CompletionOutput(0, "", [])
    told.add(CompletionOutput(0, "a", [5]))
    assert told.logprobs is None
    told.add(later := completion(0, "b", 6))
    assert told.logprobs == later.logprobs
    assert told.logprobs is not later.logprobs


def test_deltas_of_a_request_go_to_their_sequences() -> None:
    told = output([completion(1, "a", 5)], cached=None)
    told.prompt_logprobs = [None]
    told.add(output([completion(0, "c", 7), completion(1, "b", 6)], finished=True))
    assert [(o.index, o.text, o.token_ids) for o in told.outputs] == [(1, "ab", [5, 6]), (0, "c", [7])]
    assert told.finished
    assert told.num_cached_tokens == 2
    assert told.prompt_logprobs == [None]


def test_an_embedding_that_did_not_come_is_an_error() -> None:
    done = output([CompletionOutput(0, "", [], finish_reason="stop")], finished=True)
    done.embedding = [0.5]
    assert EmbeddingOutput.of(done) == EmbeddingOutput("a", [1, 2, 3], [0.5], 2)
    done = output([CompletionOutput(0, "", [], finish_reason="timeout")], finished=True)
    with pytest.raises(LightvllmError, match="embedding a ended with timeout"):
        EmbeddingOutput.of(done)

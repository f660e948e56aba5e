"""One sequence's text and what ends it: vLLM's rules, token by token, without an engine."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from lightvllm.engine.outputs import CompletionOutput, Logprob
from lightvllm.engine.request import Completion, Request
from lightvllm.engine.sequence import Sequence
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.messages import TokenLogprobs
from lightvllm.sampling_params import SamplingParams

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_dir(tiny_tokenizers.byte_level(folder))


def completion(tokenizer: Tokenizer | None, **params: Any) -> Completion:
    sampling = SamplingParams(**({"max_tokens": 50} | params))
    stop = [*(sampling.stop_token_ids or ()), *([] if sampling.ignore_eos else [EOS])]
    seq = Sequence(0, "r", [9, 9], prompt_len=2, seed=0, sampling=sampling, stop_token_ids=frozenset(stop))
    if sampling.max_tokens is not None:
        seq.max_len = seq.prompt_len + sampling.max_tokens
    return Completion(0, seq, tokenizer)


def after(
    tokenizer: Tokenizer | None, token_ids: ListOf[int], *, max_len: int = 100, **params: Any
) -> CompletionOutput:
    """The output after these tokens; none may come after the one that ends it."""
    c = completion(tokenizer, **params)
    c.seq.max_len = min(c.seq.max_len, max_len)
    for number, token_id in enumerate(token_ids, 1):
        c.seq.token_ids.append(token_id)
        if c.append(None, [EOS]):
            assert number == len(token_ids), "it ended before the last token"
    return c.output()


def test_unfinished_it_has_no_reason(tokenizer: Tokenizer) -> None:
    out = after(tokenizer, tokenizer.encode("hello w"))
    assert (out.text, out.finish_reason, out.stop_reason, out.finished) == ("hello w", None, None, False)


def test_max_tokens_ends_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello w")
    out = after(tokenizer, ids, max_tokens=2)
    assert (out.text, out.finish_reason, out.stop_reason, out.finished) == ("hello w", "length", None, True)
    assert out.token_ids == ids


def test_the_longest_length_counts_the_prompt(tokenizer: Tokenizer) -> None:
    assert after(tokenizer, [9, 9, 9], max_len=5, max_tokens=None).finish_reason == "length"
    assert after(tokenizer, [9, 9], max_len=5, max_tokens=None).finish_reason is None


def test_an_end_of_sequence_token_is_not_in_the_text(tokenizer: Tokenizer) -> None:
    out = after(tokenizer, [*tokenizer.encode("hello"), EOS], skip_special_tokens=False)
    assert (out.text, out.finish_reason, out.stop_reason, out.token_ids[-1]) == ("hello", "stop", None, EOS)


def test_an_ignored_end_of_sequence_token_is_a_token(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hello"), EOS]
    out = after(tokenizer, ids, skip_special_tokens=False, ignore_eos=True)
    assert (out.text, out.finish_reason) == ("hello<|eos|>", None)
    assert after(tokenizer, ids, ignore_eos=True, stop_token_ids=[EOS]).stop_reason == EOS


def test_a_stop_token_is_in_the_text_only_if_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello w")
    out = after(tokenizer, ids, stop_token_ids=ids[1:])
    assert (out.text, out.finish_reason, out.stop_reason, out.token_ids) == ("hello", "stop", ids[1], ids)
    assert after(tokenizer, ids, stop_token_ids=ids[1:], include_stop_str_in_output=True).text == "hello w"


def test_before_min_tokens_no_stop_token_counts(tokenizer: Tokenizer) -> None:
    (x,) = tokenizer.encode("x")
    assert after(tokenizer, [x] * 4, stop_token_ids=[x], min_tokens=5).finish_reason is None
    assert after(tokenizer, [x] * 5, stop_token_ids=[x], min_tokens=5).finish_reason == "stop"


def test_a_stop_string_cuts_the_text_but_not_the_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello w")
    out = after(tokenizer, ids, stop=["lo w", "zz"])
    assert (out.text, out.finish_reason, out.stop_reason, out.token_ids) == ("hel", "stop", "lo w", ids)


def test_a_stop_string_in_the_last_token_wins_over_length(tokenizer: Tokenizer) -> None:
    out = after(tokenizer, tokenizer.encode("hello"), stop="lo", max_tokens=1)
    assert (out.finish_reason, out.stop_reason) == ("stop", "lo")


def test_what_is_held_back_comes_with_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x東")[:3]
    assert after(tokenizer, ids).text == "x"
    assert after(tokenizer, ids, max_tokens=3).text == "x\ufffd"
    c = completion(tokenizer, stop="xx")
    c.seq.token_ids += tokenizer.encode("x")
    c.append(None, [EOS])
    assert c.output().text == ""
    c.finish("abort")
    assert (c.output().text, c.output().finish_reason) == ("x", "abort")


def test_log_probabilities_name_their_tokens(tokenizer: Tokenizer) -> None:
    hello, w = tokenizer.encode("hello w")
    c = completion(tokenizer, logprobs=2)
    for chosen, found in (
        (hello, TokenLogprobs(-0.5, 1, [hello, w], [-0.5, -2.0])),
        (w, TokenLogprobs(-3.0, 9, [hello, EOS], [-0.25, -1.0])),
    ):
        c.seq.token_ids.append(chosen)
        c.append(found, [EOS])
    out = c.output()
    assert out.cumulative_logprob == -3.5
    assert out.logprobs == [
        {hello: Logprob(-0.5, 1, "hello"), w: Logprob(-2.0, 2, " w")},
        {w: Logprob(-3.0, 9, " w"), hello: Logprob(-0.25, 1, "hello"), EOS: Logprob(-1.0, 2, "<|eos|>")},
    ]
    assert list(out.logprobs[1]) == [w, hello, EOS], "the chosen one first"


def test_a_request_is_finished_when_all_its_sequences_are() -> None:
    both = [completion(None), completion(None)]
    request = Request("r", "text", both, stream=True, arrival_time=1.0)
    both[0].finish("abort")
    early = request.output()
    both[1].finish("abort")
    both[1].seq.num_preemptions = 2
    assert (early.finished, request.output().finished) == (False, True)
    assert (early.metrics.num_preemptions, request.output().metrics.num_preemptions) == (0, 2)
    assert (early.request_id, early.prompt, early.prompt_token_ids) == ("r", "text", [9, 9])

"""What a request may be; the prompts and parameters that are refused are in test_engine_engine.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_tokenizers
from fake_engine import engine
from fake_executor import scrambled

from lightvllm.engine.intake import MAX_BAD_WORDS, MAX_BAD_WORDS_CHARS
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError
from lightvllm.messages import NewSequence
from lightvllm.sampling_params import SamplingParams, StructuredOutputs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"logit_bias": {266: 1.0, 5: 1.0}}, r"logit_bias=\[266\] are not in the vocabulary; use 0 to 265"),
        ({"allowed_token_ids": [-1, 5, 300]}, r"allowed_token_ids=\[-1, 300\] are not in the vocabulary"),
        ({"bad_words": ["x"] * (MAX_BAD_WORDS + 1)}, "bad_words has 1025 words; use at most 1024"),
        ({"bad_words": ["x" * MAX_BAD_WORDS_CHARS, "y"]}, "bad_words have 32769 characters; use at most 32768"),
        (
            {"structured_outputs": StructuredOutputs(regex="a")},
            "its folder has no tokenizer",
        ),
    ],
)
def test_bad_parameters_are_refused(tokenizer: Tokenizer, params: dict[str, Any], text: str) -> None:
    e, _ = engine(scrambled(200), tokenizer)
    with pytest.raises(ConfigError, match=text):
        e.add_request("a", [5], SamplingParams(**params))
    assert not e.has_unfinished_requests()


def test_bad_words_need_text() -> None:
    e, _ = engine(scrambled(200))
    with pytest.raises(ConfigError, match=r"bad_words=\('x',\) need text, but there is no tokenizer; use logit_bias"):
        e.add_request("a", [5], SamplingParams(bad_words=["x"]))


def test_bad_words_reach_the_workers_with_and_without_a_space(tokenizer: Tokenizer) -> None:
    e, executor = engine(scrambled(200), tokenizer)
    e.add_request("a", [5], SamplingParams(bad_words=["hello", " hello", "\n"], max_tokens=2))
    e.step()
    new: NewSequence = executor.steps[0].new[0]
    assert [tokenizer.decode(word) for word in new.bad_words] == ["hello", " hello", "\n", " \n"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"priority": 1.0}, "priority=1.0; use an integer from -2147483647 to 2147483647, lower goes first"),
        ({"priority": True}, "priority=True; use an integer"),
        ({"priority": 2**31}, "priority=2147483648; use an integer"),
        ({"priority": None}, "priority=None; use an integer"),
        ({"timeout": 0}, "timeout=0; use a positive number of seconds, or None"),
        ({"timeout": -1.0}, "timeout=-1.0; use a positive number"),
        ({"timeout": math.inf}, "timeout=inf; use a positive number"),
        ({"timeout": math.nan}, "timeout=nan; use a positive number"),
        ({"timeout": "1"}, "timeout='1'; use a positive number"),
        ({"timeout": True}, "timeout=True; use a positive number"),
        ({"stream": "final"}, "stream='final'; use True, False or 'delta'"),
        ({"stream": 1}, "stream=1; use True, False or 'delta'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], text: str) -> None:
    e, _ = engine(scrambled(200))
    with pytest.raises(ConfigError, match=text):
        e.add_request("a", [5], **options)
    assert not e.has_unfinished_requests()
    assert e.step() == []


def test_the_ends_of_the_range_are_taken() -> None:
    e, _ = engine(scrambled(200))
    for name, priority in (("a", 2**31 - 1), ("b", -(2**31) + 1)):
        e.add_request(name, [5], priority=priority, timeout=1e9)
    assert [seq.request_id for seq in e.scheduler.waiting] == ["b", "a"]

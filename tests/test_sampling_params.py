"""``SamplingParams``: what is refused and why, and that it crosses the wire unchanged."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lightvllm import SamplingParams
from lightvllm.errors import ConfigError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n=0 is not allowed; use 1 or more"),
        ({"n": 2.0}, "n=2.0 is not allowed; expected an integer"),
        ({"n": True}, "n=True is not allowed; expected an integer"),
        ({"n": 2, "temperature": 0}, "the same text 2 times"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot' is not allowed; expected a number"),
        ({"top_p": 0}, r"top_p=0 is not allowed; use a number in \(0, 1\]"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_k": 2**64}, "at most 64 bits"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 17}, "use at most max_tokens=16"),
        ({"logprobs": 21}, "use 0 to 20, or None"),
        ({"logprobs": True}, "expected an integer or None"),
        ({"stop": [""]}, "not empty"),
        ({"stop": [1]}, "use strings"),
        ({"stop": 1}, "expected a list or None"),
        ({"stop_token_ids": ["a"]}, "use token ids"),
        ({"ignore_eos": 1}, "expected True or False"),
    ],
)
def test_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**wrong)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop=["x", "y"], stop_token_ids=[1]).stop_token_ids == (1,)


def test_crosses_the_wire_unchanged() -> None:
    params = SamplingParams(temperature=0.5, top_k=4, seed=2**63 - 1, stop=["a", "é"], stop_token_ids=[3], logprobs=2)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert back == params
    assert SamplingParams(temperature=0).greedy
    assert not params.greedy

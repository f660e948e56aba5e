"""``SamplingParams``: what is refused and why, and that it crosses the wire unchanged."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lightvllm import SamplingParams
from lightvllm.errors import ConfigError
from lightvllm.sampling_params import StructuredOutputs


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
        ({"min_tokens": 2**64, "max_tokens": None}, "min_tokens=.* at most 64 bits"),
        ({"temperature": 10**400}, "temperature=.* at most 64 bits"),
        ({"n": 2**64}, "n=.* at most 64 bits"),
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
        ({"prompt_logprobs": 21}, "prompt_logprobs=21 is not allowed; use 0 to 20, or None"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        ({"logit_bias": [1]}, "expected a mapping or None"),
        ({"logit_bias": {"1": 1.0}}, r"use token ids \(integers\) as keys"),
        ({"logit_bias": {True: 1.0}}, r"use token ids \(integers\) as keys"),
        ({"logit_bias": {7: 100.5}}, r"logit_bias\[7\]=100.5 is not allowed; use a number in \[-100, 100\]"),
        ({"logit_bias": {7: float("nan")}}, r"logit_bias\[7\]=nan"),
        ({"logit_bias": {7: "1"}}, r"logit_bias\[7\]='1'"),
        ({"allowed_token_ids": []}, "use token ids, or None"),
        ({"allowed_token_ids": [1.5]}, "use token ids, or None"),
        ({"allowed_token_ids": 7}, "expected a list or None"),
        ({"bad_words": "word"}, "expected a list or None"),
        ({"bad_words": [""]}, "use strings that are not empty"),
        ({"bad_words": ["\ud800"]}, "in UTF-8"),
        ({"stop": ["\ud800"]}, "in UTF-8"),
        ({"bad_words": [3]}, "use strings that are not empty"),
        ({"structured_outputs": {"regex": "a"}}, "expected StructuredOutputs or None"),
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "structured_outputs has none; give exactly one of"),
        ({"json_object": False}, "has none"),
        ({"regex": "a", "json_object": True}, "has regex and json_object"),
        ({"json_object": 1}, "expected True or False"),
        ({"regex": "\ud800"}, "in UTF-8"),
        ({"regex": ""}, "expected text that is not empty"),
        ({"grammar": 7}, "expected text that is not empty"),
        ({"json": []}, "expected a JSON schema"),
        ({"json": ""}, "expected a JSON schema"),
        ({"json": {"const": object()}}, "no JSON schema"),
        ({"json": {"const": float("inf")}}, "no JSON schema"),
        ({"choice": "yes"}, "expected a list of strings"),
        ({"choice": []}, "use strings that are not empty"),
        ({"choice": ["yes", ""]}, "use strings that are not empty"),
    ],
)
def test_structured_outputs_are_one_thing_and_whole(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StructuredOutputs(**wrong)


def test_a_schema_is_kept_as_text_in_the_order_of_its_keys() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}
    text = '{"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "\\u00e9"}}}'
    assert StructuredOutputs(json=schema).json == text == StructuredOutputs(json=text).json
    assert StructuredOutputs(json={}).json == "{}"


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutputs(json={"type": "integer"}),
        StructuredOutputs(regex="a+"),
        StructuredOutputs(choice=["yes", "no"]),
        StructuredOutputs(grammar='root ::= "a"'),
        StructuredOutputs(json_object=True),
    ],
    ids=lambda structured: structured.kind,
)
def test_every_field_crosses_the_wire_and_can_be_hashed(structured: StructuredOutputs) -> None:
    params = SamplingParams(
        logit_bias={5: 1, 3: -100.0},
        allowed_token_ids=[1, 2],
        bad_words=["no", "\n"],
        prompt_logprobs=0,
        structured_outputs=structured,
    )
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    assert back == params
    assert len({back, params, SamplingParams()}) == 2
    assert params.logit_bias == {5: 1.0, 3: -100.0}
    assert SamplingParams(logit_bias={}, bad_words=None) == SamplingParams()

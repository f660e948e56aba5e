"""Constraints on sampling: whatever a random model says is of the grammar, and ends where the grammar does."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import tiny_tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightvllm.grammar
from lightvllm.config import ModelConfig
from lightvllm.errors import LightvllmError
from lightvllm.layers import structured as module
from lightvllm.layers.sampler import SamplingState, sample
from lightvllm.layers.structured import Grammars
from lightvllm.sampling_params import SamplingParams, StructuredOutputs

EOS, VOCAB = 1, 300
"""The tokenizer has 266 tokens; the logits, padded, 300 columns."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("model"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelConfig.from_dir(folder, load_format="dummy")


@pytest.fixture(scope="module")
def grammars(model: ModelConfig) -> Grammars:
    return Grammars(model)


def run(
    grammars: Grammars, params: SamplingParams, seed: int, steps: int = 400, replay: int | None = None
) -> tuple[list[int], SamplingState]:
    """Sample with random logits until the end-of-sequence token; ``replay``: at that token, begin anew as after a
    preemption. Logits depend on the place in the output alone."""
    assert params.structured_outputs is not None

    def new(output: list[int]) -> SamplingState:
        constraint = grammars.constraint(params.structured_outputs)  # type: ignore[arg-type]
        return SamplingState(params, seed, 2, [EOS], [5, 6, *output], constraint=constraint)

    state = new([])
    for index in range(steps):
        if index == replay:
            state = new(state.token_ids[2:])
        x = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed * 1000 + index)) * 2
        token = sample(x, [state])[0][0]
        if state.error:
            break
        state.token_ids.append(token)
        if token == EOS:
            break
    return state.token_ids[2:], state


def text_of(model: ModelConfig, output: list[int]) -> str:
    from tokenizers import Tokenizer

    text: str = Tokenizer.from_file(f"{model.path}/tokenizer.json").decode(output, skip_special_tokens=True)
    return text


LEAVES: list[tuple[dict[str, Any], Any]] = [
    ({"type": "integer", "minimum": -5, "maximum": 500}, lambda v: isinstance(v, int) and -5 <= v <= 500),
    ({"type": "boolean"}, lambda v: isinstance(v, bool)),
    ({"type": "null"}, lambda v: v is None),
    ({"type": "string", "maxLength": 6}, lambda v: isinstance(v, str) and len(v) <= 6),
    ({"enum": ["red", "grün", 7]}, lambda v: v in ["red", "grün", 7]),
]


def checked_schemas() -> Any:
    """Schemas with what their values must pass."""

    def array(item: Any) -> Any:
        schema, ok = item
        return {
            "type": "array",
            "items": schema,
            "maxItems": 3,
        }, lambda v: isinstance(v, list) and len(v) <= 3 and all(map(ok, v))

    def record(fields: Any) -> Any:
        schema = {
            "type": "object",
            "properties": {name: inner for name, (inner, _) in fields.items()},
            "required": list(fields),
            "additionalProperties": False,
        }
        return (
            schema,
            lambda v: (
                isinstance(v, dict) and list(v) == list(fields) and all(ok(v[name]) for name, (_, ok) in fields.items())
            ),
        )

    def deeper(inner: Any) -> Any:
        names = st.sampled_from(["a", "b", "name", "é"])
        return inner.map(array) | st.dictionaries(names, inner, max_size=3).map(record)

    return st.recursive(st.sampled_from(LEAVES), deeper, max_leaves=4)


@settings(max_examples=40, deadline=None)
@given(checked=checked_schemas(), seed=st.integers(0, 1000), temperature=st.sampled_from([0.0, 1.0, 5.0]))
def test_a_random_model_fills_any_schema(
    model: ModelConfig, grammars: Grammars, checked: Any, seed: int, temperature: float
) -> None:
    schema, ok = checked
    params = SamplingParams(
        temperature=temperature, max_tokens=None, structured_outputs=StructuredOutputs(json=schema), ignore_eos=True
    )
    output, state = run(grammars, params, seed, steps=1500)
    assert state.error is None
    assert output[-1] == EOS
    assert ok(json.loads(text_of(model, output)))


@settings(max_examples=40, deadline=None)
@given(
    regex=st.sampled_from(
        [r"[a-f]{3,9}", r"(ab|cd)*x", r"[0-9]{1,4}(\.[^a-z])?", "é+|ü", r"[a-z_. ]{0,20}", "(hello )?world"]
    ),
    seed=st.integers(0, 1000),
)
def test_a_random_model_keeps_to_any_regex(model: ModelConfig, grammars: Grammars, regex: str, seed: int) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(regex=regex))
    output, state = run(grammars, params, seed)
    assert state.error is None
    if output[-1] == EOS:
        assert re.fullmatch(regex, text_of(model, output))
    else:
        assert len(output) == 400


@settings(max_examples=25, deadline=None)
@given(
    choice=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_a_random_model_takes_one_of_the_choices(
    model: ModelConfig, grammars: Grammars, choice: list[str], seed: int
) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(choice=choice))
    output, state = run(grammars, params, seed)
    assert state.error is None
    assert text_of(model, output) in choice


@pytest.mark.parametrize("replay", [1, 3, 10])
def test_a_recomputed_sequence_goes_on_as_it_would_have(grammars: Grammars, replay: int) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 6}
    params = SamplingParams(structured_outputs=StructuredOutputs(json=schema))
    for seed in range(5):
        assert run(grammars, params, seed, replay=replay)[0] == run(grammars, params, seed)[0]


def test_the_end_is_allowed_where_the_grammar_may_end_and_forced_where_it_must(grammars: Grammars) -> None:
    constraint = grammars.constraint(StructuredOutputs(regex="xy?"))
    (x,) = constraint.allowed([], VOCAB).tolist()
    eos, y = constraint.allowed([x], VOCAB).tolist()
    assert eos == EOS
    assert constraint.allowed([x, y], VOCAB).tolist() == [EOS]
    assert constraint.allowed([x, y, EOS], VOCAB).tolist() == [EOS]
    # What was sampled before the driver knew of the end does no harm.
    assert constraint.allowed([x, y, EOS, EOS], VOCAB).tolist() == [EOS]


def test_a_minimum_length_gives_way_to_the_end_of_the_grammar(grammars: Grammars) -> None:
    params = SamplingParams(min_tokens=10, structured_outputs=StructuredOutputs(regex="x{2,4}"))
    for seed in range(5):
        assert len(run(grammars, params, seed)[0]) == 5  # as long as it can be, and the end


def test_other_masks_hold_within_the_grammar(model: ModelConfig, grammars: Grammars) -> None:
    digits = grammars.constraint(StructuredOutputs(regex="[0-9]")).allowed([], VOCAB).tolist()
    params = SamplingParams(
        structured_outputs=StructuredOutputs(regex="[0-9]{5}"),
        allowed_token_ids=[*digits[:3], EOS],
        logit_bias={digits[0]: -100},
    )
    tokens = {token for seed in range(10) for token in run(grammars, params, seed)[0]}
    assert tokens == {digits[1], digits[2], EOS}


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (StructuredOutputs(regex="(?=a)b"), "look-around"),
        (StructuredOutputs(json={"type": "strin"}), "structured_outputs: Invalid type: strin"),
        (StructuredOutputs(json="{"), "no JSON schema"),
        (StructuredOutputs(regex="(a|b)*a(a|b){200}"), "too many states"),
    ],
)
def test_a_grammar_that_fails_ends_its_sequence_alone(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, grammar: StructuredOutputs, message: str
) -> None:
    monkeypatch.setattr(lightvllm.grammar, "_MAX_LEXER_STATES", 60)
    grammars = Grammars(model)
    bad = SamplingParams(structured_outputs=grammar)
    good = SamplingParams(structured_outputs=StructuredOutputs(choice=["yes"]))
    states = [
        SamplingState(p, 0, 1, [EOS], [5], constraint=grammars.constraint(p.structured_outputs))  # type: ignore[arg-type]
        for p in (good, bad, good)
    ]
    for index in range(300):
        x = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(index))
        tokens, _ = sample(x, states)
        assert tokens[0] == tokens[2]
        for state, token in zip(states, tokens, strict=True):
            state.token_ids.append(token)
        if states[1].error:
            break
    assert message in str(states[1].error)
    assert "\n" not in str(states[1].error)
    assert states[0].error is None


def test_a_token_that_is_not_of_the_grammar_is_an_error(grammars: Grammars) -> None:
    constraint = grammars.constraint(StructuredOutputs(choice=["yes"]))
    with pytest.raises(LightvllmError, match="doesn't satisfy the grammar"):
        constraint.allowed([4], VOCAB)


def test_compiled_grammars_are_kept_up_to_a_bound(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    original = module._compile

    def spy(model: ModelConfig, structured: StructuredOutputs) -> Any:
        compiled.append(structured.regex)
        return original(model, structured)

    monkeypatch.setattr(module, "_compile", spy)
    monkeypatch.setattr(module, "MAX_COMPILED", 2)
    grammars = Grammars(model)
    for regex in ("a", "b", "a", "c", "a", "b"):
        assert len(grammars.constraint(StructuredOutputs(regex=regex)).allowed([], VOCAB)) >= 1
    assert compiled == ["a", "b", "c", "b"]


def test_the_tokens_of_a_padded_vocabulary_are_never_allowed(grammars: Grammars) -> None:
    allowed = grammars.constraint(StructuredOutputs(regex="(.|\n)*")).allowed([], VOCAB)
    assert allowed.max() < 266
    assert np.all(np.diff(allowed) > 0)

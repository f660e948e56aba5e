"""Structured outputs through an engine: refused early and in one line, kept by any model on any layout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_llama

from lightvllm import LLM, SamplingParams, hub
from lightvllm.config import ModelConfig
from lightvllm.engine import structured as module
from lightvllm.engine.outputs import CompletionOutput
from lightvllm.engine.structured import check_structured
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError
from lightvllm.sampling_params import StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
KINDS = [
    StructuredOutputs(json=SCHEMA),
    StructuredOutputs(regex="[a-c]{2,5}!"),
    StructuredOutputs(choice=["yes", "no", "Grüße"]),
    StructuredOutputs(grammar='root ::= "(" [0-9]{1,3} ("," [0-9]{1,2}){0,3} ")"'),
]
MANY_PATTERNS = {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(20)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return ModelConfig.from_dir(folder)


def fits(structured: StructuredOutputs, text: str) -> bool:
    if structured.json is not None:
        value = json.loads(text)
        return (
            list(value) == ["name", "age", "tags"]
            and len(value["name"]) <= 4
            and 0 <= value["age"] <= 99
            and set(value["tags"]) <= {"a", "b"}
        )
    pattern = structured.regex or r"\([0-9]{1,3}(,[0-9]{1,2}){0,3}\)"
    return text in structured.choice if structured.choice else re.fullmatch(pattern, text) is not None


def params(structured: StructuredOutputs, seed: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**({"seed": seed, "max_tokens": 500, "structured_outputs": structured} | fields))


def answers(llm: LLM, seeds: int = 3, **fields: Any) -> list[CompletionOutput]:
    asked = [params(kind, seed, **fields) for kind in KINDS for seed in range(seeds)]
    return [output.outputs[0] for output in llm.generate(["Say: "] * len(asked), asked)]


def check_all(outputs: list[CompletionOutput], seeds: int = 3) -> None:
    kinds = [kind for kind in KINDS for _ in range(seeds)]
    for kind, output in zip(kinds, outputs, strict=True):
        assert (output.finish_reason, output.stop_reason) == ("stop", None), output
        assert fits(kind, output.text), output.text


def test_a_random_model_keeps_to_every_kind_also_when_preempted_and_in_any_batch(folder: Path) -> None:
    with LLM(folder, threads=1) as llm:
        roomy = answers(llm)
        alone = [llm.generate("Say: ", params(kind, seed))[0].outputs[0] for kind in KINDS for seed in range(3)]
    check_all(roomy)
    assert [o.token_ids for o in alone] == [o.token_ids for o in roomy]
    with LLM(folder, threads=1, max_model_len=200, num_kv_blocks=50, block_size=4) as llm:
        asked = [params(KINDS[0], seed, max_tokens=190) for seed in range(10)]
        outputs = llm.generate(["Say: "] * len(asked), asked)
        alone = [llm.generate("Say: ", one)[0].outputs[0] for one in asked]
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert [output.outputs[0].token_ids for output in outputs] == [o.token_ids for o in alone]


def test_it_ends_where_the_grammar_does_whatever_else_was_asked_for(folder: Path) -> None:
    with LLM(folder, threads=1) as llm:
        check_all(answers(llm, ignore_eos=True, min_tokens=100))
        check_all(answers(llm, temperature=0.0, bad_words=["yes"], seeds=1), seeds=1)
        no = StructuredOutputs(choice=["yes", "no"])
        for seed in range(4):
            assert llm.generate("?", params(no, seed, bad_words=["yes", "y"]))[0].outputs[0].text == "no"


def test_every_layout_keeps_to_it_and_one_rank_says_the_same_on_either_executor(folder: Path) -> None:
    with LLM(folder, threads=1) as llm:
        expected = answers(llm)
    for tp, pp in ((1, 1), (2, 2)):
        with LLM(folder, executor="k8s", tensor_parallel_size=tp, pipeline_parallel_size=pp, threads=1) as llm:
            outputs = answers(llm)
        check_all(outputs)
        if tp == pp == 1:
            assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_without_asynchronous_scheduling_the_same_is_said(folder: Path) -> None:
    with LLM(folder, threads=1, async_scheduling=False) as one, LLM(folder, threads=1) as other:
        assert [o.token_ids for o in answers(one)] == [o.token_ids for o in answers(other)]


def test_a_request_that_fails_ends_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightvllm.grammar._MAX_LEXER_STATES", 60)
    bad = params(StructuredOutputs(regex="(a|b)*a(a|b){200}"), 0, logprobs=1)
    good = params(KINDS[2], 0)
    (q,) = Tokenizer.from_dir(folder).encode("q", add_special_tokens=False)
    nothing = SamplingParams(allowed_token_ids=[q], bad_words=["q"], max_tokens=4)
    with LLM(folder, threads=1) as llm:
        outputs = [o.outputs[0] for o in llm.generate(["Say: "] * 4, [good, bad, nothing, good])]
        again = llm.generate("Say: ", good)[0].outputs[0]
    assert outputs[0] == outputs[3] == again
    assert fits(KINDS[2], again.text)
    assert (outputs[1].finish_reason, outputs[2].finish_reason) == ("error", "error")
    assert "too many states" in str(outputs[1].stop_reason)
    assert len(outputs[1].token_ids) == len(outputs[1].logprobs or [])
    assert set(outputs[1].text) <= set("ab")
    assert "no token may be chosen" in str(outputs[2].stop_reason)
    assert (outputs[2].text, outputs[2].token_ids) == ("", [])


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        ({"regex": "(?=a)b"}, "the regex is refused: .*look-around"),
        ({"json": {"type": "strin"}}, "the json is refused: Invalid type: strin"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable schema"),
        ({"json": "{"}, "json is no JSON schema"),
        ({"grammar": "start: foo"}, "the grammar is refused: .*unknown name"),
        ({"grammar": "start: <|nobody|>"}, "the grammar is refused: .*unknown special token"),
        ({"grammar": "root ::= foo"}, "Rule 'foo' not found"),
    ],
)
def test_what_does_not_compile_is_refused_when_it_is_asked_for(
    model: ModelConfig, structured: dict[str, Any], message: str
) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(ConfigError, match=message) as refused:
            check_structured(StructuredOutputs(**structured), model)
        assert "\n" not in str(refused.value)


def test_an_engine_refuses_it_too(folder: Path) -> None:
    with LLM(folder, threads=1) as llm, pytest.raises(ConfigError, match="Invalid type: strin"):
        llm.generate("x", params(StructuredOutputs(json={"type": "strin"}), 0))


@pytest.mark.parametrize("schema", [MANY_PATTERNS, {"type": "integer", "multipleOf": 988027}])
def test_a_grammar_that_takes_for_ever_is_given_up(model: ModelConfig, schema: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"the json is refused: it takes more than 0\.5 s to compile"):
        check_structured(StructuredOutputs(json=schema), model)
    assert time.monotonic() - began < module.WALL_SECONDS


def test_what_is_given_up_is_tried_again(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    structured = StructuredOutputs(grammar='start: "&" "again"')
    monkeypatch.setattr(module, "WALL_SECONDS", 0.001)
    with pytest.raises(ConfigError, match=r"it was not compiled within 0\.001 s"):
        check_structured(structured, model)
    with module._ONE_AT_A_TIME, pytest.raises(ConfigError, match="too many intricate ones"):
        check_structured(structured, model)
    monkeypatch.setattr(module, "WALL_SECONDS", 60.0)
    check_structured(structured, model)


def test_a_long_or_intricate_grammar_is_compiled_apart(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    apart: list[Any] = []
    original = module._compiled_apart
    monkeypatch.setattr(module, "_compiled_apart", lambda question: apart.append(question) or original(question))
    check_structured(StructuredOutputs(grammar="start: A\nA: /.*a.*/ & /.*b.*/"), model)
    check_structured(StructuredOutputs(choice=["y" * 9000, "n" * 9000]), model)
    assert len(apart) == 1
    fields = {f"f{i}": {"type": "string", "pattern": f"^x{i}"} for i in range(9)}
    check_structured(StructuredOutputs(json={"type": "object", "properties": fields}), model)
    with pytest.raises(ConfigError, match=r"the grammar is refused: .*unknown name"):
        check_structured(StructuredOutputs(grammar='start: foo "&"'), model)
    assert len(apart) == 3


def test_the_compiler_s_process_takes_no_module_from_where_it_is_started(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server may be started in a folder that others write to."""
    (tmp_path / "llguidance.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    check_structured(StructuredOutputs(json={"type": "integer", "multipleOf": 3}), model)


def test_a_compiler_that_breaks_is_a_refusal(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sys", type("sys", (), {"executable": "/bin/false", "path": []}))
    with pytest.raises(ConfigError, match="it cannot be compiled"):
        check_structured(StructuredOutputs(grammar='start: "&" "breaks"'), model)


def test_the_compiler_s_process_reads_a_question_and_writes_what_is_wrong(model: ModelConfig) -> None:
    question = {"structured": {"regex": "("}, "path": model.path, "vocab_size": 331, "eos_token_ids": [1]}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "lightvllm.engine.structured"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.stdout.startswith("structured_outputs: the regex is refused:")
    assert ran.stderr == ""


def test_what_a_model_must_have(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(ConfigError, match="need an end-of-sequence token, and the model names none"):
        check_structured(KINDS[0], ModelConfig.from_dir(tmp_path, load_format="dummy"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"need the model's tokenizer, and its folder has no tokenizer\.json"):
        check_structured(KINDS[0], ModelConfig.from_dir(tmp_path, load_format="dummy"))


@pytest.mark.demo
@pytest.mark.slow
def test_smollm2_fills_a_pydantic_schema() -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        country: str
        population: int

    if not hub.installed("smollm2-135m"):
        pytest.skip("run: lightvllm models get smollm2-135m")
    asked = SamplingParams(
        temperature=0, max_tokens=80, structured_outputs=StructuredOutputs(json=City.model_json_schema())
    )
    message = "Describe Paris, the capital of France, as JSON with name, country and population."
    with LLM("smollm2-135m", max_model_len=512) as llm:
        output = llm.chat([{"role": "user", "content": message}], asked)[0].outputs[0]
    city = City.model_validate_json(output.text)
    assert output.finish_reason == "stop"
    assert city.name == "Paris"

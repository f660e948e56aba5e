"""Structured outputs as llguidance's grammars: what compiles, what is refused and how, and what a tokenizer gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from lightvllm.errors import ConfigError
from lightvllm.grammar import MAX_GRAMMAR_CHARS, grammar_text, limits, load_tokenizer, one_line
from lightvllm.sampling_params import StructuredOutputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer"))


def takes(folder: Path, structured: StructuredOutputs, text: str) -> bool:
    """Whether the whole text is of the grammar."""
    from llguidance import LLMatcher

    tokenizer = load_tokenizer(str(folder), 300, (1,))
    matcher = LLMatcher(tokenizer, grammar_text(structured), log_level=0, limits=limits())
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("structured", "good", "bad"),
    [
        ({"regex": r"[a-c]{2,3}/x"}, ["ab/x", "abc/x"], ["a/x", "ab/xx", "xab/x"]),
        ({"regex": "a\n\"'b"}, ["a\n\"'b"], ["ab"]),
        ({"choice": ["yes", 'say "é"\n', "\\", "y"]}, ["yes", "y", 'say "é"\n', "\\"], ["no", "", "ye", "yesy"]),
        ({"json_object": True}, ["{}", '{"a": [1, null]}'], ["[]", "1", '{"a": }']),
        ({"json": {"type": "integer", "maximum": 12}}, ["12", "-3"], ["13", "1.5", '"1"']),
        ({"json": '{"type": "array", "items": {"const": "é"}}'}, ["[]", '["é", "é"]'], ['["e"]', "{}"]),
        ({"json": {}}, ["null", "[{}]"], ["nul", "{]"]),
        ({"grammar": 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/'}, ["1", "1+20"], ["+", "1+"]),
        ({"grammar": 'root ::= [0-9]+ ("+" [0-9]+)*'}, ["1", "1+20"], ["+", "1+"]),
        ({"grammar": 'root ::= "(" root ")" | "x"'}, ["x", "((x))"], ["(x", "x)"]),
    ],
)
def test_what_is_of_the_grammar(folder: Path, structured: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert takes(folder, StructuredOutputs(**structured), text), text
    for text in bad:
        assert not takes(folder, StructuredOutputs(**structured), text), text


def test_blanks_between_the_tokens_of_json_are_bounded(folder: Path) -> None:
    structured = StructuredOutputs(json={"type": "array", "items": {"type": "integer"}})
    value = [1, 2, 3]
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":"))):
        assert takes(folder, structured, text), text
    assert not takes(folder, structured, "[1,  2]")
    assert not takes(folder, structured, "[1,\n\n2]")


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        ({"json": '{"type":'}, "json is no JSON schema"),
        ({"json": "[1]"}, "expected a JSON schema, an object"),
        ({"json": '{"type": "object"}, "lark_grammar": "start: x"'}, "json is no JSON schema"),
        ({"json": "[" * 100_000}, "json is no JSON schema"),
        ({"grammar": "root ::= foo"}, "the grammar cannot be read: Rule 'foo' not found"),
        ({"grammar": "root ::= ("}, "the grammar cannot be read"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "regex has 131073 characters; use at most 131072"),
        ({"choice": ["a" * MAX_GRAMMAR_CHARS, "b"]}, "choice has 131073 characters"),
    ],
)
def test_refused_before_it_is_compiled(structured: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        grammar_text(StructuredOutputs(**structured))
    assert "\n" not in str(refused.value)


def test_a_long_message_becomes_one_line_with_its_cause() -> None:
    text = 'at 1(8): invalid regex "(": regex parse error:\n   (\n   ^\nerror: unclosed group\n   1 | start'
    assert one_line(text) == 'at 1(8): invalid regex "(": regex parse error: error: unclosed group'
    assert one_line(ValueError()) == "ValueError"


def test_masks_cover_a_padded_vocabulary(folder: Path) -> None:
    assert load_tokenizer(str(folder), 300, (1,)).vocab_size == 300
    assert load_tokenizer(str(folder), 1, (1,)).vocab_size == 266
    assert load_tokenizer(str(folder), 300, (1, 2)).eos_tokens == [1, 2]


def test_a_tokenizer_with_truncation_and_one_of_the_other_kind(tmp_path: Path) -> None:
    file = tiny_tokenizers.byte_fallback(tmp_path / "fallback") / "tokenizer.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(raw), encoding="utf-8")
    assert takes(file.parent, StructuredOutputs(regex="hello wor+ld é"), "hello worrrrld é")


def test_what_structured_outputs_need_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need an end-of-sequence token"):
        load_tokenizer(str(tiny_tokenizers.byte_level(tmp_path / "a")), 300, ())
    with pytest.raises(ConfigError, match=r"cannot use .*nowhere/tokenizer\.json: "):
        load_tokenizer(str(tmp_path / "nowhere"), 300, (1,))
    (tmp_path / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(ConfigError, match="structured_outputs cannot use"):
        load_tokenizer(str(tmp_path), 300, (1,))

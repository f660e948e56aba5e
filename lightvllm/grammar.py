"""Structured outputs as llguidance knows them: grammar texts, their limits, and a model's tokenizer.

Both sides use it: the driver refuses what does not compile, the worker that samples compiles. Imports no torch;
llguidance (https://github.com/guidance-ai/llguidance) is imported when it is needed.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightvllm.errors import ConfigError
from lightvllm.sampling_params import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

MAX_GRAMMAR_CHARS = 128 * 1024
"""Of a schema, a regular expression, a grammar, or all choices together."""
_MAX_LEXER_STATES = 20_000
"""Of one grammar; each takes 1 to 2 KiB. llguidance's own limit would let a request take 500 MB."""
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_WHITESPACE = r"[\x20]?|\n[\x20\t]{0,40}"
"""Between the tokens of JSON. Without a bound, weak models go on with blanks for ever."""


def grammar_text(structured: StructuredOutputs) -> str:
    """What llguidance compiles. Raises ConfigError for what is no JSON, is no grammar, or is too long."""
    from llguidance import LLMatcher

    for name in ("json", "regex", "grammar"):
        _check_size(name, len(getattr(structured, name) or ""))
    if structured.json is not None:
        return _schema_grammar(str(structured.json))
    if structured.json_object:
        return _schema_grammar('{"type": "object"}')
    if structured.regex is not None:
        return LLMatcher.grammar_from_regex(structured.regex)
    if structured.grammar is not None:
        return LLMatcher.grammar_from_lark(_lark(structured.grammar))
    choice = structured.choice or ()
    _check_size("choice", sum(map(len, choice)))
    # Not as a rule: that has a bound of alternatives.
    return LLMatcher.grammar_from_regex("|".join(map(_literal, choice)))


def limits() -> LLParserLimits:
    """What a grammar may cost: llguidance's own bounds, by which a mask takes some 20 ms at worst, and less memory."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """The tokenizer of a model folder, whose masks cover the columns of the model's logits (mostly 0.2 s).

    A vocabulary that is padded has more columns than tokens; those beyond are never allowed. Raises ConfigError if
    there is no usable tokenizer.json, or no end-of-sequence token.
    """
    from llguidance import LLTokenizer

    file = Path(folder) / "tokenizer.json"
    if not eos_token_ids:
        raise ConfigError(
            f"structured_outputs need an end-of-sequence token, and {folder} names none; "
            "set eos_token_id in its config.json or generation_config.json"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        raw |= {"truncation": None, "padding": None}  # they are about batches of prompts
        needed = 1 + max(map(int, _ids(raw)), default=0)
        return LLTokenizer(json.dumps(raw), n_vocab=max(vocab_size, needed), eos_token=list(eos_token_ids))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"structured_outputs cannot use {file}: {one_line(error)}") from None


def one_line(error: object) -> str:
    """llguidance's messages go on with a picture of the grammar, and those of regular expressions begin with one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    cause = next((line for line in lines[1:] if line.startswith("error:")), "")
    return f"{lines[0]} {cause}".strip()[:500]


def _literal(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _ids(raw: dict[str, Any]) -> list[int]:
    vocab = raw["model"]["vocab"]
    known = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
    return known + [token["id"] for token in raw.get("added_tokens") or []]


def _check_size(name: str, size: int) -> None:
    if size > MAX_GRAMMAR_CHARS:
        raise ConfigError(f"structured_outputs: {name} has {size} characters; use at most {MAX_GRAMMAR_CHARS}")


def _schema_grammar(text: str) -> str:
    from llguidance import LLMatcher

    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"structured_outputs: json is no JSON schema: {one_line(error)}") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"structured_outputs: json is {text!r:.80}; expected a JSON schema, an object")
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
    except ValueError as error:  # half of a surrogate pair, say
        raise ConfigError(f"structured_outputs: the json is refused: {one_line(error)}") from None


def _lark(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if _GBNF_RULE.search(text) is None:
        return text
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # noqa: BLE001  the converter raises bare Exceptions
        raise ConfigError(f"structured_outputs: the grammar cannot be read: {one_line(error)}") from None

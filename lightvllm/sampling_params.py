"""``SamplingParams``: how the next token of a request is chosen. Names and defaults are vLLM's.

Imports nothing but msgspec, because both sides use it: the driver checks it, the worker samples by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from lightvllm.errors import ConfigError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0

_REAL, _INT, _OPTIONAL_INT = int | float, int, int | None
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), _REAL),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), _REAL),
    **dict.fromkeys(("n", "top_k", "min_tokens"), _INT),
    **dict.fromkeys(("seed", "max_tokens", "logprobs", "prompt_logprobs"), _OPTIONAL_INT),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"), bool),
    "stop": str | Iterable | None,
    **dict.fromkeys(("stop_token_ids", "bad_words", "allowed_token_ids"), Iterable | None),
    "logit_bias": Mapping | None,
}


def _said(kind: Any) -> str:
    names = {_REAL: "a number", _INT: "an integer", _OPTIONAL_INT: "an integer or None", bool: "True or False"}
    return names.get(kind, "a mapping or None" if kind == Mapping | None else "a list or None")


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Whether it is text that is not empty and can be encoded: a lone surrogate would fail only on its way."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A form that the output must have, given in exactly one way (vLLM's ``StructuredOutputsParams``).

    Whether a grammar compiles is found out when a request is added: it takes the model's tokenizer.

    Args:
        json: a JSON schema, as text or as a dict; kept as text, in the order of its keys.
        regex: a regular expression for the whole output (Rust's syntax, without look-around or back-references).
        choice: the output is one of these strings.
        grammar: a context-free grammar: Lark's notation, or EBNF in llama.cpp's (GBNF).
        json_object: any JSON object.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise ConfigError(f"json_object={self.json_object!r} is not allowed; expected True or False")
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise ConfigError(
                f"structured_outputs has {' and '.join(given) or 'none'}; "
                "give exactly one of json, regex, choice, grammar and json_object"
            )
        for name in ("regex", "grammar"):
            value: Any = getattr(self, name)
            if value is not None and not _is_text(value):
                raise ConfigError(f"{name}={value!r:.80} is not allowed; expected text that is not empty, in UTF-8")
        if self.json is not None:
            msgspec.structs.force_setattr(self, "json", _schema_text(self.json))
        if self.choice is not None:
            choice: Any = self.choice
            if isinstance(choice, str) or not isinstance(choice, Iterable):
                raise ConfigError(f"choice={choice!r:.80} is not allowed; expected a list of strings")
            choice = tuple(choice)
            if not choice or not all(map(_is_text, choice)):
                raise ConfigError(
                    f"choice={list(choice)!r:.80} is not allowed; use strings that are not empty, in UTF-8"
                )
            msgspec.structs.force_setattr(self, "choice", choice)

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in self.__struct_fields__ if getattr(self, name))


def _schema_text(schema: Any) -> str:
    if _is_text(schema):
        return str(schema)
    if not isinstance(schema, dict):
        raise ConfigError(f"json={schema!r:.80} is not allowed; expected a JSON schema, as text or as a dict")
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"json={schema!r:.80} is no JSON schema: {error}") from None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request is sampled; checked when it is made.

    Args:
        n: sequences to generate for the prompt, at least 1.
        temperature: 0 means greedy (the most probable token, ties to the lower id); otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probabilities add up to at least this; 1.0 keeps all.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        min_p: drop tokens less probable than this fraction of the most probable one.
        presence_penalty: subtracted once from the logit of each token already generated (OpenAI's definition).
        frequency_penalty: subtracted for each time the token was generated (OpenAI's definition).
        repetition_penalty: logits of tokens in the prompt or the output are divided by it when positive and
            multiplied when negative (CTRL, arXiv:1909.05858); 1.0 does nothing.
        seed: makes sampling repeatable, whatever else is in the batch; None draws one from the engine's seed.
        max_tokens: tokens to generate at most; None means up to the context's end.
        min_tokens: the end-of-sequence token and ``stop_token_ids`` are masked until so many were generated.
        stop: the output ends just before the first of these strings.
        stop_token_ids: the output ends with the first of these tokens.
        ignore_eos: go on after the end-of-sequence token.
        include_stop_str_in_output: keep the stop string at the end of the text.
        logprobs: return the log-probabilities of so many most probable tokens, and of the one chosen
            (0 to 20); None returns none. They are of the raw logits, before penalties and temperature.
        prompt_logprobs: the same for each token of the prompt but the first. Prompts that ask for it are computed
            in full: the prefix cache has no logits.
        logit_bias: added to the logits of these token ids, -100 to 100 each (OpenAI's definition).
        allowed_token_ids: only these tokens may be chosen; None allows all.
        bad_words: texts that may not be generated. The token that would complete one is masked, both where the word
            begins the output or follows a space and where it stands inside one (vLLM's rule).
        structured_outputs: a form that the output must have.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; {rule}")

        def finite(name: str) -> bool:
            return math.isfinite(getattr(self, name))

        for name, kind in _KINDS.items():
            value = getattr(self, name)
            need(isinstance(value, kind) and isinstance(value, bool) == (kind is bool), name, f"expected {_said(kind)}")
            need(not isinstance(value, int) or value.bit_length() < 64, name, "use a number of at most 64 bits")
        need(self.n >= 1, "n", "use 1 or more")
        need(finite("temperature") and self.temperature >= 0, "temperature", "use 0 (greedy) or a positive number")
        need(finite("top_p") and 0 < self.top_p <= 1, "top_p", "use a number in (0, 1]")
        need(self.top_k >= -1, "top_k", "use a positive number, or 0 or -1 for all tokens")
        need(finite("min_p") and 0 <= self.min_p <= 1, "min_p", "use a number in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            need(finite(name) and -2 <= getattr(self, name) <= 2, name, "use a number in [-2, 2]")
        need(
            finite("repetition_penalty") and self.repetition_penalty > 0, "repetition_penalty", "use a positive number"
        )
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "use 1 or more, or None")
        need(self.min_tokens >= 0, "min_tokens", "use 0 or more")
        if self.max_tokens is not None:
            need(self.min_tokens <= self.max_tokens, "min_tokens", f"use at most max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            need(count is None or 0 <= count <= MAX_LOGPROBS, name, f"use 0 to {MAX_LOGPROBS}, or None")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        need(all(map(_is_text, stop)), "stop", "use strings that are not empty, in UTF-8")
        stop_token_ids = tuple(self.stop_token_ids or ())
        need(all(map(_is_token_id, stop_token_ids)), "stop_token_ids", "use token ids")
        need(not isinstance(self.bad_words, str), "bad_words", "expected a list or None")
        bad_words = tuple(self.bad_words or ())
        need(all(map(_is_text, bad_words)), "bad_words", "use strings that are not empty, in UTF-8")
        settled: dict[str, Any] = {"stop": stop, "stop_token_ids": stop_token_ids, "bad_words": bad_words}
        if self.allowed_token_ids is not None:
            allowed = tuple(self.allowed_token_ids)
            need(bool(allowed) and all(map(_is_token_id, allowed)), "allowed_token_ids", "use token ids, or None")
            settled["allowed_token_ids"] = allowed
        if self.logit_bias is not None:
            need(all(map(_is_token_id, self.logit_bias)), "logit_bias", "use token ids (integers) as keys")
            bias: Any
            for token_id, bias in self.logit_bias.items():
                is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
                if not (is_number and -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS):
                    raise ConfigError(f"logit_bias[{token_id}]={bias!r} is not allowed; use a number in [-100, 100]")
            settled["logit_bias"] = {token_id: float(bias) for token_id, bias in self.logit_bias.items()} or None
        structured: Any = self.structured_outputs
        need(
            structured is None or isinstance(structured, StructuredOutputs),
            "structured_outputs",
            "expected StructuredOutputs or None",
        )
        for name, value in settled.items():
            msgspec.structs.force_setattr(self, name, value)
        if self.n > 1 and self.greedy:
            raise ConfigError(
                f"n={self.n} with temperature=0 gives the same text {self.n} times; use n=1 or a temperature"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def __hash__(self) -> int:
        """Msgspec's own would fail for the mapping ``logit_bias``."""
        return hash(tuple(_hashable(getattr(self, name)) for name in self.__struct_fields__))


def _hashable(value: Any) -> Any:
    return frozenset(value.items()) if isinstance(value, dict) else value

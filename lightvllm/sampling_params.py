"""``SamplingParams``: how the next token of a request is chosen. Names and defaults are vLLM's.

Imports nothing but msgspec, because both sides use it: the driver checks it, the worker samples by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from lightvllm.errors import ConfigError

MAX_LOGPROBS = 20

_REAL, _INT, _OPTIONAL_INT = int | float, int, int | None
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), _REAL),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), _REAL),
    **dict.fromkeys(("n", "top_k", "min_tokens"), _INT),
    **dict.fromkeys(("seed", "max_tokens", "logprobs"), _OPTIONAL_INT),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"), bool),
    "stop": str | Iterable | None,
    "stop_token_ids": Iterable | None,
}


def _said(kind: Any) -> str:
    names = {_REAL: "a number", _INT: "an integer", _OPTIONAL_INT: "an integer or None", bool: "True or False"}
    return names.get(kind, "a list or None")


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
        for name in ("top_k", "seed", "max_tokens"):
            need((getattr(self, name) or 0).bit_length() < 64, name, "use a number of at most 64 bits")
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
        need(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"use 0 to {MAX_LOGPROBS}, or None"
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        need({type(s) for s in stop} <= {str} and all(stop), "stop", "use strings that are not empty")
        stop_token_ids = tuple(self.stop_token_ids or ())
        need(all(isinstance(i, int) for i in stop_token_ids), "stop_token_ids", "use token ids")
        msgspec.structs.force_setattr(self, "stop", stop)
        msgspec.structs.force_setattr(self, "stop_token_ids", stop_token_ids)
        if self.n > 1 and self.greedy:
            raise ConfigError(
                f"n={self.n} with temperature=0 gives the same text {self.n} times; use n=1 or a temperature"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

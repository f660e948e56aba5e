"""Chooses the next token of each row of logits.

A random choice is stateless: one uniform number, a hash of the request's seed and the token's place in the output,
picks from the distribution by its inverse cumulative function, taken in the order of falling probability in float64.
The same logits and seed therefore give the same token in any batch, on any worker, and again after a recompute.

The order is vLLM's: structured outputs, allowed tokens, bad words, minimum length, logit bias, penalties; then
temperature, min-p, top-k, top-p. The minimum length gives way to a structured output that nothing can go on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightvllm.errors import LightvllmError
from lightvllm.layers.logprobs import token_logprobs
from lightvllm.layers.structured import Constraint
from lightvllm.messages import TokenLogprobs
from lightvllm.sampling_params import SamplingParams

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Ids = np.ndarray[Any, np.dtype[np.intp]]
BadWords = Mapping[tuple[int, ...], Sequence[int]]
"""By what has gone before: the tokens that may not follow."""

_HEADS = (256, 4096)
"""Tokens that are sorted at first; they nearly always hold the choice, and the whole vocabulary is slow to sort."""
_MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class SamplingState:
    """What the choice of a sequence's next token depends on, besides the logits.

    Attributes:
        token_ids: prompt and output so far; the first ``prompt_len`` are the prompt.
        stop_token_ids: may not be chosen before ``params.min_tokens`` tokens are out.
        bad_words: of ``bad_words_table``.
        constraint: of ``params.structured_outputs``; it follows ``token_ids``.
        error: why no token could be chosen, once that has happened; the sequence must end then.
    """

    params: SamplingParams
    seed: int
    prompt_len: int
    stop_token_ids: list[int]
    token_ids: list[int]
    bad_words: BadWords = field(default_factory=dict)
    constraint: Constraint | None = None
    error: str | None = None

    @property
    def output_index(self) -> int:
        """Place in the output of the token to be chosen, from 0."""
        return len(self.token_ids) - self.prompt_len

    @property
    def moves_logits(self) -> bool:
        """Whether logits are changed and not only masked."""
        p = self.params
        penalties = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        return penalties or p.logit_bias is not None

    @property
    def leaves_logits(self) -> bool:
        """Whether logits are neither changed nor masked now."""
        limited = self.constraint is not None or self.params.allowed_token_ids is not None
        return not (limited or self.moves_logits or self.masked_until_min_tokens or self.ends_of_bad_words)

    @property
    def masked_until_min_tokens(self) -> list[int]:
        return self.stop_token_ids if self.output_index < self.params.min_tokens else []

    @property
    def ends_of_bad_words(self) -> list[int]:
        """Tokens that would complete a bad word; one may begin only in the output, as in vLLM."""
        if not self.bad_words:
            return []
        output = self.token_ids[self.prompt_len :]
        lengths = {len(before) for before in self.bad_words}
        ends = (self.bad_words.get(tuple(output[len(output) - n :]), ()) for n in lengths if n <= len(output))
        return [token_id for some in ends for token_id in some]


def bad_words_table(words: Iterable[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """``SamplingState.bad_words`` of words given as tokens, none empty."""
    table: dict[tuple[int, ...], list[int]] = {}
    for word in words:
        table.setdefault(tuple(word[:-1]), []).append(word[-1])
    return table


class _NothingLeft(LightvllmError):
    """All tokens are masked."""


def sample(logits: Tensor, rows: Sequence[SamplingState]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The token of each row of logits [R, V] (float32, not changed), and its log-probabilities where asked for.

    A row for which none can be chosen gets some token, and its state an ``error``; the others are not affected.
    """
    best, token_ids = _maxima(logits)
    if not all(map(math.isfinite, best)):
        raise LightvllmError("the model's logits are not finite; check the weights, or use dtype float32 or bfloat16")
    looked_at = [i for i, state in enumerate(rows) if not (state.params.greedy and state.leaves_logits)]
    for i, raw in zip(looked_at, _on_host(logits, looked_at), strict=True):
        state = rows[i]
        try:
            adjusted, ids = _adjust(raw, state)
        except LightvllmError as error:
            state.error = str(error)
            continue
        if state.params.greedy:
            place = int(np.argmax(adjusted))
        else:
            place = draw(adjusted, state.params, uniform(state.seed, state.output_index))
        token_ids[i] = place if ids is None else int(ids[place])
    return token_ids, _logprobs_where_asked(logits, token_ids, rows)


def _on_host(logits: Tensor, looked_at: list[int]) -> Iterable[Floats]:
    """These rows as arrays; brought from a device at once."""
    if not looked_at:
        return ()
    if logits.device.type == "cpu":
        host: Floats = logits.numpy()
        return (host[i] for i in looked_at)
    return list(logits[looked_at].cpu().numpy())


def _logprobs_where_asked(
    logits: Tensor, token_ids: Sequence[int], rows: Sequence[SamplingState]
) -> list[TokenLogprobs | None]:
    asked = {i: state.params.logprobs for i, state in enumerate(rows) if state.params.logprobs is not None}
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    if asked:
        chosen = logits if len(asked) == len(rows) else logits[list(asked)]
        found = token_logprobs(chosen, [token_ids[i] for i in asked], list(asked.values()))
        for i, one in zip(asked, found, strict=True):
            logprobs[i] = one
    return logprobs


def _maxima(logits: Tensor) -> tuple[list[float], list[int]]:
    """The largest logit of each row, and the lowest id that has it; a row with a NaN gives NaN."""
    if logits.device.type != "cpu":
        values, ids = torch.max(logits, dim=-1)
        return values.tolist(), ids.tolist()
    rows: Floats = logits.numpy()
    first: Ids = rows.argmax(axis=-1)  # ten times as fast as torch's on one thread
    return np.take_along_axis(rows, first[:, None], axis=-1)[:, 0].tolist(), first.tolist()


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for the token ``index`` of a request. (splitmix64: Steele et al., OOPSLA 2014)"""
    return (_mix(_mix(seed & _MASK64) + (index + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def draw(logits: Floats, params: SamplingParams, u: float) -> int:
    """The token at ``u`` in [0, 1) of the filtered distribution of logits [V]. The largest logit is finite."""
    vocab, largest = len(logits), logits.max()
    k = params.top_k if 0 < params.top_k < vocab else vocab
    heads = [k] if k < vocab else [*(head for head in _HEADS if head < vocab), vocab]
    total = 0.0
    if len(heads) > 1:
        total = float(_weights(logits, largest, params).sum())
    for head in heads:
        values = _largest(logits, head)
        cumulative = np.cumsum(_weights(values, largest, params))
        if head == heads[-1]:
            total = float(cumulative[-1])
        elif total * (params.top_p if params.top_p < 1.0 else u) < cumulative[-1]:
            break
    if params.top_p < 1.0:
        kept = min(int(np.searchsorted(cumulative, params.top_p * total)) + 1, len(cumulative))
        cumulative = cumulative[:kept]
        total = float(cumulative[-1])
    place = int(np.searchsorted(cumulative, u * total, side="right"))
    # Rounding may push u × total to the very end; tokens without weight are never chosen.
    place = min(place, int(np.searchsorted(cumulative, cumulative[-1])))
    # Equal ones come by rising id.
    value = values[place]
    return int(np.flatnonzero(logits == value)[place - int(np.argmax(values == value))])


def _weights(logits: Floats, largest: np.floating[Any], params: SamplingParams) -> Floats:
    """Probabilities as multiples of that of the best token, after temperature and min-p, in float64."""
    scaled = np.subtract(logits, largest, dtype=np.float64)
    if params.temperature != 1.0:
        scaled /= params.temperature
    if params.min_p > 0.0:
        scaled[scaled < np.log(params.min_p)] = -np.inf  # the best token has the weight exp(0)
    return np.exp(scaled, out=scaled)


def _largest(values: Floats, count: int) -> Floats:
    """The ``count`` largest ones, largest first."""
    if count < len(values):
        values = np.partition(values, len(values) - count)[len(values) - count :]
    return np.sort(values)[::-1]


def _adjust(raw: Floats, state: SamplingState) -> tuple[Floats, Ids | None]:
    """Logits after masks, bias and penalties, and the tokens that they are of, ascending; None for the vocabulary."""
    params, ids, ends = state.params, None, state.ends_of_bad_words
    if state.constraint is not None:
        ids = state.constraint.allowed(state.token_ids[state.prompt_len :], len(raw))
    if params.allowed_token_ids is not None:
        allowed = np.array(params.allowed_token_ids)
        ids = np.unique(allowed) if ids is None else ids[np.isin(ids, allowed)]
    adjusted = _moved(raw, state) if state.moves_logits else raw
    if ids is not None:
        adjusted = adjusted[ids]
    may = _without(adjusted, ids, [*state.masked_until_min_tokens, *ends])
    if state.constraint is not None and not _any_left(may):
        may = _without(adjusted, ids, ends)
    if not _any_left(may):
        raise _NothingLeft(
            "no token may be chosen: structured_outputs, allowed_token_ids, bad_words and min_tokens exclude them all; "
            "loosen one of them"
        )
    return may, ids


def _without(logits: Floats, ids: Ids | None, excluded: list[int]) -> Floats:
    """The logits of ``ids`` (None: of the vocabulary), those of excluded tokens at minus infinity."""
    if not excluded:
        return logits
    logits = logits.copy()
    logits[excluded if ids is None else np.isin(ids, excluded)] = -np.inf
    return logits


def _any_left(logits: Floats) -> bool:
    return len(logits) > 0 and bool(np.isfinite(logits.max()))


def _moved(raw: Floats, state: SamplingState) -> Floats:
    """A copy of the logits in float64 with the bias added and the penalties taken off."""
    params, moved = state.params, raw.astype(np.float64)
    if params.logit_bias is not None:
        moved[list(params.logit_bias)] += list(params.logit_bias.values())
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array(state.token_ids))
        moved[seen] *= np.where(moved[seen] > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output, counts = np.unique(np.array(state.token_ids[state.prompt_len :], dtype=np.int64), return_counts=True)
        moved[output] -= params.presence_penalty + params.frequency_penalty * counts
    return moved

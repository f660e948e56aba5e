"""Chooses the next token of each row of logits.

A random choice is stateless: one uniform number, a hash of the request's seed and the token's place in the output,
picks from the distribution by its inverse cumulative function, taken in the order of falling probability in float64.
The same logits and seed therefore give the same token in any batch, on any worker, and again after a recompute.
Filters follow vLLM's order: penalties, temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightvllm.errors import LightvllmError
from lightvllm.layers.logprobs import token_logprobs
from lightvllm.messages import TokenLogprobs
from lightvllm.sampling_params import SamplingParams

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Ids = np.ndarray[Any, np.dtype[np.intp]]

_HEAD = 256
"""Tokens that are sorted at first; they nearly always hold the choice, and the whole vocabulary is slow to sort."""
_MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class SamplingState:
    """What the choice of a sequence's next token depends on, besides the logits.

    Attributes:
        token_ids: prompt and output so far; the first ``prompt_len`` are the prompt.
        stop_token_ids: may not be chosen before ``params.min_tokens`` tokens are out.
    """

    params: SamplingParams
    seed: int
    prompt_len: int
    stop_token_ids: list[int]
    token_ids: list[int]

    @property
    def output_index(self) -> int:
        """Place in the output of the token to be chosen, from 0."""
        return len(self.token_ids) - self.prompt_len

    @property
    def has_penalties(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0


def sample(logits: Tensor, rows: Sequence[SamplingState]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The token of each row of logits [R, V] (float32, not changed), and its log-probabilities where asked for."""
    best, token_ids = _maxima(logits)
    if not all(map(math.isfinite, best)):
        raise LightvllmError("the model's logits are not finite; check the weights, or use dtype float32 or bfloat16")
    for i, state in enumerate(rows):
        masked = state.stop_token_ids if state.output_index < state.params.min_tokens else []
        changed = bool(masked) or state.has_penalties
        if state.params.greedy and not changed and state.params.logprobs is None:
            continue
        raw: Floats = logits[i].cpu().numpy()
        adjusted = _penalise(raw, state, masked) if changed else raw
        if state.params.greedy:
            token_ids[i] = int(np.argmax(adjusted))
        else:
            token_ids[i] = draw(adjusted, state.params, uniform(state.seed, state.output_index))
    return token_ids, _logprobs_where_asked(logits, token_ids, rows)


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
    scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    if params.min_p > 0.0:
        scaled[scaled < np.log(params.min_p)] = -np.inf  # the best token has the weight exp(0)
    vocab = len(scaled)
    k = params.top_k if 0 < params.top_k < vocab else vocab
    head = k if k < vocab else min(_HEAD, vocab)
    total = 0.0
    if k == vocab and head < vocab:
        total = float(np.exp(scaled).sum())
    while True:
        ids = _best(scaled, head)[:k]
        cumulative = np.cumsum(np.exp(scaled[ids]))
        if k < vocab or head == vocab:
            total = float(cumulative[-1])
        needed = total * (params.top_p if params.top_p < 1.0 else u)
        if head >= k or needed < cumulative[-1]:
            break
        head = vocab
    if params.top_p < 1.0:
        kept = min(int(np.searchsorted(cumulative, params.top_p * total)) + 1, len(ids))
        cumulative = cumulative[:kept]
        total = float(cumulative[-1])
    place = int(np.searchsorted(cumulative, u * total, side="right"))
    # Rounding may push u × total to the very end; tokens without weight are never chosen.
    last = int(np.searchsorted(cumulative, cumulative[-1]))
    return int(ids[min(place, last)])


def _best(values: Floats, count: int) -> Ids:
    """Ids in the order of falling value, equal ones by rising id: at least the first ``count``."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        ids = np.flatnonzero(values >= threshold)
        return ids[np.argsort(-values[ids], kind="stable")]
    return np.argsort(-values, kind="stable")


def _penalise(raw: Floats, state: SamplingState, masked: list[int]) -> Floats:
    """A copy of the logits with the penalties taken off and the masked tokens at minus infinity."""
    params, adjusted = state.params, raw.astype(np.float64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array(state.token_ids))
        adjusted[seen] *= np.where(adjusted[seen] > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output, counts = np.unique(np.array(state.token_ids[state.prompt_len :], dtype=np.int64), return_counts=True)
        adjusted[output] -= params.presence_penalty + params.frequency_penalty * counts
    adjusted[masked] = -np.inf
    return adjusted

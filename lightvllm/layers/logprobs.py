"""Log-probabilities of tokens under rows of logits, for sampled tokens and for those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightvllm.messages import TokenLogprobs

_ELEMENTS = 2**26
"""Logits that a device looks at in one go: their copy in float64 takes eight times as many bytes."""


def token_logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """For each row its token's log-probability and rank, and its most probable tokens.

    Args:
        logits: float32 [R, V], raw and finite; not changed. For ``prompt_logprobs`` a row is the logits at a prompt's
            position, and its token the next one of the prompt.
        token_ids: R tokens, one for each row.
        counts: how many of the most probable tokens each row wants, 0 to V; equal ones come by rising id.
    """
    if logits.device.type == "cpu":  # numpy's exponentials and selections are three times as fast as torch's there
        rows = logits.numpy()
        return [_row(row, token, count) for row, token, count in zip(rows, token_ids, counts, strict=True)]
    per_chunk = max(1, _ELEMENTS // logits.shape[-1])
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), per_chunk):
        chunk = slice(start, start + per_chunk)
        found += _on_device(logits[chunk], token_ids[chunk], counts[chunk])
    return found


def _row(row: np.ndarray[Any, np.dtype[np.float32]], token_id: int, count: int) -> TokenLogprobs:
    largest = row.max()
    shifted = np.subtract(row, largest, dtype=np.float64)
    log_total = float(np.log(np.exp(shifted, out=shifted).sum())) + float(largest)
    chosen = row[token_id]
    rank = 1 + int(np.count_nonzero(row > chosen))
    top_ids: list[int] = []
    if count:
        kth = len(row) - count
        near = np.flatnonzero(row >= np.partition(row, kth)[kth]) if kth else np.arange(len(row))
        top_ids = near[np.argsort(-row[near], kind="stable")][:count].tolist()
    return TokenLogprobs(float(chosen) - log_total, rank, top_ids, [float(row[i]) - log_total for i in top_ids])


def _on_device(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    log_total = torch.logsumexp(logits.double(), dim=-1)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = ((logits > chosen).sum(dim=-1) + 1).tolist()
    logprobs = (chosen[:, 0].double() - log_total).tolist()
    top_ids = _top(logits, max(counts))
    top_logprobs = (logits.gather(1, top_ids).double() - log_total[:, None]).tolist()
    return [
        TokenLogprobs(logprob, rank, ids[:count], values[:count])
        for logprob, rank, ids, values, count in zip(
            logprobs, ranks, top_ids.tolist(), top_logprobs, counts, strict=True
        )
    ]


def _top(logits: Tensor, count: int) -> Tensor:
    """Ids of the ``count`` largest logits of each row, largest first, equal ones by rising id: int64 [R, count]."""
    if count == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    values, ids = torch.topk(logits, count, dim=-1)
    # Which of equal ones topk takes, and in which order, is not defined.
    tied = (logits >= values[:, -1:]).sum(dim=-1) > count
    ids, by_id = ids.sort(dim=-1)
    ids = ids.gather(1, values.gather(1, by_id).sort(dim=-1, descending=True, stable=True).indices)
    if bool(tied.any()):
        ids[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return ids

"""The kernels' meaning, in torch's own operations: what every compiled kernel is compared with, and what runs
where none was compiled.

Shapes: T tokens of a flattened batch, S sequences, H query heads, G key/value heads, D head dimension,
B cache blocks of ``block_size`` tokens. The KV cache of a layer is two tensors [B, block_size, G, D].
Norms and softmax are computed in float32 whatever the input's dtype, as transformers does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension; x [T, N], weight [N]. (arXiv:1910.07467)"""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual += x`` in place; returns ``(rms_norm(residual), residual)``. Both [T, N]."""
    residual.add_(x)
    return rms_norm(residual, weight, eps), residual


def rotary_embedding(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    """Rotate query [T, H, D] and key [T, G, D] in place by their positions [T], NeoX style (halves, not pairs).

    ``cos_sin`` [max_position, D] holds the cosines in its first half and the sines in its second, float32.
    (arXiv:2104.09864)
    """
    cos, sin = cos_sin[positions].to(query.dtype).unsqueeze(1).chunk(2, dim=-1)
    for x in (query, key):
        left, right = x.chunk(2, dim=-1)
        rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        x.copy_(rotated)


def silu_and_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` for x = [gate | up], [T, 2N] to [T, N]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write key and value [T, G, D] to slots [T] (block × block_size + offset) of the caches [B, block_size, G, D]."""
    key_cache.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of query [T, H, D] over the paged cache, which holds the queries' own keys already.

    Sequence s has the query rows ``query_start_loc[s]`` to ``query_start_loc[s + 1]``, which are the last ones of
    its ``seq_lens[s]`` tokens; token j lies in block ``block_tables[s, j // block_size]``. Query head h reads
    key/value head ``h // (H / G)``. Returns [T, H, D].
    """
    block_size = key_cache.shape[1]
    out = torch.empty_like(query)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for s, length in enumerate(lengths):
        begin, end = starts[s], starts[s + 1]
        blocks = block_tables[s, : (length + block_size - 1) // block_size].long()
        k, v = (c[blocks].flatten(0, 1)[:length] for c in (key_cache, value_cache))
        group = query.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))
        q = query[begin:end].transpose(0, 1)
        scores = torch.matmul(q, k.transpose(1, 2)) * scale
        rows = torch.arange(length - (end - begin), length, device=query.device).unsqueeze(1)
        mask = torch.arange(length, device=query.device).unsqueeze(0) > rows
        scores = scores.masked_fill(mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        out[begin:end] = torch.matmul(weights, v).transpose(0, 1)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; x [T, K], weight [N, K] row-major, bias [N]."""
    return F.linear(x, weight, bias)

"""Attention over the paged KV cache, behind one interface with several backends.

What a step needs is built once (``AttentionMetadata``, and the backend's plan inside it) and read by every layer.

* ``naive``: the reference, one sequence at a time, written out.
* ``sdpa``: torch's ``scaled_dot_product_attention``: one call for all sequences that decode, one for each prefill.
* ``paged``: ``lightvllm.kernels.paged_attention``, the compiled kernel where there is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightvllm import kernels
from lightvllm.errors import ConfigError
from lightvllm.kernels import reference

KVCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [B, block_size, G, D]."""


@dataclass(slots=True)
class AttentionMetadata:
    """One step's batch: T query tokens of S sequences, flattened in order.

    The KV cache holds a sequence's tokens from the start of its first block; its queries are its last tokens.

    Attributes:
        query_start_loc: int32 [S + 1], where each sequence's queries begin in the batch.
        seq_lens: int32 [S], tokens of each sequence up to and including its last query.
        block_tables: int32 [S, blocks], padded with any valid block.
        slot_mapping: int64 [T], where each token's key and value are written.
        host_query_start_loc, host_seq_lens, host_block_tables: the same on the host, for planning.
        plan: what the backend has prepared for its layers.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    host_query_start_loc: np.ndarray[Any, np.dtype[np.int32]]
    host_seq_lens: np.ndarray[Any, np.dtype[np.int32]]
    host_block_tables: np.ndarray[Any, np.dtype[np.int32]]
    plan: object = field(default=None)

    @classmethod
    def build(
        cls,
        starts: np.ndarray[Any, np.dtype[np.int64]],
        counts: np.ndarray[Any, np.dtype[np.int64]],
        block_tables: np.ndarray[Any, np.dtype[np.int32]],
        block_size: int,
        device: torch.device,
    ) -> tuple[AttentionMetadata, Tensor]:
        """The metadata and the positions (int64 [T]) of ``counts[s]`` queries from position ``starts[s]`` on."""
        ends = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=ends[1:])
        row = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(ends[-1]) - (ends[:-1] - starts)[row]
        slots = block_tables[row, positions // block_size].astype(np.int64) * block_size + positions % block_size
        query_start_loc, seq_lens = ends.astype(np.int32), (starts + counts).astype(np.int32)

        def tensor(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        metadata = cls(
            tensor(query_start_loc),
            tensor(seq_lens),
            tensor(block_tables),
            tensor(slots),
            query_start_loc,
            seq_lens,
            block_tables,
        )
        return metadata, tensor(positions)


class AttentionBackend(ABC):
    """How attention is computed; stateless, shared by all layers."""

    name: str

    def plan(self, metadata: AttentionMetadata, block_size: int) -> object:
        """What depends on the step but not on the layer; stored in ``metadata.plan``."""
        return None

    @abstractmethod
    def forward(self, query: Tensor, cache: KVCache, metadata: AttentionMetadata, scale: float) -> Tensor:
        """Causal attention of query [T, H, D] over the cache, which holds the queries' own keys; [T, H, D]."""


class NaiveAttention(AttentionBackend):
    name = "naive"

    def forward(self, query: Tensor, cache: KVCache, metadata: AttentionMetadata, scale: float) -> Tensor:
        m = metadata
        return reference.paged_attention(
            query, cache[0], cache[1], m.block_tables, m.seq_lens, m.query_start_loc, scale
        )


class PagedAttention(AttentionBackend):
    name = "paged"

    def forward(self, query: Tensor, cache: KVCache, metadata: AttentionMetadata, scale: float) -> Tensor:
        m = metadata
        return kernels.paged_attention(query, cache[0], cache[1], m.block_tables, m.seq_lens, m.query_start_loc, scale)


@dataclass(frozen=True, slots=True)
class _Prefill:
    begin: int
    end: int
    blocks: Tensor  # int64 [blocks]
    length: int
    mask: Tensor | None  # bool [queries, length], True where a query may look; None: plain causal


@dataclass(frozen=True, slots=True)
class _SdpaPlan:
    decode_rows: Tensor | None  # int64 [n]; None: every row of the batch
    decode_blocks: Tensor | None  # int64 [n × blocks]; None: nothing decodes
    decode_length: int
    decode_mask: Tensor | None  # bool [n, 1, 1, length]; None: all sequences are equally long
    prefills: list[_Prefill]


class SdpaAttention(AttentionBackend):
    name = "sdpa"

    def plan(self, metadata: AttentionMetadata, block_size: int) -> _SdpaPlan:
        device = metadata.seq_lens.device
        begins, lengths, tables = (
            metadata.host_query_start_loc,
            metadata.host_seq_lens,
            metadata.host_block_tables,
        )
        counts = np.diff(begins)

        def blocks(rows: Any, length: int) -> Tensor:
            return torch.from_numpy(tables[rows, : -(-length // block_size)].astype(np.int64).reshape(-1)).to(device)

        decoding = np.flatnonzero(counts == 1)
        decode_rows = decode_blocks = decode_mask = None
        longest = 0
        if len(decoding):
            longest = int(lengths[decoding].max())
            decode_blocks = blocks(decoding, longest)
            if len(decoding) < len(counts):
                decode_rows = torch.from_numpy(begins[decoding].astype(np.int64)).to(device)
            if lengths[decoding].min() < longest:
                seen = np.arange(longest) < lengths[decoding, None]
                decode_mask = torch.from_numpy(seen).to(device)[:, None, None, :]
        prefills = []
        for s in np.flatnonzero(counts > 1):
            begin, end, length = int(begins[s]), int(begins[s + 1]), int(lengths[s])
            mask = None
            if end - begin < length:
                mask = torch.ones(end - begin, length, dtype=torch.bool, device=device).tril_(length - (end - begin))
            prefills.append(_Prefill(begin, end, blocks(s, length), length, mask))
        return _SdpaPlan(decode_rows, decode_blocks, longest, decode_mask, prefills)

    def forward(self, query: Tensor, cache: KVCache, metadata: AttentionMetadata, scale: float) -> Tensor:
        plan = metadata.plan
        assert isinstance(plan, _SdpaPlan)
        if plan.decode_blocks is not None and plan.decode_rows is None:
            return self._decode(query, cache, plan, plan.decode_blocks, scale)
        out = torch.empty_like(query)
        if plan.decode_blocks is not None and plan.decode_rows is not None:
            out[plan.decode_rows] = self._decode(query[plan.decode_rows], cache, plan, plan.decode_blocks, scale)
        for p in plan.prefills:
            key, value = (c.index_select(0, p.blocks).flatten(0, 1)[: p.length].transpose(0, 1)[None] for c in cache)
            q = query[p.begin : p.end].transpose(0, 1)[None]
            result = F.scaled_dot_product_attention(
                q, key, value, p.mask, is_causal=p.mask is None, scale=scale, enable_gqa=True
            )
            out[p.begin : p.end] = result[0].transpose(0, 1)
        return out

    @staticmethod
    def _decode(query: Tensor, cache: KVCache, plan: _SdpaPlan, blocks: Tensor, scale: float) -> Tensor:
        """One query [n, H, D] per sequence. Query heads of one key/value head stand as rows of one small matrix."""
        n, heads, head_dim = query.shape
        key, value = (
            c.index_select(0, blocks).view(n, -1, c.shape[2], head_dim)[:, : plan.decode_length].transpose(1, 2)
            for c in cache
        )
        q = query.view(n, key.shape[1], -1, head_dim)
        return F.scaled_dot_product_attention(q, key, value, plan.decode_mask, scale=scale).reshape(n, heads, head_dim)


_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "naive": NaiveAttention,
    "sdpa": SdpaAttention,
    "paged": PagedAttention,
}


def attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend called ``name``; ``"auto"`` is ``paged`` where a kernel is compiled for ``device``, else ``sdpa``."""
    if name == "auto":
        name = "paged" if device.type == "cpu" and kernels.compiled() else "sdpa"
    if name not in _BACKENDS:
        raise ConfigError(f"attention_backend={name!r} is unknown; use {', '.join(_BACKENDS)} or auto")
    return _BACKENDS[name]()


class Attention:
    """One layer's attention: writes the new keys and values to the cache, then looks back over all of it."""

    def __init__(self, head_dim: int, backend: AttentionBackend) -> None:
        self.scale = head_dim**-0.5
        self.backend = backend

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KVCache, metadata: AttentionMetadata
    ) -> Tensor:
        """query [T, H, D]; key and value [T, G, D]; returns [T, H, D]."""
        kernels.reshape_and_cache(key, value, cache[0], cache[1], metadata.slot_mapping)
        return self.backend.forward(query, cache, metadata, self.scale)

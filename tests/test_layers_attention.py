"""Every attention backend against plain softmax attention over contiguous keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightvllm.errors import ConfigError
from lightvllm.layers.attention import Attention, AttentionMetadata, attention_backend

CPU = torch.device("cpu")
BLOCK, HEAD_DIM = 4, 8
BACKENDS = ["naive", "sdpa", "paged"]

# (tokens in the cache already, new tokens) of each sequence of a step
BATCHES = {
    "prefills": [(0, 1), (0, 4), (0, 9), (0, 17)],
    "decodes of one length": [(6, 1), (6, 1), (6, 1)],
    "decodes": [(0, 1), (3, 1), (4, 1), (30, 1)],
    "one decode": [(13, 1)],
    "chunks": [(4, 5), (3, 2), (16, 16)],
    "all at once": [(12, 1), (0, 6), (5, 3), (1, 1), (0, 1), (8, 8)],
}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention of the last rows; query [n, H, D], key and value [L, G, D], in float64."""
    n, heads, _ = query.shape
    length, groups, _ = key.shape
    out = torch.empty_like(query, dtype=torch.float64)
    for h in range(heads):
        k, v = key[:, h * groups // heads].double(), value[:, h * groups // heads].double()
        for i in range(n):
            seen = length - n + i + 1
            weights = torch.softmax(k[:seen] @ query[i, h].double() * HEAD_DIM**-0.5, 0)
            out[i, h] = weights @ v[:seen]
    return out


def step(
    batch: list[tuple[int, int]], heads: int, groups: int, backend: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer gives for a batch, whose blocks are scattered over a cache full of rubbish, and what it should."""
    generator = torch.Generator().manual_seed(len(batch))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    lengths = [start + count for start, count in batch]
    order = torch.randperm(64, generator=generator).tolist()
    tables = np.zeros((len(batch), max(-(-n // BLOCK) for n in lengths)), np.int32)
    cache = (random(64, BLOCK, groups, HEAD_DIM) * 100, random(64, BLOCK, groups, HEAD_DIM) * 100)
    queries, keys, values, expected = [], [], [], []
    for s, (start, count) in enumerate(batch):
        blocks = [order.pop() for _ in range(-(-(start + count) // BLOCK))]
        tables[s, : len(blocks)] = blocks
        q, k, v = random(count, heads, HEAD_DIM), *(random(start + count, groups, HEAD_DIM) for _ in range(2))
        for position in range(start):
            for stored, computed in zip(cache, (k, v), strict=True):
                stored[blocks[position // BLOCK], position % BLOCK] = computed[position]
        queries.append(q)
        keys.append(k[start:])
        values.append(v[start:])
        expected.append(attend(q, k, v))
    starts, counts = (np.array(column, np.int64) for column in zip(*batch, strict=True))
    metadata, positions = AttentionMetadata.build(starts, counts, tables, BLOCK, CPU)
    assert positions.tolist() == [p for start, count in batch for p in range(start, start + count)]
    attention = attention_backend(backend, CPU)
    metadata.plan = attention.plan(metadata, BLOCK)
    # The layers hand over slices of the fused projection, not tensors of their own.
    fused = torch.cat((torch.cat(queries), torch.cat(keys), torch.cat(values)), 1)
    q, k, v = torch.split(fused, [heads, groups, groups], 1)
    return Attention(HEAD_DIM, attention)(q, k, v, cache, metadata), torch.cat(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (6, 1)])
def test_attention_in_float32(backend: str, batch: list[tuple[int, int]], heads: int, groups: int) -> None:
    result, expected = step(batch, heads, groups, backend, torch.float32)
    assert result.shape == expected.shape
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    result, expected = step(BATCHES["all at once"], 4, 2, backend, dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=0.03, rtol=0.03)


def test_metadata_lays_the_batch_out() -> None:
    tables = np.array([[5, 2, 0], [7, 1, 3]], np.int32)
    metadata, positions = AttentionMetadata.build(np.array([3, 8]), np.array([3, 1]), tables, BLOCK, CPU)
    assert positions.tolist() == [3, 4, 5, 8]
    assert metadata.slot_mapping.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 3 * 4]
    assert metadata.query_start_loc.tolist() == [0, 3, 4]
    assert metadata.seq_lens.tolist() == [6, 9]
    assert metadata.query_start_loc.dtype == metadata.seq_lens.dtype == metadata.block_tables.dtype == torch.int32


def test_auto_takes_the_compiled_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightvllm import kernels

    for compiled, name in ((True, "paged"), (False, "sdpa")):
        monkeypatch.setattr(kernels, "compiled", lambda answer=compiled: answer)
        assert attention_backend("auto", CPU).name == name
    assert attention_backend("auto", torch.device("cuda")).name == "sdpa"


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="attention_backend='flash' is unknown; use naive, sdpa, paged or auto"):
        attention_backend("flash", CPU)

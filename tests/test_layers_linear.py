"""The split linear layers: their shards, put together, are the whole matrix."""

from __future__ import annotations

import pytest
import torch

from lightvllm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.weights import WeightSlice, parameter_bytes

CPU = torch.device("cpu")
K = 12
X = torch.randn(5, K, generator=torch.Generator().manual_seed(1))


class Alone(ParallelContext):
    """A rank of a group whose sums and gathers are taken by the test."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(CPU, rank, size)


def checkpoint(slices: list[WeightSlice]) -> dict[str, torch.Tensor]:
    """A random checkpoint with the tensors that a layer asks for; the same on every rank."""
    return {
        s.name: torch.randn(s.shape, generator=torch.Generator().manual_seed(sum(map(ord, s.name)))) for s in slices
    }


def fill(layer: object, name: str) -> dict[str, torch.Tensor]:
    slices = list(layer.weights(name))  # type: ignore[attr-defined]
    whole = checkpoint(slices)
    for s in slices:
        s.target.copy_(whole[s.name].narrow(s.dim, s.start, s.target.shape[s.dim]))
    return whole


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_merged_columns_are_shares_of_each_matrix(tp: int, bias: bool) -> None:
    results = []
    for rank in range(tp):
        layer = MergedColumnParallelLinear(K, [("gate", 8), ("up", 16)], bias, torch.float32, Alone(rank, tp))
        whole = fill(layer, "mlp")
        results.append(layer(X).split([8 // tp, 16 // tp], 1))
    for part, name in enumerate(("mlp.gate", "mlp.up")):
        expected = X @ whole[f"{name}.weight"].T + (whole[f"{name}.bias"] if bias else 0)
        torch.testing.assert_close(torch.cat([r[part] for r in results], 1), expected)


def test_a_column_parallel_layer_is_a_share_of_one_matrix() -> None:
    layers = [ColumnParallelLinear(K, "proj", 6, True, torch.float32, Alone(rank, 2)) for rank in range(2)]
    whole = [fill(layer, "block") for layer in layers].pop()
    expected = X @ whole["block.proj.weight"].T + whole["block.proj.bias"]
    torch.testing.assert_close(torch.cat([layer(X) for layer in layers], 1), expected)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_row_parallel_results_add_up_with_the_bias_once(tp: int) -> None:
    total = torch.zeros(5, 7)
    for rank in range(tp):
        layer = RowParallelLinear(K, 7, True, torch.float32, Alone(rank, tp))
        whole = fill(layer, "o") if rank == 0 else whole | fill(layer, "o")  # noqa: F821
        total += layer(X[:, rank * K // tp : (rank + 1) * K // tp])
    torch.testing.assert_close(total, X @ whole["o.weight"].T + whole["o.bias"])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "kv_heads_of_ranks"),
    [
        (4, 2, 1, [[0, 1]]),
        (4, 2, 2, [[0], [1]]),
        (4, 2, 4, [[0], [0], [1], [1]]),
        (8, 2, 4, [[0], [0], [1], [1]]),
        (6, 1, 3, [[0], [0], [0]]),
        (9, 3, 3, [[0], [1], [2]]),
    ],
)
def test_qkv_gives_each_rank_the_kv_heads_that_its_query_heads_read(
    heads: int, kv_heads: int, tp: int, kv_heads_of_ranks: list[list[int]]
) -> None:
    d = 2
    for rank, kv in enumerate(kv_heads_of_ranks):
        layer = QKVParallelLinear(K, d, heads, kv_heads, True, torch.float32, Alone(rank, tp))
        whole = fill(layer, "attn")
        assert (layer.num_heads, layer.num_kv_heads) == (heads // tp, len(kv))
        mine = range(rank * heads // tp, (rank + 1) * heads // tp)
        # Query head h reads key/value head h // (H / G): each rank must hold exactly those.
        assert sorted({h * kv_heads // heads for h in mine}) == kv
        expected = []
        for name, chosen in (("q", mine), ("k", kv), ("v", kv)):
            full = X @ whole[f"attn.{name}_proj.weight"].T + whole[f"attn.{name}_proj.bias"]
            expected.append(full.view(5, -1, d)[:, list(chosen)].flatten(1))
        torch.testing.assert_close(layer(X), torch.cat(expected, 1))


def test_parameter_bytes_counts_shared_memory_once() -> None:
    layer = MergedColumnParallelLinear(K, [("a", 4), ("b", 4)], True, torch.bfloat16, Alone(0, 2))
    slices = list(layer.weights("m"))
    assert parameter_bytes(slices) == parameter_bytes(slices * 2) == 2 * (4 * K + 4)

"""Linear layers split over the tensor-parallel ranks. (Megatron-LM, arXiv:1909.08053)

A column-parallel layer holds some of the output features, and its result stays split; a row-parallel layer takes
such a split input and adds the ranks' partial results up. Several column-parallel layers with one input are fused
into one matrix: query, key and value; gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightvllm import kernels
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.weights import WeightSlice


@dataclass(frozen=True, slots=True)
class ColumnPart:
    """One checkpoint matrix inside a fused one: ``rows`` output features in all, of which this rank holds ``local``
    from ``start`` on."""

    name: str
    rows: int
    start: int
    local: int


class MergedColumnParallelLinear:
    """Matrices [N_i, K] with one input, fused: each rank holds 1/tp of the rows of each. x [T, K] to [T, ΣN_i / tp]."""

    def __init__(
        self,
        input_size: int,
        outputs: Sequence[tuple[str, int]],
        bias: bool,
        dtype: torch.dtype,
        parallel: ParallelContext,
    ) -> None:
        """``outputs`` are (checkpoint name, output features); tp must divide the features."""
        tp, rank = parallel.tp_size, parallel.tp_rank
        self._allocate(
            input_size,
            [ColumnPart(name, rows, rank * (rows // tp), rows // tp) for name, rows in outputs],
            bias,
            dtype,
            parallel,
        )

    def _allocate(
        self, input_size: int, parts: list[ColumnPart], bias: bool, dtype: torch.dtype, parallel: ParallelContext
    ) -> None:
        rows = sum(part.local for part in parts)
        self.parts = parts
        self.weight = parallel.memory.empty(rows, input_size, dtype=dtype)
        self.bias = parallel.memory.empty(rows, dtype=dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)

    def weights(self, name: str) -> Iterator[WeightSlice]:
        """``name`` is that of the module that holds the parts."""
        row = 0
        for part in self.parts:
            rows = slice(row, row + part.local)
            shape = (part.rows, self.weight.shape[1])
            yield WeightSlice(f"{name}.{part.name}.weight", shape, self.weight[rows], 0, part.start)
            if self.bias is not None:
                yield WeightSlice(f"{name}.{part.name}.bias", (part.rows,), self.bias[rows], 0, part.start)
            row += part.local


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One matrix [N, K] whose rows are dealt out. x [T, K] to [T, N / tp]."""

    def __init__(
        self, input_size: int, name: str, output_size: int, bias: bool, dtype: torch.dtype, parallel: ParallelContext
    ) -> None:
        super().__init__(input_size, [(name, output_size)], bias, dtype, parallel)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections, fused and split by heads. x [T, K] to [T, (H + 2G) × head_dim] of this rank.

    With more ranks than key/value heads, each head is held by the tp / G ranks whose query heads read it.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool,
        dtype: torch.dtype,
        parallel: ParallelContext,
    ) -> None:
        tp, rank = parallel.tp_size, parallel.tp_rank
        self.num_heads = num_heads // tp
        self.num_kv_heads = max(1, num_kv_heads // tp)
        first_kv_head = rank * num_kv_heads // tp
        q, kv = self.num_heads * head_dim, self.num_kv_heads * head_dim
        parts = [ColumnPart("q_proj", num_heads * head_dim, rank * q, q)]
        parts += [
            ColumnPart(name, num_kv_heads * head_dim, first_kv_head * head_dim, kv) for name in ("k_proj", "v_proj")
        ]
        self._allocate(hidden_size, parts, bias, dtype, parallel)


class RowParallelLinear:
    """A matrix [N, K] whose columns are dealt out, as its input is. x [T, K / tp] to [T, N], summed over the ranks."""

    def __init__(
        self, input_size: int, output_size: int, bias: bool, dtype: torch.dtype, parallel: ParallelContext
    ) -> None:
        self.parallel = parallel
        self.shape = (output_size, input_size)
        self.weight = parallel.memory.empty(output_size, input_size // parallel.tp_size, dtype=dtype)
        # One rank adds the bias: the sum over the ranks must hold it once.
        holds_bias = bias and parallel.tp_rank == 0
        self.bias = parallel.memory.empty(output_size, dtype=dtype) if holds_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.parallel.all_reduce(kernels.linear(x, self.weight, self.bias))

    def weights(self, name: str) -> Iterator[WeightSlice]:
        start = self.parallel.tp_rank * self.weight.shape[1]
        yield WeightSlice(f"{name}.weight", self.shape, self.weight, 1, start)
        if self.bias is not None:
            yield WeightSlice(f"{name}.bias", self.shape[:1], self.bias)

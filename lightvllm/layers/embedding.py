"""The vocabulary's two ends, split over the tensor-parallel ranks: token embedding and output head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightvllm import kernels
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.weights import WeightSlice


class VocabParallelEmbedding:
    """Token embedding [V, N]; each rank holds an equal share of the rows, the last ones padded with zeros."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, parallel: ParallelContext) -> None:
        self.parallel = parallel
        self.vocab_size = vocab_size
        rows = -(-vocab_size // parallel.tp_size)
        self.start = min(vocab_size, parallel.tp_rank * rows)
        self.rows = min(rows, vocab_size - self.start)
        self.weight = parallel.memory.empty(rows, hidden_size, dtype=dtype)
        self.weight[self.rows :].zero_()

    def __call__(self, input_ids: Tensor) -> Tensor:
        """input_ids [T], int64, to [T, N]."""
        if self.parallel.tp_size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.start
        elsewhere = (local < 0) | (local >= self.rows)
        hidden = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self.parallel.all_reduce(hidden.masked_fill_(elsewhere.unsqueeze(1), 0))

    def weights(self, name: str) -> Iterator[WeightSlice]:
        shape = (self.vocab_size, self.weight.shape[1])
        yield WeightSlice(f"{name}.weight", shape, self.weight[: self.rows], 0, self.start)


class ParallelLMHead:
    """The output head [V, N]. Its matrix is split as an embedding is, and is the token embedding's own where the
    model ties the two."""

    def __init__(self, matrix: VocabParallelEmbedding) -> None:
        self.matrix = matrix
        self.parallel, self.vocab_size, self.weight = matrix.parallel, matrix.vocab_size, matrix.weight

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """hidden [R, N] to logits [R, V] on tensor rank 0; None on the others."""
        logits = self.parallel.gather(kernels.linear(hidden, self.weight))
        return None if logits is None else logits[:, : self.vocab_size]

    def weights(self, name: str) -> Iterator[WeightSlice]:
        return self.matrix.weights(name)

"""RMSNorm, alone or fused with the addition of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightvllm import kernels
from lightvllm.layers.weights import WeightSlice


class RMSNorm:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension of [T, N]. (arXiv:1910.07467)"""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``x`` to ``residual`` in place; returns the norm of the sum, and the sum."""
        return kernels.fused_add_rms_norm(x, residual, self.weight, self.eps)

    def weights(self, name: str) -> Iterator[WeightSlice]:
        yield WeightSlice(f"{name}.weight", tuple(self.weight.shape), self.weight)

"""Rotary position embedding and its scalings: default, linear, llama3. (arXiv:2104.09864)"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightvllm import kernels
from lightvllm.model_config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2]; the formulas of transformers.

    ``llama3`` leaves short wavelengths alone, divides the frequencies of long ones by ``factor``, and goes smoothly
    from one to the other in between (transformers' ``_compute_llama3_parameters``).
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    context, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    wavelengths = 2 * math.pi / frequencies
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class RotaryEmbedding:
    """Rotates queries and keys by their positions, from a table of cosines and sines for every position."""

    def __init__(
        self, head_dim: int, max_position: int, theta: float, scaling: RopeScaling | None, device: torch.device
    ) -> None:
        angles = torch.outer(
            torch.arange(max_position, dtype=torch.float32), inverse_frequencies(head_dim, theta, scaling)
        )
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)

    def __call__(self, positions: Tensor, query: Tensor, key: Tensor) -> None:
        """In place: query [T, H, D], key [T, G, D], positions [T] int64."""
        kernels.rotary_embedding(positions, query, key, self.cos_sin)

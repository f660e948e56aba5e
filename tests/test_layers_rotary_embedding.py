"""Rotary embedding against transformers' tables, for every scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lightvllm.layers.rotary_embedding import RotaryEmbedding
from lightvllm.model_config import RopeScaling

SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["default", "linear", "llama3"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_is_transformers(scaling: dict[str, Any] | None, theta: float) -> None:
    d, n = 16, 300
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=d,
        max_position_embeddings=n,
        rope_parameters={"rope_theta": theta} | (scaling or {"rope_type": "default"}),
    )
    rotary = RotaryEmbedding(d, n, theta, RopeScaling(**scaling) if scaling else None, torch.device("cpu"))
    assert rotary.cos_sin.shape == (n, d)
    assert rotary.cos_sin.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(n, 4, d, generator=generator), torch.randn(n, 2, d, generator=generator)
    positions = torch.randperm(n, generator=generator)
    cos, sin = LlamaRotaryEmbedding(config)(query, positions[None])
    expected = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    rotary(positions, query, key)
    for ours, theirs in zip((query, key), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), atol=1e-5, rtol=1e-5)

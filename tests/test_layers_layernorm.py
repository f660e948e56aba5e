"""RMSNorm against transformers', alone and fused with the residual."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightvllm.layers.layernorm import RMSNorm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rms_norm_and_its_fused_form(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 24), (7, 24), (24,)))
    theirs = LlamaRMSNorm(24, eps=1e-3).to(dtype)
    theirs.weight.data.copy_(weight)
    ours = RMSNorm(24, 1e-3, dtype, torch.device("cpu"))
    (place,) = ours.weights("norm")
    assert (place.name, place.shape) == ("norm.weight", (24,))
    place.target.copy_(weight)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=tolerance, rtol=tolerance)
        expected = x + residual
        normed, summed = ours.add(x, residual)
        torch.testing.assert_close(normed, theirs(expected), atol=tolerance, rtol=tolerance)
    assert torch.equal(summed, expected)
    assert summed.data_ptr() == residual.data_ptr()

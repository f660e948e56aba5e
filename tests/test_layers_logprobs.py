"""Log-probabilities of many rows at once, against the definition written out for each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvllm.layers import logprobs
from lightvllm.layers.logprobs import token_logprobs

VOCAB = 300


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.lists(st.tuples(st.integers(0, VOCAB - 1), st.sampled_from([0, 1, 5, 20, VOCAB])), min_size=1, max_size=9),
    levels=st.sampled_from([2, 30, 10**6]),
    on_device=st.booleans(),
)
def test_every_row_is_as_defined(seed: int, rows: list[tuple[int, int]], levels: int, on_device: bool) -> None:
    """By either way. Few levels give many equal logits, also across the edge of the top."""
    numbers = np.random.default_rng(seed).integers(0, levels, (len(rows), VOCAB))
    x = torch.tensor(numbers / levels * 20, dtype=torch.float32)
    tokens, counts = [token for token, _ in rows], [count for _, count in rows]
    found = logprobs._on_device(x, tokens, counts) if on_device else token_logprobs(x, tokens, counts)
    for row, (token, count), one in zip(x, rows, found, strict=True):
        expected = torch.log_softmax(row.double(), -1)
        best = sorted(range(VOCAB), key=lambda i: (-row[i].item(), i))[:count]
        assert one.top_ids == best
        np.testing.assert_allclose(one.top_logprobs, expected[best], atol=1e-12)
        assert one.logprob == pytest.approx(expected[token].item(), abs=1e-12)
        assert one.rank == 1 + sum(value > row[token] for value in row)


@pytest.mark.gpu
def test_rows_on_a_gpu_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = token_logprobs(x, list(range(11)), [3] * 11)
    for elements in (2**26, 4 * VOCAB, 1):
        monkeypatch.setattr(logprobs, "_ELEMENTS", elements)
        found = token_logprobs(x.cuda(), list(range(11)), [3] * 11)
        assert [(one.rank, one.top_ids) for one in found] == [(one.rank, one.top_ids) for one in expected]
        np.testing.assert_allclose([one.logprob for one in found], [one.logprob for one in expected], atol=1e-12)


def test_no_rows_give_none() -> None:
    assert token_logprobs(torch.empty(0, VOCAB), [], []) == []

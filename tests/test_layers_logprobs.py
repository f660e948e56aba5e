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
)
def test_every_row_is_as_defined(seed: int, rows: list[tuple[int, int]], levels: int) -> None:
    """Few levels give many equal logits, also across the edge of the top."""
    numbers = np.random.default_rng(seed).integers(0, levels, (len(rows), VOCAB))
    x = torch.tensor(numbers / levels * 20, dtype=torch.float32)
    found = token_logprobs(x, [token for token, _ in rows], [count for _, count in rows])
    for row, (token, count), one in zip(x, rows, found, strict=True):
        expected = torch.log_softmax(row.double(), -1)
        best = sorted(range(VOCAB), key=lambda i: (-row[i].item(), i))[:count]
        assert one.top_ids == best
        np.testing.assert_allclose(one.top_logprobs, expected[best], atol=1e-12)
        assert one.logprob == pytest.approx(expected[token].item(), abs=1e-12)
        assert one.rank == 1 + sum(value > row[token] for value in row)


def test_rows_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(11, VOCAB, generator=torch.Generator().manual_seed(0))
    whole = token_logprobs(x, list(range(11)), [3] * 11)
    monkeypatch.setattr(logprobs, "_ELEMENTS", 4 * VOCAB)
    assert token_logprobs(x, list(range(11)), [3] * 11) == whole
    monkeypatch.setattr(logprobs, "_ELEMENTS", 1)
    assert token_logprobs(x, list(range(11)), [3] * 11) == whole


def test_no_rows_give_none() -> None:
    assert token_logprobs(torch.empty(0, VOCAB), [], []) == []

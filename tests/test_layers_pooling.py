"""Embeddings of hidden states: the same whatever the chunks, the batch and the preemptions."""

from __future__ import annotations

import pytest
import torch

from lightvllm.errors import LightvllmError
from lightvllm.layers.pooling import Pooler
from lightvllm.messages import ScheduledSequence
from lightvllm.pooling import Pooling

HIDDEN = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
EXPECTED = {
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.double().mean(dim=0).float(),
    "cls": lambda rows: rows[0],
}


def item(seq_id: int, start: int, count: int) -> ScheduledSequence:
    return ScheduledSequence(seq_id, start, count, [], [])


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_chunks_of_several_sequences(pooling: Pooling, normalize: bool) -> None:
    pooler = Pooler(pooling, normalize)
    first, second = HIDDEN[:12], HIDDEN[12:20]
    none = pooler.pool(torch.cat([first[:5], second[:3]]), [item(1, 0, 5), item(2, 0, 3)], [])
    assert none.shape == (0, 8)
    done = pooler.pool(torch.cat([first[5:11], second[3:]]), [item(1, 5, 6), item(2, 3, 5)], [2])
    last = pooler.pool(torch.cat([first[11:], HIDDEN[20:]]), [item(1, 11, 1), item(3, 0, 10)], [1, 3])
    assert len(pooler) == 0
    expected = torch.stack([EXPECTED[pooling](rows) for rows in (second, first, HIDDEN[20:])])
    if normalize:
        expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.cat([done, last]), expected, atol=1e-6, rtol=0)
    assert last.dtype == torch.float32


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_preempted_sequence_begins_anew_and_a_forgotten_one_is_gone(pooling: Pooling) -> None:
    pooler = Pooler(pooling, False)
    pooler.pool(HIDDEN[10:13], [item(1, 0, 3)], [])
    torch.testing.assert_close(
        pooler.pool(HIDDEN[:6], [item(1, 0, 6)], [1])[0], EXPECTED[pooling](HIDDEN[:6]), atol=1e-6, rtol=0
    )
    pooler.pool(HIDDEN[:3], [item(1, 0, 3)], [])
    pooler.forget([1, 7])
    with pytest.raises(LightvllmError, match=f"sequence 1 begins at position 3, but {pooling} pooling needs"):
        pooler.pool(HIDDEN[3:6], [item(1, 3, 3)], [1])
    pooler.pool(HIDDEN[:3], [item(1, 0, 3)], [])
    pooler.clear()
    assert len(pooler) == 0


def test_the_last_token_s_state_needs_no_beginning() -> None:
    assert torch.equal(Pooler("last", False).pool(HIDDEN[:3], [item(1, 20, 3)], [1])[0], HIDDEN[2])

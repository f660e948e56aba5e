"""The vocabulary split over ranks: the shares add up to a look-up, and side by side to the logits."""

from __future__ import annotations

import pytest
import torch

from lightvllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lightvllm.layers.parallel import ParallelContext

V, N = 11, 6
TABLE = torch.randn(V, N, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([0, 10, 3, 5, 6, 8, 9])


class Alone(ParallelContext):
    """A rank of a group whose sums and gathers are taken by the test."""

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return torch.nn.functional.pad(x, (0, self.tp_size * x.shape[1] - x.shape[1]))


def shard(rank: int, tp: int) -> VocabParallelEmbedding:
    embedding = VocabParallelEmbedding(V, N, torch.float32, Alone(torch.device("cpu"), rank, tp))
    for s in embedding.weights("embed"):
        assert (s.name, s.shape) == ("embed.weight", (V, N))
        s.target.copy_(TABLE[s.start : s.start + s.target.shape[0]])
    return embedding


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_shares_of_an_embedding_add_up_to_the_look_up(tp: int) -> None:
    """With 8 ranks, two rows each, the last two hold nothing but padding."""
    shards = [shard(rank, tp) for rank in range(tp)]
    assert len({s.weight.shape for s in shards}) == 1
    torch.testing.assert_close(sum(s(IDS) for s in shards), TABLE[IDS])
    assert sum(s.rows for s in shards) == V


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_shares_of_the_head_stand_side_by_side(tp: int) -> None:
    hidden = torch.randn(3, N, generator=torch.Generator().manual_seed(2))
    shards = [ParallelLMHead(shard(rank, tp)) for rank in range(tp)]
    rows = shards[0].weight.shape[0]
    parts = [head(hidden) for head in shards]
    assert all(part is not None and part.shape == (3, V) for part in parts)  # cropped to the true vocabulary
    together = torch.cat([part[:, : min(rows, V)] for part in parts if part is not None], 1)
    torch.testing.assert_close(together[:, :V], hidden @ TABLE.T)
    assert torch.count_nonzero(together[:, V:]) == 0


def test_a_tied_head_holds_the_embeddings_own_memory() -> None:
    embedding = shard(0, 2)
    assert ParallelLMHead(embedding).weight is embedding.weight

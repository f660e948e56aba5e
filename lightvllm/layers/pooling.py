"""Makes a prompt's embedding of its final hidden states, which may come in several steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightvllm.errors import LightvllmError
from lightvllm.messages import ScheduledSequence
from lightvllm.pooling import Pooling


class Pooler:
    """What has been pooled of the prompts that are not complete. Sums are in float64, so that chunks do not matter."""

    def __init__(self, pooling: Pooling, normalize: bool) -> None:
        self._pooling, self._normalize = pooling, normalize
        self._partial: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._partial)

    def forget(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            self._partial.pop(seq_id, None)

    def clear(self) -> None:
        self._partial.clear()

    def pool(self, hidden: Tensor, scheduled: Sequence[ScheduledSequence], complete: Sequence[int]) -> Tensor:
        """The embeddings of the sequences ``complete``, whose last token is in this step, in their order.

        Args:
            hidden: [T, N], normed hidden states of the step's tokens, one scheduled sequence after the other.

        Returns float32 [len(complete), N]. Raises LightvllmError for a sequence of which tokens are needed that no
        step computed here.
        """
        done: dict[int, Tensor] = {}
        wanted, row = set(complete), 0
        for item in scheduled:
            pooled = self._add(item, hidden[row : row + item.count])
            row += item.count
            if item.seq_id in wanted:
                self._partial.pop(item.seq_id, None)
                done[item.seq_id] = pooled / (item.start + item.count) if self._pooling == "mean" else pooled
            elif self._pooling != "last":
                self._partial[item.seq_id] = pooled
        if not complete:
            return hidden.new_empty(0, hidden.shape[1], dtype=torch.float32)
        vectors = torch.stack([done[seq_id] for seq_id in complete])
        if self._normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.float()

    def _add(self, item: ScheduledSequence, rows: Tensor) -> Tensor:
        if self._pooling == "last":
            return rows[-1].double()
        if item.start == 0:  # also a preempted sequence's, again
            return rows.double().sum(dim=0) if self._pooling == "mean" else rows[0].double()
        if item.seq_id not in self._partial:
            raise LightvllmError(
                f"sequence {item.seq_id} begins at position {item.start}, but {self._pooling} pooling needs its "
                "beginning; the driver must not take it from the prefix cache"
            )
        before = self._partial[item.seq_id]
        return before + rows.double().sum(dim=0) if self._pooling == "mean" else before

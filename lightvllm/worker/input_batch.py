"""What a worker remembers of its sequences, and how a step's share of them becomes one flat batch.

Knows no model. Every rank keeps the same state, fed by the same ``StepInput``; only what changed is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightvllm.errors import LightvllmError
from lightvllm.layers.attention import AttentionMetadata
from lightvllm.layers.sampler import SamplingState, bad_words_table
from lightvllm.layers.structured import Grammars
from lightvllm.messages import SAMPLED_LAST, NewSequence, ScheduledSequence, StepInput

Share = Callable[[list[int | None]], list[int]]


class SequenceState:
    """One sequence: how it is sampled (its tokens included), and the cache blocks that hold it.

    Attributes:
        num_prompt_logprobs: of ``NewSequence``, and those whose rows have been in a batch.
        sampled_last: the token that this rank sampled last, until it is part of ``sampling.token_ids``.
    """

    def __init__(self, sampling: SamplingState, num_prompt_logprobs: int) -> None:
        self.sampling = sampling
        self.num_prompt_logprobs = num_prompt_logprobs
        self.sampled_last: int | None = None
        self.num_blocks = 0
        self._blocks: np.ndarray[Any, np.dtype[np.int32]] = np.empty(16, np.int32)

    @property
    def blocks(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        return self._blocks[: self.num_blocks]

    def add_blocks(self, block_ids: list[int]) -> None:
        needed = self.num_blocks + len(block_ids)
        if needed > len(self._blocks):
            grown = np.empty(2 * needed, np.int32)
            grown[: self.num_blocks] = self.blocks
            self._blocks = grown
        self._blocks[self.num_blocks : needed] = block_ids
        self.num_blocks = needed


class PromptRows(NamedTuple):
    """Rows of a batch, from ``first`` on, whose logits say how probable these tokens of a prompt were."""

    seq_id: int
    first: int
    token_ids: list[int]
    num_top: int  # of the most probable tokens, wanted beside


@dataclass(slots=True)
class Batch:
    """One step, flattened: T tokens of all scheduled sequences.

    Attributes:
        input_ids, positions: int64 [T].
        sampled: the sequences that get a token, in order.
        logits_rows: int64 [len(sampled)], the last row of each; None if that is every row.
        prompt_rows: for ``SamplingParams.prompt_logprobs``.
    """

    num_tokens: int
    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata
    sampled: list[SequenceState]
    seq_ids: list[int]
    logits_rows: Tensor | None
    prompt_rows: list[PromptRows]


class SequenceTable:
    """All sequences that this worker knows, by id."""

    def __init__(
        self,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        device: torch.device,
        grammars: Grammars | None = None,
    ) -> None:
        """``grammars`` where tokens are sampled: there alone sequences are held to their structured outputs."""
        self._block_size, self._num_blocks, self._max_model_len = block_size, num_blocks, max_model_len
        self._device, self._grammars = device, grammars
        self._sequences: dict[int, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def clear(self) -> None:
        self._sequences.clear()

    def update(self, step: StepInput) -> None:
        """Forget what has finished, meet what is new (a preempted sequence that comes again replaces itself)."""
        for seq_id in step.finished:
            self._sequences.pop(seq_id, None)
        for new in step.new:
            self._sequences[new.seq_id] = SequenceState(self._sampling(new), new.num_prompt_logprobs)

    def _sampling(self, new: NewSequence) -> SamplingState:
        structured, constraint = new.sampling.structured_outputs, None
        if structured is not None and self._grammars is not None:
            constraint = self._grammars.constraint(structured)
        return SamplingState(
            new.sampling,
            new.seed,
            new.prompt_len,
            new.stop_token_ids,
            list(new.token_ids),
            bad_words_table(new.bad_words),
            constraint,
        )

    def batch(self, scheduled: list[ScheduledSequence], share: Share) -> Batch:
        """Take in the new tokens and blocks, and lay the batch out. ``scheduled`` is not empty.

        ``share`` is called on every rank alike, if the driver names tokens by ``SAMPLED_LAST``: with what this rank has
        sampled for those sequences, None where it has sampled nothing, it returns the tokens.
        """
        tokens: list[int] = []
        sampled, seq_ids, rows, states, prompt_rows = [], [], [], [], []
        unnamed = [self._known(item) for item in scheduled if item.new_token_ids[-1:] == [SAMPLED_LAST]]
        named = iter(share([state.sampled_last for state in unnamed]) if unnamed else ())
        for item in scheduled:
            state = self._known(item)
            sequence = state.sampling.token_ids
            if item.new_token_ids:
                sequence.extend(item.new_token_ids)
                if sequence[-1] == SAMPLED_LAST:
                    sequence[-1] = next(named)
                state.sampled_last = None
            state.add_blocks(item.new_block_ids)
            end = item.start + item.count
            self._check(item, state, end)
            if state.sampling.params.prompt_logprobs is not None and (wanted := _prompt_rows(item, state, len(tokens))):
                prompt_rows.append(wanted)
            tokens += sequence[item.start : end]
            if end == len(sequence):
                sampled.append(state)
                seq_ids.append(item.seq_id)
                rows.append(len(tokens) - 1)
            states.append(state)
        starts = np.array([item.start for item in scheduled], np.int64)
        counts = np.array([item.count for item in scheduled], np.int64)
        block_tables = np.zeros((len(states), max(state.num_blocks for state in states)), np.int32)
        for row, state in zip(block_tables, states, strict=True):
            row[: state.num_blocks] = state.blocks
        metadata, positions = AttentionMetadata.build(starts, counts, block_tables, self._block_size, self._device)
        return Batch(
            len(tokens),
            torch.tensor(tokens, dtype=torch.int64, device=self._device),
            positions,
            metadata,
            sampled,
            seq_ids,
            None if len(rows) == len(tokens) else torch.tensor(rows, dtype=torch.int64, device=self._device),
            prompt_rows,
        )

    def _known(self, item: ScheduledSequence) -> SequenceState:
        state = self._sequences.get(item.seq_id)
        if state is None:
            raise LightvllmError(
                f"step schedules sequence {item.seq_id}, which this worker does not know; "
                "the driver must send it as new first (after reset_sequences, every sequence)"
            )
        return state

    def _check(self, item: ScheduledSequence, state: SequenceState, end: int) -> None:
        """The driver keeps to these; a worker that did not look would write into another sequence's memory."""
        length = len(state.sampling.token_ids)
        if item.count < 1 or item.start < 0 or end > min(length, self._max_model_len):
            raise LightvllmError(
                f"step schedules positions {item.start} to {end - 1} of sequence {item.seq_id}, which has {length} "
                f"tokens; expected positions below its length and max_model_len={self._max_model_len}"
            )
        if end > state.num_blocks * self._block_size:
            raise LightvllmError(
                f"sequence {item.seq_id} needs {-(-end // self._block_size)} blocks up to position {end - 1}, "
                f"and was given {state.num_blocks}"
            )
        if any(not 0 <= block < self._num_blocks for block in item.new_block_ids):
            raise LightvllmError(
                f"sequence {item.seq_id} was given the blocks {item.new_block_ids}; "
                f"this worker's cache has 0 to {self._num_blocks - 1}"
            )


def _prompt_rows(item: ScheduledSequence, state: SequenceState, row: int) -> PromptRows | None:
    """Of a sequence's share of a batch, whose first row is ``row``: the row before a token is what predicts it."""
    sampling = state.sampling
    first = max(item.start + 1, state.num_prompt_logprobs)
    end = min(item.start + item.count + 1, sampling.prompt_len)
    if first >= end:
        return None
    state.num_prompt_logprobs = end
    num_top = sampling.params.prompt_logprobs or 0
    return PromptRows(item.seq_id, row + first - 1 - item.start, sampling.token_ids[first:end], num_top)

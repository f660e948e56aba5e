"""Sequences and batches: the layout, and what a step may not ask for."""

from __future__ import annotations

import pytest
import torch

from lightvllm.errors import LightvllmError
from lightvllm.messages import SAMPLED_LAST, NewSequence, ScheduledSequence, StepInput
from lightvllm.sampling_params import SamplingParams
from lightvllm.worker.input_batch import SequenceTable

GREEDY = SamplingParams(temperature=0.0)


def own(sampled: list[int | None]) -> list[int]:
    """One rank that has sampled for all."""
    return [token_id for token_id in sampled if token_id is not None]


def new(seq_id: int, tokens: list[int], prompt_len: int | None = None) -> NewSequence:
    return NewSequence(seq_id, tokens, prompt_len or len(tokens), 0, GREEDY, [])


@pytest.fixture
def table() -> SequenceTable:
    return SequenceTable(block_size=4, num_blocks=10, max_model_len=20, device=torch.device("cpu"))


def test_a_step_becomes_one_flat_batch(table: SequenceTable) -> None:
    table.update(StepInput(step=1, new=[new(7, [10, 11, 12, 13, 14]), new(8, [20, 21, 22])]))
    batch = table.batch([ScheduledSequence(8, 0, 2, [], [9]), ScheduledSequence(7, 0, 5, [], [3, 1])], own)
    assert batch.input_ids.tolist() == [20, 21, 10, 11, 12, 13, 14]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert batch.metadata.slot_mapping.tolist() == [36, 37, 12, 13, 14, 15, 4]
    assert batch.metadata.block_tables.tolist() == [[9, 0], [3, 1]]
    assert batch.seq_ids == [7]  # the other has a token of its prompt to go
    assert batch.logits_rows is not None
    assert batch.logits_rows.tolist() == [6]
    batch = table.batch([ScheduledSequence(7, 5, 1, [15], []), ScheduledSequence(8, 2, 1, [], [])], own)
    assert batch.input_ids.tolist() == [15, 22]
    assert batch.seq_ids == [7, 8]
    assert batch.logits_rows is None
    assert batch.sampled[0].sampling.token_ids == [10, 11, 12, 13, 14, 15]
    assert batch.sampled[0].sampling.output_index == 1


def test_a_token_that_only_the_workers_know_is_put_in(table: SequenceTable) -> None:
    table.update(StepInput(step=1, new=[new(1, [1, 2]), new(2, [3]), new(3, [4])]))
    first = table.batch([ScheduledSequence(n, 0, count, [], [n]) for n, count in ((1, 2), (2, 1), (3, 1))], own)
    for state, token_id in zip(first.sampled, (17, 18, 19), strict=True):
        state.sampled_last = token_id
    asked: list[list[int | None]] = []

    def share(sampled: list[int | None]) -> list[int]:
        asked.append(sampled)
        return own(sampled)

    rows = [(3, 1, [SAMPLED_LAST]), (2, 1, [18]), (1, 2, [SAMPLED_LAST])]
    batch = table.batch([ScheduledSequence(n, start, 1, tokens, []) for n, start, tokens in rows], share)
    assert batch.input_ids.tolist() == [19, 18, 17]
    assert asked == [[19, 17]], "once for all, in the order of the rows"
    assert [state.sampling.token_ids for state in batch.sampled] == [[4, 19], [3, 18], [1, 2, 17]]
    assert [state.sampled_last for state in batch.sampled] == [None] * 3
    table.batch([ScheduledSequence(1, 0, 1, [], [])], share)
    assert len(asked) == 1, "where nothing is to be shared, nobody is asked"


def test_a_sequence_may_begin_behind_a_cached_prefix(table: SequenceTable) -> None:
    table.update(StepInput(step=1, new=[new(1, list(range(10)))]))
    batch = table.batch([ScheduledSequence(1, 8, 2, [], [5, 6, 7])], own)
    assert batch.positions.tolist() == [8, 9]
    assert batch.metadata.seq_lens.tolist() == [10]
    assert batch.metadata.slot_mapping.tolist() == [28, 29]


def test_a_preempted_sequence_comes_again_as_new(table: SequenceTable) -> None:
    table.update(StepInput(step=1, new=[new(1, [1, 2, 3])]))
    table.batch([ScheduledSequence(1, 0, 3, [], [0])], own)
    table.batch([ScheduledSequence(1, 3, 1, [4], [])], own)
    table.update(StepInput(step=3, new=[new(1, [1, 2, 3, 4, 5], prompt_len=3)]))
    batch = table.batch([ScheduledSequence(1, 0, 5, [], [8, 2])], own)
    assert batch.metadata.block_tables.tolist() == [[8, 2]]
    assert batch.sampled[0].sampling.output_index == 2


def test_block_tables_grow_without_bound(table: SequenceTable) -> None:
    table = SequenceTable(block_size=1, num_blocks=200, max_model_len=200, device=torch.device("cpu"))
    table.update(StepInput(step=1, new=[new(1, list(range(200)))]))
    for n in range(200):
        batch = table.batch([ScheduledSequence(1, n, 1, [], [199 - n])], own)
    assert batch.metadata.block_tables.tolist() == [list(range(199, -1, -1))]


def test_finished_and_reset_sequences_are_forgotten(table: SequenceTable) -> None:
    table.update(StepInput(step=1, new=[new(n, [1]) for n in range(3)]))
    table.update(StepInput(step=2, finished=[0, 2, 99]))
    assert len(table) == 1
    table.clear()
    with pytest.raises(LightvllmError, match="sequence 1, which this worker does not know"):
        table.batch([ScheduledSequence(1, 0, 1, [], [0])], own)


@pytest.mark.parametrize(
    ("scheduled", "message"),
    [
        (ScheduledSequence(1, 0, 6, [], [0, 1]), "has 5 tokens; expected positions below its length"),
        (ScheduledSequence(1, -1, 2, [], [0]), "schedules positions -1 to 0"),
        (ScheduledSequence(1, 0, 0, [], [0]), "schedules positions 0 to -1"),
        (ScheduledSequence(1, 0, 21, list(range(16)), [0, 1, 2, 3, 4, 5]), "max_model_len=20"),
        (ScheduledSequence(1, 0, 5, [], [0]), "needs 2 blocks up to position 4, and was given 1"),
        (ScheduledSequence(1, 0, 5, [], [0, 10]), r"given the blocks \[0, 10\]; this worker's cache has 0 to 9"),
        (ScheduledSequence(1, 0, 5, [], [0, -1]), r"given the blocks \[0, -1\]"),
    ],
)
def test_a_step_that_would_leave_the_sequences_memory_is_refused(
    table: SequenceTable, scheduled: ScheduledSequence, message: str
) -> None:
    table.update(StepInput(step=1, new=[new(1, [1, 2, 3, 4, 5])]))
    with pytest.raises(LightvllmError, match=message):
        table.batch([scheduled], own)

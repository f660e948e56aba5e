"""A step that has been sent: whose answer it takes, and what is told of it."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from lightvllm.engine.scheduler import ScheduledBatch
from lightvllm.engine.sequence import Sequence, SequenceStatus
from lightvllm.engine.steps import InFlight
from lightvllm.errors import LightvllmError
from lightvllm.messages import StepInput, StepOutput, Tensor, TokenLogprobs
from lightvllm.sampling_params import SamplingParams


def step(*seq_ids: int) -> InFlight:
    sampled = [Sequence(i, str(i), [5], 1, 0, SamplingParams()) for i in seq_ids]
    return InFlight(ScheduledBatch(StepInput(step=3), sampled, sampled, len(sampled), 0), Future(), 0.0, 0.0)


@pytest.mark.parametrize(
    ("number", "seq_ids", "text"),
    [(4, [1, 2], r"answered step 4 for sequences \[1, 2\]"), (3, [2, 1], r"expected step 3 for \[1, 2\]")],
)
def test_an_answer_to_another_step_is_refused(number: int, seq_ids: list[int], text: str) -> None:
    step(1, 2).check(StepOutput(step=3, seq_ids=[1, 2], token_ids=[7, 8]))
    with pytest.raises(LightvllmError, match=text):
        step(1, 2).check(StepOutput(step=number, seq_ids=seq_ids, token_ids=[7, 8]))


def test_what_was_sampled_for_an_ended_sequence_is_not_told() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    output = StepOutput(
        step=3,
        seq_ids=[1, 2, 4],
        token_ids=[7, 8, 9],
        logprobs={2: TokenLogprobs(-1.0, 1, [], []), 4: TokenLogprobs(-2.0, 1, [], [])},
        logits=Tensor("float32", [3, 4], logits.tobytes()),
    )
    told: list[tuple[list[int], StepOutput]] = []
    sent = step(1, 2, 4)
    for _ in range(2):
        sent.tell(lambda step_input, out, batch: told.append(([s.seq_id for s in batch.sampled], out)), output)
        sent.batch.sampled[1].status = SequenceStatus.FINISHED
    assert told[0] == ([1, 2, 4], output)
    seq_ids, rest = told[1]
    assert (seq_ids, rest.seq_ids, rest.token_ids, list(rest.logprobs)) == ([1, 4], [1, 4], [7, 9], [4])
    assert rest.logits is not None
    assert rest.logits.numpy().tolist() == logits[[0, 2]].tolist()

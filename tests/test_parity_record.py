"""The recorder: digests that anybody can compute again, rows by sequence, and only while it listens."""

import hashlib

import numpy as np
import pytest

from lightvllm.errors import LightvllmError
from lightvllm.messages import StepInput, StepOutput, Tensor
from lightvllm.parity.compare import TopToken
from lightvllm.parity.record import Recorder, top_tokens


def step(number, rows, dtype="float32"):
    array = np.array(list(rows.values()), dtype=dtype)
    logits = Tensor(dtype, list(array.shape), array.tobytes())
    return StepOutput(step=number, seq_ids=list(rows), token_ids=[0] * len(rows), logits=logits)


def test_digests():
    recorder = Recorder()
    recorder.listening = True
    recorder(StepInput(step=0), step(0, {7: [1.0, 2.0], 8: [3.0, 4.0]}), None)
    recorder(StepInput(step=1), StepOutput(step=1, seq_ids=[], token_ids=[]), None)  # a step of prefill alone
    recorder(StepInput(step=2), step(2, {8: [5.0, 6.0]}), None)
    raw = np.array([1, 2, 3, 4, 5, 6], dtype="<f4").tobytes()
    assert recorder.digest == hashlib.sha256(raw).hexdigest()
    assert recorder.digests == {
        7: [hashlib.sha256(raw[:8]).hexdigest()],
        8: [hashlib.sha256(raw[8:16]).hexdigest(), hashlib.sha256(raw[16:]).hexdigest()],
    }
    assert [row.tolist() for row in recorder.rows[8]] == [[3.0, 4.0], [5.0, 6.0]]


def test_it_hears_nothing_until_it_listens():
    recorder = Recorder()
    recorder(StepInput(step=0), StepOutput(step=0, seq_ids=[1], token_ids=[0]), None)
    assert recorder.rows == {}
    assert recorder.digest == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    ("output", "got"),
    [(StepOutput(step=4, seq_ids=[1], token_ids=[0]), "no"), (step(4, {1: [1.0]}, "float64"), "float64")],
)
def test_other_logits_are_refused(output, got):
    recorder = Recorder()
    recorder.listening = True
    with pytest.raises(LightvllmError, match=f"step 4 came back with {got} logits; expected float32"):
        recorder(StepInput(step=4), output, None)


def test_top_tokens():
    row = np.array([0.5, 3.0, 3.0, -1.0, 2.0, 0.25, 0.0], dtype=np.float32)
    assert top_tokens(row, lambda ids: f"<{ids[0]}>") == [
        TopToken(1, "<1>", 3.0),
        TopToken(2, "<2>", 3.0),
        TopToken(4, "<4>", 2.0),
        TopToken(0, "<0>", 0.5),
        TopToken(5, "<5>", 0.25),
    ]

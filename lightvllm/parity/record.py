"""Listens to an engine's steps and keeps what the comparison needs of the logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightvllm.errors import LightvllmError
from lightvllm.messages import StepInput, StepOutput
from lightvllm.parity.compare import TopToken

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOP = 5

Decode = Callable[[Sequence[int]], str]


def top_tokens(row: NDArray[np.float32], decode: Decode) -> list[TopToken]:
    """The ``TOP`` most probable tokens of one row of logits, best first; ties to the lower id."""
    best = np.argsort(-row, kind="stable")[:TOP]
    return [TopToken(int(i), decode([int(i)]), float(row[i])) for i in best]


class Recorder:
    """An engine's ``on_step``. Sequences are told apart by id, which an engine deals out in the order of asking.

    Attributes:
        listening: steps pass unheard while this is false.
        rows: by sequence, the logits of each generated token, float32 [vocab_size].
        digests: by sequence, SHA-256 of each of those rows.
    """

    def __init__(self) -> None:
        self.listening = False
        self.rows: dict[int, list[NDArray[np.float32]]] = {}
        self.digests: dict[int, list[str]] = {}
        self._whole = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 over the logits of every step so far, in order."""
        return self._whole.hexdigest()

    def __call__(self, step_input: StepInput, output: StepOutput, batch: Any) -> None:
        if self.listening and output.seq_ids:
            if output.logits is None or output.logits.dtype != "float32":
                got = output.logits.dtype if output.logits else "no"
                raise LightvllmError(f"step {output.step} came back with {got} logits; expected float32")
            self._whole.update(output.logits.data)
            for seq_id, row in zip(output.seq_ids, output.logits.numpy(), strict=True):
                self.rows.setdefault(seq_id, []).append(row)
                self.digests.setdefault(seq_id, []).append(hashlib.sha256(row).hexdigest())

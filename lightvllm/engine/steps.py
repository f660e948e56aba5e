"""Steps as the engine sees them: what executes them, one that has been sent, and what is told of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from lightvllm.engine.scheduler import ScheduledBatch
from lightvllm.errors import LightvllmError
from lightvllm.messages import StepInput, StepOutput

MAX_TIMINGS = 65_536
"""Steps whose timing an engine keeps; older ones are dropped."""

OnStep = Callable[[StepInput, StepOutput, ScheduledBatch], None]


class StepExecutor(Protocol):
    """What the engine needs of an executor."""

    @property
    def max_concurrent_batches(self) -> int: ...

    @property
    def num_kv_blocks(self) -> int: ...

    @property
    def step_timeout(self) -> float: ...

    def execute_model(self, scheduler_output: StepInput, non_block: bool = False) -> Any:
        """With ``non_block=True``: a Future of the StepOutput, whose ``result(timeout)`` raises lightvllm's errors."""

    def shutdown(self) -> None: ...


class StepTiming(NamedTuple):
    """One call of ``step``: its ``seconds``, and ``model_seconds``: the output rank's in the step that it took in.

    The difference is the time outside the model only where steps do not overlap, as they do with asynchronous
    scheduling and with several pipeline stages.
    """

    step: int
    num_seqs: int
    num_tokens: int
    seconds: float
    model_seconds: float


class InFlight(NamedTuple):
    """A step that has been sent: when it was planned and sent, by ``time.perf_counter()``."""

    batch: ScheduledBatch
    future: Future[StepOutput]
    planned: float
    sent: float

    def check(self, output: StepOutput) -> None:
        """Raise LightvllmError unless this answers the step."""
        expected = [seq.seq_id for seq in self.batch.sampled]
        if (output.step, output.seq_ids) != (self.batch.step_input.step, expected):
            raise LightvllmError(
                f"the executor answered step {output.step} for sequences {output.seq_ids}; expected step "
                f"{self.batch.step_input.step} for {expected}; do driver and workers run the same lightvllm?"
            )

    def tell(self, on_step: OnStep, output: StepOutput) -> None:
        """Call ``on_step``, as if what was sampled for sequences that have ended meanwhile had not been."""
        batch, alive = self.batch, [not seq.is_finished for seq in self.batch.sampled]
        if all(alive):
            on_step(batch.step_input, output, batch)
        else:
            on_step(batch.step_input, output.only(alive), batch.only(alive))

"""Worker classes for the contract tests: no torch, no model, only behaviour that can be observed from outside."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from lightvllm.messages import Deferred, StepInput, StepOutput, Tensor, WorkerInfo


class ContractWorker:
    """Records what is asked of it."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self._busy = threading.Lock()
        self.overlaps = 0

    def echo(self, value: object) -> object:
        return value

    def pid(self) -> int:
        return os.getpid()

    def getenv(self, name: str) -> str | None:
        return os.environ.get(name)

    def append(self, value: object) -> int:
        """Notes an overlap if another call is running at the same time."""
        if not self._busy.acquire(blocking=False):
            self.overlaps += 1
            return -1
        try:
            time.sleep(0.001)
            self.log.append(value)
            return len(self.log)
        finally:
            self._busy.release()

    def read_log(self) -> tuple[list[object], int]:
        return self.log, self.overlaps

    def boom(self, text: str) -> None:
        raise ValueError(text)

    def touch_and_hang(self, path: str, seconds: float = 60.0) -> None:
        Path(path).touch()
        time.sleep(seconds)

    def wait_for_file(self, path: str, seconds: float = 60.0) -> str:
        """Returns when the test has made the file."""
        deadline = time.monotonic() + seconds
        while not Path(path).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(path)
            time.sleep(0.005)
        return "gone on"

    def later(self, path: str, name: str, value: object = None) -> Deferred:
        """Begins; the value is there when the test has made the file ``path``. Notes ``name`` when it is."""

        def finish() -> object:
            self.wait_for_file(path)
            self.log.append(name)
            return value

        return Deferred(finish)

    def later_boom(self, text: str) -> Deferred:
        return Deferred(lambda: self.boom(text))

    def later_exit(self, path: str, code: int) -> Deferred:
        """Exits when the test has made the file."""

        def finish() -> None:
            self.wait_for_file(path)
            self.exit_yourself(code)

        return Deferred(finish)

    def later_thread(self) -> Deferred:
        """Whether it is finished in the thread in which it was begun."""
        begun = threading.get_ident()
        return Deferred(lambda: threading.get_ident() == begun)

    def kill_yourself(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def exit_yourself(self, code: int) -> None:
        sys.exit(code)

    def sample_tokens(self, grammar: object) -> tuple[str, object]:
        return ("sampled", grammar)

    def check_health(self) -> None:
        """Well."""


class StageWorker(ContractWorker):
    """A pipeline stage with integers for hidden states: it doubles what it is given."""

    def load_model(self) -> WorkerInfo:
        return WorkerInfo(rank=0, device="cpu", threads=1, attention_backend="none", kernels="none", parameter_bytes=7)

    def execute_model(self, step: StepInput) -> StepOutput:
        return StepOutput(step=step.step, seq_ids=[1], token_ids=[step.step])

    def sample_tokens(self, grammar: object) -> tuple[str, object]:
        return ("sampled", grammar)

    def execute_stage(self, step: StepInput, tensors: list[Tensor]) -> tuple[StepOutput | None, list[Tensor]]:
        if step.step < 0:
            raise ValueError("no such step")
        given = tensors or [Tensor("uint8", [step.step], bytes(range(256)) * (step.step // 256))]
        doubled = [Tensor(t.dtype, t.shape, bytes(2 * value % 256 for value in t.data)) for t in given]
        return (self.execute_model(step) if tensors else None), doubled


class FailsToStart:
    def __init__(self) -> None:
        raise RuntimeError("no such device")


class HangsAtStart:
    def __init__(self) -> None:
        time.sleep(60)

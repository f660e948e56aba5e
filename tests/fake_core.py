"""The fake executor as an engine's loop wants it, made in whichever process that loop runs.

``make_executor`` stands where the factory's stands. What a test wants of it comes in ``env``, an option of the engine:

* ``FAKE_STEP_SECONDS``: how long a step takes.
* ``FAKE_DEATHS``: a FIFO; ``"1:killed by SIGKILL"`` written to it kills rank 1 with that reason.
* ``FAKE_START``: ``"hang"``, or the name of an error of ``errors.py`` that the start ends with.
* ``FAKE_STEP_ERROR``: the number of a step that fails with an error that is nobody's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from fake_executor import FakeExecutor, scrambled

from lightvllm import errors
from lightvllm.backends.base import WorkerRef
from lightvllm.config import EngineConfig, ExecutorConfig
from lightvllm.errors import Shutdown, WorkerDied
from lightvllm.messages import StepInput, StepOutput, WorkerInfo

VOCAB_SIZE = 266


class FakeCoreExecutor(FakeExecutor):
    def __init__(self, executor: ExecutorConfig, engine: EngineConfig) -> None:
        super().__init__(
            scrambled(VOCAB_SIZE),
            num_kv_blocks=engine.cache.num_blocks or 64,
            block_size=engine.cache.block_size,
            max_concurrent_batches=engine.parallel.pipeline_parallel_size,
            max_num_seqs=engine.scheduler.max_num_seqs,
            max_num_batched_tokens=engine.scheduler.max_num_batched_tokens,
            vocab_size=VOCAB_SIZE,
        )
        ranks = range(engine.parallel.world_size)
        self.workers = [WorkerRef(f"fake-{rank}", "here", pid=1000 + rank) for rank in ranks]
        self.worker_infos = [
            WorkerInfo(
                rank=rank,
                device="cpu",
                threads=1,
                attention_backend="naive",
                kernels="reference",
                parameter_bytes=10 + rank,
            )
            for rank in ranks
        ]
        self.start_seconds = 0.25
        self._step_seconds = float(executor.env.get("FAKE_STEP_SECONDS", 0))
        self._step_error = int(executor.env.get("FAKE_STEP_ERROR", 0))
        self._failure: Exception | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._over = threading.Event()
        if path := executor.env.get("FAKE_DEATHS"):
            threading.Thread(target=self._die, args=(path,), daemon=True).start()

    @property
    def is_failed(self) -> bool:
        return isinstance(self._failure, WorkerDied)

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def check_health(self) -> None:
        if self._failure is not None:
            raise self._failure

    def execute_model(self, scheduler_output: StepInput, non_block: bool = False) -> Future[StepOutput]:
        if scheduler_output.step == self._step_error:
            raise ZeroDivisionError("nobody has thought of this")
        if self._step_seconds:
            self._over.wait(self._step_seconds)
        if self._failure is not None:
            raise self._failure
        return super().execute_model(scheduler_output, non_block)

    def shutdown(self) -> None:
        super().shutdown()
        self._failure = self._failure or Shutdown("the executor has been shut down")
        self._over.set()

    def _die(self, path: str) -> None:
        with open(path, encoding="utf-8") as fifo:
            rank, _, reason = fifo.read().partition(":")
        self._failure = WorkerDied(f"fake-{rank}", reason, int(rank))
        self._over.set()
        for callback in self._callbacks:
            callback()


def make_executor(
    executor: ExecutorConfig, engine: EngineConfig, progress: Callable[[str], None] | None = None
) -> FakeCoreExecutor:
    start = executor.env.get("FAKE_START")
    if progress:
        progress("starting the fake")
    if start == "hang":
        deadline = time.monotonic() + executor.start_timeout
        while time.monotonic() < deadline:
            time.sleep(0.05)
        raise errors.PlacementError("the fake hung")
    if start:
        raise getattr(errors, start)("the fake does not start")
    return FakeCoreExecutor(executor, engine)

"""What the server's side knows of an engine: ``EngineClient``, and the plain data that it tells.

``AsyncLLM`` (``async_llm.py``) is one; tests may bring another. Imports no torch, no executor and no HTTP. All types
cross a process border as MessagePack (msgspec), so they hold values only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

import msgspec

from lightvllm.config import EngineConfig
from lightvllm.engine.intake import Prompt
from lightvllm.engine.outputs import EmbeddingOutput, RequestOutput
from lightvllm.engine.stats import EngineStats as EngineStats
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.sampling_params import SamplingParams

EngineState = Literal["starting", "ready", "failed", "stopped"]
RankHealth = Literal["ready", "dead", "stopped"]
OutputKind = Literal["delta", "cumulative", "final"]
"""What ``generate`` yields: only what is new since the output before, all so far, or the finished output alone."""


class RankState(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, as an operator wants to see it.

    Attributes:
        rank, tp_rank, pp_rank: its place in the layout.
        worker: the backend's id of it (``WorkerRef.id``).
        node, address, device, pid: where it is; ``""`` or 0 for what is not known.
        parameter_bytes: memory of its weights.
        health: ``"dead"`` once it is known to be gone; ``"stopped"`` for the others of a group that has failed or has
            been shut down.
        reason: why, if it is dead.
    """

    rank: int
    tp_rank: int
    pp_rank: int
    worker: str
    node: str = ""
    address: str = ""
    device: str = ""
    pid: int = 0
    parameter_bytes: int = 0
    health: RankHealth = "ready"
    reason: str = ""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while an engine lives.

    Attributes:
        model: as the user named it; ``path`` is the folder.
        executor: ``"uniproc"``, ``"ray"`` or ``"k8s"``.
        can_generate, can_embed: what the model is for.
        start_seconds: from the start of placement until the first step could be run.
        max_num_waiting: requests that may wait beyond those that run; more are refused with QueueFull.
    """

    model: str
    path: str
    executor: str
    config: EngineConfig
    version: str
    can_generate: bool = True
    can_embed: bool = False
    start_seconds: float = 0.0
    max_num_waiting: int = 0


class EngineClient(Protocol):
    """An engine as the server uses it, from one asyncio loop."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model; raises ConfigError if it was skipped."""

    @property
    def state(self) -> EngineState: ...

    @property
    def failure(self) -> str | None:
        """Why the state is ``"failed"``, in one line."""

    @property
    def ranks(self) -> list[RankState]:
        """Every worker, in rank order."""

    @property
    def stats(self) -> EngineStats:
        """The latest."""

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have ``listener`` called in the loop when state, ranks or stats have changed; returns what ends that."""

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run a request and yield its outputs, the finished one last. Closing the generator aborts the request.

        Outputs that nobody has taken yet are merged, so that a slow reader holds no memory but its own text.

        Args:
            priority: lower goes first (vLLM's meaning); equal ones in order of arrival.
            timeout: seconds after which the request is ended where it stands, with the finish reason ``"timeout"``.
            request_id: for logs; unique among the unfinished ones; None has one made.

        Raises (at the first ``anext`` or later):
            ConfigError: the request cannot be run.
            QueueFull: too many requests are waiting.
            WorkerDied, WorkerError, RpcTimeout, LightvllmError: the engine has failed.
            Shutdown: the engine has been shut down.
        """

    async def embed(self, prompt: Prompt, request_id: str | None = None, *, priority: int = 0) -> EmbeddingOutput:
        """The prompt as a vector. Raises as ``generate`` does; ConfigError if the model cannot."""

    async def check_health(self) -> None:
        """Raise unless every worker answers, within seconds."""

    async def shutdown(self) -> None:
        """End the engine and its workers, and leave nothing behind. Idempotent."""

"""An ``EngineClient`` that does what a test says: its state, ranks and numbers are set by hand, its requests yield
token after token at times that the test knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from lightvllm.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from lightvllm.engine.outputs import CompletionOutput, EmbeddingOutput, RequestMetrics, RequestOutput
from lightvllm.engine.protocol import EngineInfo, EngineState, EngineStats, OutputKind, RankState
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import WorkerDied
from lightvllm.sampling_params import SamplingParams


def engine_config(tp: int = 1, pp: int = 1) -> EngineConfig:
    model = ModelConfig(
        path="/models/tiny",
        architecture="LlamaForCausalLM",
        dtype="float32",
        max_model_len=512,
        vocab_size=266,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    return EngineConfig(model=model, parallel=parallel, cache=CacheConfig(block_size=16))


@dataclass
class Times:
    """Of each request: seconds from its arrival to its first step, from there to its first token, then per token."""

    queue: float = 0.5
    prefill: float = 0.25
    per_token: float = 0.0625


class ScriptedClient:
    """Ready, with ``tp * pp`` ranks.

    Attributes:
        tokens: that each continuation of a request gets; then it ends with ``"length"``.
        merged: tokens that come in one output.
        gate: if set, requests stop after their first output until it is.
        error: raised by requests in place of their first output, or of the second with ``error_after=1``.
        yielded: outputs so far.
    """

    def __init__(self, tp: int = 1, pp: int = 1, model: str = "tiny", state: EngineState = "ready") -> None:
        self.info = EngineInfo(
            model=model,
            path="/models/tiny",
            executor="k8s",
            config=engine_config(tp, pp),
            version="0",
            can_embed=True,
            start_seconds=1.5,
        )
        self.state: EngineState = state
        self.failure: str | None = None
        self.stats = EngineStats(num_kv_blocks=100, num_free_kv_blocks=100)
        self.ranks = [
            RankState(
                rank=rank,
                tp_rank=rank % tp,
                pp_rank=rank // tp,
                worker=f"worker-{rank}",
                node=f"node-{rank % tp}",
                address=f"127.0.0.1:{5000 + rank}",
                device=f"cuda:{rank}",
                pid=100 + rank,
                parameter_bytes=3 << 28,
            )
            for rank in range(tp * pp)
        ]
        self.times = Times()
        self.tokens = 4
        self.merged = 1
        self.cached = 0
        self.preemptions = 0
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.error_after = 0
        self.yielded = 0
        self.listeners: list[Callable[[], None]] = []

    @property
    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def set(self, *, state: EngineState | None = None, failure: str | None = None, **stats: Any) -> None:
        """Change state or numbers, and tell the listeners."""
        if state is not None:
            self.state, self.failure = state, failure
        self.stats = msgspec.structs.replace(self.stats, **stats)
        for listener in list(self.listeners):
            listener()

    def kill(self, rank: int, reason: str = "killed by SIGKILL") -> None:
        """A worker dies, and with it the engine."""
        for index, each in enumerate(self.ranks):
            health = {"health": "dead", "reason": reason} if index == rank else {"health": "stopped"}
            self.ranks[index] = msgspec.structs.replace(each, **health)
        self.set(state="failed", failure=str(WorkerDied(f"worker-{rank}", reason, rank)))

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        params = sampling_params or SamplingParams()
        arrival = asyncio.get_running_loop().time() - 100.0  # long ago, so that what comes later is past too
        scheduled = arrival + self.times.queue
        first = scheduled + self.times.prefill
        seen = 0
        for number in range(0, self.tokens, self.merged):
            if self.error is not None and number // self.merged == self.error_after:
                raise self.error
            if number and self.gate is not None:
                await self.gate.wait()
            done = min(number + self.merged, self.tokens)
            finished = done == self.tokens
            metrics = RequestMetrics(
                arrival_time=arrival,
                first_scheduled_time=scheduled,
                first_token_time=first,
                last_token_time=first + (done - 1) * self.times.per_token,
                num_preemptions=self.preemptions,
            )
            ids = list(range(seen if output_kind == "delta" else 0, done))
            seen = done
            if output_kind == "final" and not finished:
                continue
            self.yielded += 1
            outputs = [
                CompletionOutput(index, "x" * len(ids), ids.copy(), finish_reason="length" if finished else None)
                for index in range(params.n)
            ]
            yield RequestOutput(
                request_id or "", None, list(prompt), outputs, finished, metrics, num_cached_tokens=self.cached
            )
            await asyncio.sleep(0)

    async def embed(self, prompt: Any, request_id: str | None = None, *, priority: int = 0) -> EmbeddingOutput:
        if self.error is not None:
            raise self.error
        return EmbeddingOutput(request_id or "", list(prompt), [0.5], self.cached)

    async def check_health(self) -> None: ...

    async def shutdown(self) -> None:
        self.set(state="stopped")

"""Where an engine stands, in numbers that cross a process border: see ``LLMEngine.stats``."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engine stands; sent after steps, and when a request comes or goes while nothing runs.

    Counters (``total_``) only grow while the engine lives; the rest are gauges. Seconds.

    Attributes:
        num_running, num_waiting: sequences, as the scheduler counts them.
        kv_cache_usage: share of the KV cache's blocks that are held, 0 to 1.
        num_kv_blocks, num_free_kv_blocks: of the KV cache.
        total_prefix_cache_queries, total_prefix_cache_hits: prompt tokens looked up in the prefix cache, and found;
            when a sequence is first admitted, not when it comes again after a preemption.
        total_preemptions: times that a sequence gave up its blocks.
        total_prompt_tokens, total_generation_tokens: computed prompt tokens (cached ones left out, those computed anew
            after a preemption counted again) and sampled tokens that belong to a sequence.
        total_steps: steps done.
        total_step_seconds: from the planning of each step, or the end of the one before if that is later, until its
            tokens were taken in: wall time in which the engine was at work, one step after the other.
        total_model_seconds: what the output rank spent in them. The difference is overhead, of the executor, the
            scheduler and whoever calls the engine.
        total_executor_seconds: of that overhead, from the sending of a step (or the reply before, if that is later) to
            its reply, less the model's seconds.
        step_tokens: tokens computed in the latest step.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_kv_blocks: int = 0
    num_free_kv_blocks: int = 0
    total_prefix_cache_queries: int = 0
    total_prefix_cache_hits: int = 0
    total_preemptions: int = 0
    total_prompt_tokens: int = 0
    total_generation_tokens: int = 0
    total_steps: int = 0
    total_step_seconds: float = 0.0
    total_model_seconds: float = 0.0
    total_executor_seconds: float = 0.0
    step_tokens: int = 0


class StepClock:
    """Adds up what steps cost, one after the other, though several may be in flight. All times are one clock's.

    Attributes:
        steps, step_seconds, model_seconds, executor_seconds: ``EngineStats``' totals.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.step_seconds = self.model_seconds = self.executor_seconds = 0.0
        self._replied = self._ended = self._executor_balance = 0.0

    def add(self, planned: float, sent: float, replied: float, ended: float, model_seconds: float) -> None:
        """A step is done; called in the order of the steps."""
        self.steps += 1
        self.step_seconds += ended - max(planned, self._ended)
        self.model_seconds += model_seconds
        # Whoever looks late at one reply finds the next one early, so single steps may come out below nothing.
        self._executor_balance += replied - max(sent, self._replied) - model_seconds
        self.executor_seconds = max(self.executor_seconds, self._executor_balance)
        self._replied, self._ended = replied, ended

"""``RequestTracker`` follows one request of the engine; ``RequestHistograms`` is where all of them leave their times.

Times are the engine's where it tells them (``RequestOutput.metrics``: when a token was sampled, not when it was noticed
here), else those at which outputs came; both are ``time.monotonic()`` of one host.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

from lightvllm.engine.outputs import EmbeddingOutput, RequestMetrics, RequestOutput
from lightvllm.engine.protocol import OutputKind
from lightvllm.sampling_params import SamplingParams
from lightvllm.server.histogram import (
    FEW,
    FIRST_TOKEN_SECONDS,
    PREEMPTIONS,
    REQUEST_SECONDS,
    TOKEN_SECONDS,
    Histogram,
    token_bounds,
)

Ending = Literal["stop", "length", "abort", "timeout", "error"]
ENDINGS: tuple[Ending, ...] = ("stop", "length", "abort", "timeout", "error")


class RequestHistograms:
    """What is known of all requests together.

    A request that was aborted, or that failed, is counted in ``endings`` and leaves what happened before (the time to
    its first token, the intervals between tokens), but none of the figures of a whole request.

    Args:
        longest: upper end of the buckets of token counts, tokens.

    Attributes:
        endings: finished requests by how they ended.
        rejections: requests that were refused because too many were waiting.
    """

    def __init__(self, longest: int) -> None:
        tokens = token_bounds(longest)
        self.endings: dict[Ending, int] = dict.fromkeys(ENDINGS, 0)
        self.rejections = 0
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_SECONDS
        )
        self.inter_token = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a continuation.", TOKEN_SECONDS
        )
        self.per_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between two tokens of a continuation, of whole requests.",
            TOKEN_SECONDS,
        )
        self.e2e = Histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its last output.", REQUEST_SECONDS
        )
        self.queue = Histogram(
            "vllm:request_queue_time_seconds", "From a request's arrival to its first step.", REQUEST_SECONDS
        )
        self.prefill = Histogram(
            "vllm:request_prefill_time_seconds", "From a request's first step to its first token.", REQUEST_SECONDS
        )
        self.decode = Histogram(
            "vllm:request_decode_time_seconds", "From a request's first token to its last.", REQUEST_SECONDS
        )
        self.inference = Histogram(
            "vllm:request_inference_time_seconds", "From a request's first step to its last token.", REQUEST_SECONDS
        )
        self.prompt_tokens = Histogram("vllm:request_prompt_tokens", "Tokens of a request's prompt.", tokens)
        self.computed_tokens = Histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Tokens of a request's prompt that were not found in the prefix cache.",
            tokens,
        )
        self.generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request, all its continuations together.", tokens
        )
        self.max_generation_tokens = Histogram(
            "vllm:request_max_num_generation_tokens", "Generated tokens of a request's longest continuation.", tokens
        )
        self.max_tokens = Histogram("vllm:request_params_max_tokens", "What requests gave as max_tokens.", tokens)
        self.n = Histogram("vllm:request_params_n", "What requests gave as n.", FEW)
        self.preemptions = Histogram(
            "vllm:request_num_preemptions", "How often a request's continuations lost their cache.", PREEMPTIONS
        )

    def __iter__(self) -> Iterator[Histogram]:
        return (value for value in vars(self).values() if isinstance(value, Histogram))


class RequestTracker:
    """One request from its arrival to its end.

    Call ``update`` with every output; then, unless the last one was finished, ``end``. What comes after the end is
    not counted. Raises nothing.

    Args:
        params, output_kind: as given to ``generate``; neither for an embedding.

    Attributes:
        arrival: when this was made, ``time.monotonic()``.
        ending: None until the request has ended.
        prompt_tokens, cached_tokens, generated_tokens: so far.
        times: the engine's latest, None before its first output.
    """

    __slots__ = (
        "_kind", "_last_token", "_lengths", "_told_last", "_totals",
        "arrival", "cached_tokens", "ended_at", "ending", "params", "prompt_tokens", "times",
    )  # fmt: skip

    def __init__(
        self, totals: RequestHistograms, params: SamplingParams | None = None, output_kind: OutputKind = "final"
    ) -> None:
        self.arrival = time.monotonic()
        self.ended_at: float | None = None
        self.ending: Ending | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.times: RequestMetrics | None = None
        self._totals = totals
        self.params = params
        self._kind = output_kind
        self._lengths: dict[int, int] = {}  # tokens of each continuation
        self._last_token: float | None = None  # when it was sampled, as far as is known
        self._told_last: float | None = None  # the engine's latest word on that

    @property
    def generated_tokens(self) -> int:
        return sum(self._lengths.values())

    @property
    def first_token_seconds(self) -> float | None:
        """From the arrival to the first token; None before it."""
        first = None if self.times is None else self.times.first_token_time
        return None if first is None else max(0.0, first - self.arrival)

    def update(self, output: RequestOutput) -> None:
        """Take in an output of ``EngineClient.generate``."""
        if self.ending is not None:
            return
        self.times = output.metrics
        self.prompt_tokens = len(output.prompt_token_ids)
        self.cached_tokens = output.num_cached_tokens or 0
        steps = 0  # in which the furthest of the continuations got a token
        for completion in output.outputs:
            before, length = self._lengths.get(completion.index, 0), len(completion.token_ids)
            if self._kind == "delta":
                length += before
            self._lengths[completion.index] = length
            steps = max(steps, length - before)
        if steps > 0:
            self._got_tokens(output.metrics, steps)
        if output.finished:
            self.end(next((c.finish_reason for c in output.outputs if c.finish_reason is not None), "stop"))

    def embedded(self, output: EmbeddingOutput) -> None:
        """Take in the vector that the request was for, and end."""
        self.prompt_tokens = len(output.prompt_token_ids)
        self.cached_tokens = output.num_cached_tokens or 0
        self.end("stop")

    def _got_tokens(self, times: RequestMetrics, steps: int) -> None:
        if times.first_token_time is None or times.last_token_time is None:
            return
        latest, before = times.last_token_time, self._last_token
        if before is None:
            self._totals.first_token.observe(self.first_token_seconds or 0.0)
            before, steps = times.first_token_time, steps - 1
        elif latest == self._told_last:  # the engine tells its times in the first and the last output only
            latest = time.monotonic()
        if steps > 0:  # outputs that came as one are taken to be evenly spaced
            self._totals.inter_token.observe(max(0.0, latest - before) / steps, steps)
        self._last_token, self._told_last = latest, times.last_token_time

    def end(self, ending: Ending) -> None:
        """The request has ended so; a second call changes nothing."""
        if self.ending is not None:
            return
        self.ending = ending
        self.ended_at = time.monotonic()
        self._totals.endings[ending] += 1
        if ending in ("abort", "error"):
            return
        self._totals.e2e.observe(self.ended_at - self.arrival)
        self._totals.prompt_tokens.observe(self.prompt_tokens)
        self._totals.computed_tokens.observe(self.prompt_tokens - self.cached_tokens)
        if self.params is not None and self.times is not None:
            self._leave_figures(self.params, self.times)

    def _leave_figures(self, params: SamplingParams, times: RequestMetrics) -> None:
        totals, longest = self._totals, max(self._lengths.values(), default=0)
        totals.generation_tokens.observe(self.generated_tokens)
        totals.max_generation_tokens.observe(longest)
        totals.n.observe(params.n)
        if params.max_tokens is not None:
            totals.max_tokens.observe(params.max_tokens)
        totals.preemptions.observe(times.num_preemptions)
        scheduled, first, last = times.first_scheduled_time, times.first_token_time, times.last_token_time
        if scheduled is None:
            return
        totals.queue.observe(max(0.0, scheduled - times.arrival_time))
        if first is None or last is None:
            return
        totals.prefill.observe(first - scheduled)
        totals.decode.observe(last - first)
        totals.inference.observe(last - scheduled)
        if longest > 1:
            totals.per_token.observe((last - first) / (longest - 1))

"""``RequestStream``: one request's outputs on their way from the engine's loop to who reads them.

What has not been read yet is one merged delta, so a reader that is slow, or gone, holds its request's text and no more.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from lightvllm.engine.core_messages import Delta
from lightvllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from lightvllm.engine.protocol import OutputKind
from lightvllm.errors import LightvllmError


class RequestStream:
    """For one event loop: ``put`` and ``fail`` on one side, ``next`` on the other.

    Attributes:
        num_unfinished: sequences of the request that have not ended.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        n: int,
        arrival_time: float,
        output_kind: OutputKind,
    ) -> None:
        self.request_id = request_id
        self.num_unfinished = n
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._kind = output_kind
        self._metrics = RequestMetrics(arrival_time)
        self._num_cached_tokens: int | None = None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._total = [CompletionOutput(index, "", []) for index in range(n)]  # for cumulative outputs
        self._pending: Delta | None = None
        self._error: LightvllmError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: Delta) -> int:
        """Take in what is new; how many of the request's sequences have ended with it."""
        ended = sum(output.finish_reason is not None for output in delta.outputs)
        self.num_unfinished -= ended
        if self._pending is None:
            self._pending = delta
        else:
            self._pending.add(delta)
        if self._waiter is not None and (delta.finished or self._kind != "final"):
            self._wake()
        return ended

    def fail(self, error: LightvllmError) -> None:
        """Nothing more comes; ``next`` raises, after what has come."""
        self._error = error
        self._wake()

    async def next(self) -> RequestOutput:
        """The next output, as soon as there is one. One reader at a time."""
        while True:
            if self._pending is not None and (self._pending.finished or self._kind != "final"):
                return self._take(self._pending)
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self, delta: Delta) -> RequestOutput:
        self._pending = None
        if delta.metrics is not None:
            self._metrics = replace(delta.metrics, arrival_time=self._metrics.arrival_time)
        if delta.num_cached_tokens is not None:
            self._num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=self._cumulative(delta) if self._kind == "cumulative" else delta.outputs,
            finished=delta.finished,
            metrics=self._metrics,
            num_cached_tokens=self._num_cached_tokens,
            prompt_logprobs=delta.prompt_logprobs if self._kind == "delta" else self._prompt_logprobs,
            embedding=delta.embedding,
        )

    def _cumulative(self, delta: Delta) -> list[CompletionOutput]:
        for output in delta.outputs:
            self._total[output.index].add(output)
        return [
            replace(o, token_ids=o.token_ids.copy(), logprobs=None if o.logprobs is None else o.logprobs.copy())
            for o in self._total
        ]

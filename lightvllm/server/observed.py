"""``ObservedEngine``: an ``EngineClient`` that is watched, for whoever uses it without their doing anything.

The application puts it around the engine once (``app.state.engine = ObservedEngine(client, metrics)``); every request
that then comes to the engine is followed from its arrival to its end, however it ends. Outputs pass unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager

from lightvllm.engine.engine import Prompt
from lightvllm.engine.outputs import EmbeddingOutput, RequestOutput
from lightvllm.engine.protocol import EngineClient, EngineInfo, EngineState, EngineStats, OutputKind, RankState
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError, LightvllmError, QueueFull
from lightvllm.sampling_params import SamplingParams
from lightvllm.server.logging import HttpRequest, http_request
from lightvllm.server.metrics import Metrics, stats_of
from lightvllm.server.tracing import Tracer
from lightvllm.server.tracker import RequestTracker


class ObservedEngine:
    """``client``, with every request counted in ``metrics`` and, if there is a ``tracer``, traced."""

    def __init__(self, client: EngineClient, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self._client = client
        self._metrics = metrics
        self._tracer = tracer
        metrics.attach(client)

    @property
    def info(self) -> EngineInfo:
        return self._client.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._client.tokenizer

    @property
    def state(self) -> EngineState:
        return self._client.state

    @property
    def failure(self) -> str | None:
        return self._client.failure

    @property
    def ranks(self) -> list[RankState]:
        return self._client.ranks

    @property
    def stats(self) -> EngineStats:
        return stats_of(self._client)

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        return self._client.on_change(listener)

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
        outputs = self._client.generate(
            prompt, sampling_params, request_id, priority=priority, timeout=timeout, output_kind=output_kind
        )
        tracker = RequestTracker(self._metrics.requests, sampling_params or SamplingParams(), output_kind)
        return self._watch(outputs, self._following(tracker, request_id or "", http_request.get()), tracker)

    async def _watch(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        following: AbstractContextManager[None],
        tracker: RequestTracker,
    ) -> AsyncGenerator[RequestOutput, None]:
        with following:
            async with aclosing(outputs):
                async for output in outputs:
                    tracker.update(output)
                    yield output

    async def embed(self, prompt: Prompt, request_id: str | None = None, *, priority: int = 0) -> EmbeddingOutput:
        tracker = RequestTracker(self._metrics.requests)
        with self._following(tracker, request_id or "", http_request.get()):
            output = await self._client.embed(prompt, request_id, priority=priority)
            tracker.embedded(output)
            return output

    @contextmanager
    def _following(self, tracker: RequestTracker, request_id: str, http: HttpRequest | None) -> Iterator[None]:
        if http is not None:
            http.model = self._metrics.model_name
        failure: str | None = None
        try:
            yield
        except QueueFull:
            self._metrics.requests.rejections += 1
            raise
        except ConfigError:  # never was a request of the engine
            raise
        except Exception as error:
            failure = str(error) if isinstance(error, LightvllmError) else f"{type(error).__name__}: {error}"
            tracker.end("error")
            self._metrics.failed(request_id, failure)
            raise
        except BaseException:  # the generator was closed, or its task cancelled: the client has gone
            tracker.end("abort")
            raise
        finally:
            if http is not None:
                http.add(tracker.prompt_tokens, tracker.generated_tokens, tracker.first_token_seconds)
            if self._tracer is not None and tracker.ending is not None:
                self._tracer.request(tracker, request_id, self._metrics.model_name, http, failure)

    async def check_health(self) -> None:
        await self._client.check_health()

    async def shutdown(self) -> None:
        await self._client.shutdown()

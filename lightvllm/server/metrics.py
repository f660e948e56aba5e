"""``Metrics``: what Prometheus scrapes of one server, in a registry of its own; and ``GET /metrics``.

Names, labels and buckets are vLLM's (``vllm/v1/metrics/loggers.py``) where the meaning is the same, so that dashboards
made for it work; what vLLM has no word for is called ``lightvllm:``. docs/observability.md lists them all.

Three sources: the engine's own counters, read when somebody scrapes; requests, each followed by a ``RequestTracker``
(``observed.py`` sees to that, handlers of the API call nothing here); and HTTP, counted by ``access.py``. Everything
happens in the server's event loop, so there are no locks.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from lightvllm.engine.protocol import EngineClient, EngineState, EngineStats
from lightvllm.server.histogram import HTTP_SECONDS, STEP_TOKENS, Histogram
from lightvllm.server.tracker import RequestHistograms
from lightvllm.version import __version__

logger = logging.getLogger(__name__)

MAX_ERRORS = 20  # remembered for the status page
ENGINE = "0"  # vLLM's label for the number of a data-parallel engine; a server has one

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics for those who ask for it."""
    registry = request.app.state.metrics.registry
    for accepted in request.headers.get("accept", "").split(","):
        match accepted.split(";")[0].strip():
            case "application/openmetrics-text":
                # Their own choice for this type turns the colons in names into underscores; ours need no escapes.
                body = openmetrics.generate_latest(  # type: ignore[no-untyped-call]
                    registry, escaping=openmetrics.ALLOWUTF8, version="1.0.0"
                )
                return _scraped(body, "application/openmetrics-text; version=1.0.0; charset=utf-8")
            case "text/plain":
                break
    return _scraped(generate_latest(registry), "text/plain; version=0.0.4; charset=utf-8")


def _scraped(body: bytes, content_type: str) -> Response:
    return Response(body, headers={"content-type": content_type, "cache-control": "no-store"})


@dataclass(frozen=True, slots=True)
class RecentError:
    """Something that went wrong on the server's side.

    Attributes:
        time: when, the last time; seconds since 1970.
        request_id: of the request that it happened to last; empty if it happened to none.
        count: times in a row: one dead worker fails many requests in the same way.
    """

    time: float
    request_id: str
    message: str
    count: int = 1


class Metrics(Collector):
    """All that is counted in one server.

    Args:
        model_name: the label of that name; None takes what the engine was started with.
        longest: upper end of the buckets of token counts, tokens.

    Attributes:
        registry: this server's own, so that several servers in one process do not meet.
        requests: what is known of all requests.
        errors: the latest failures that were not the client's fault.
    """

    def __init__(self, model_name: str | None = None, longest: int = 131_072) -> None:
        self.registry = CollectorRegistry()
        self.requests = RequestHistograms(longest)
        self.errors: deque[RecentError] = deque(maxlen=MAX_ERRORS)
        self._model_name = model_name
        self._client: EngineClient | None = None
        self._unlisten: Callable[[], None] | None = None
        self._latest = EngineStats()
        self._state: EngineState = "starting"
        self._failed_at: float | None = None
        self._restarts = 0
        self._recovery_seconds = 0.0
        self._http: Counter[tuple[str, str, str]] = Counter()  # by method, handler and status
        self._http_seconds: dict[tuple[str, str], Histogram] = {}
        self._step_tokens = Histogram(
            "vllm:iteration_tokens_total", "Prompt and generated tokens of a step of the engine.", STEP_TOKENS
        )
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    @property
    def model_name(self) -> str:
        """The label of that name; empty as long as nobody has given one."""
        return self._model_name or ("" if self._client is None else self._client.info.model)

    def attach(self, client: EngineClient) -> None:
        """Read this engine's counters from now on."""
        self.detach()
        self._client = client
        self._latest = EngineStats()
        self._unlisten = client.on_change(self._changed)
        self._changed()

    def detach(self) -> None:
        """Listen to the engine no longer; its last counters stay."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None

    def failed(self, request_id: str, message: str) -> None:
        """Remember a failure for the status page."""
        count = 1
        if self.errors and self.errors[-1].message == message:
            before = self.errors.pop()
            count, request_id = before.count + 1, request_id or before.request_id
        self.errors.append(RecentError(time.time(), request_id, message, count))

    def answered(self, method: str, handler: str, status: int, seconds: float) -> None:
        """One HTTP request has been answered. ``handler`` is the route's template, never what the client sent."""
        self._http[method, handler, str(status)] += 1
        taken = self._http_seconds.get((method, handler))
        if taken is None:
            taken = self._http_seconds[method, handler] = Histogram("", "", HTTP_SECONDS)
        taken.observe(seconds)

    def _changed(self) -> None:
        assert self._client is not None
        stats, state = self._client.stats, self._client.state
        before, self._latest = self._latest, stats
        if (steps := stats.total_steps - before.total_steps) > 0:  # more than one if news of them came together
            tokens = stats.total_prompt_tokens + stats.total_generation_tokens
            tokens -= before.total_prompt_tokens + before.total_generation_tokens
            self._step_tokens.observe(tokens / steps, steps)
        if state == self._state:
            return
        self._state = state
        if state == "failed":
            self._failed_at = time.monotonic()
            why = self._client.failure or "no reason is known"
            self.failed("", why)
            dead = [rank for rank in self._client.ranks if rank.health == "dead"]
            extra = {"rank": dead[0].rank, "worker": dead[0].worker, "node": dead[0].node} if dead else {}
            logger.error("the engine has failed: %s", why, extra=extra)
        elif state == "ready" and self._failed_at is not None:
            self._restarts += 1
            away = time.monotonic() - self._failed_at
            self._recovery_seconds += away
            self._failed_at = None
            logger.warning("the engine is ready again after %.1f s", away)

    def collect(self) -> Iterator[Metric]:
        """All metric families; called by the registry at each scrape."""
        client = self._client
        labels = {"model_name": self.model_name, "engine": ENGINE}
        yield from self._http_families()
        yield _info("lightvllm:build_info", "The server's version.", version=__version__, **_python())
        state = _gauge("lightvllm:engine_state", "1 for the state that the engine is in.", [*labels, "state"])
        for each in get_args(EngineState):
            state.add_metric([*labels.values(), each], float(each == self._state))
        yield state
        yield from self._request_families(labels)
        if client is not None:
            yield from self._engine_families(client, stats_of(client), labels)

    def _http_families(self) -> Iterator[Metric]:
        total = CounterMetricFamily("http_requests", "HTTP requests answered.", labels=["method", "handler", "status"])
        for key, count in self._http.items():
            total.add_metric(key, count)
        yield total
        seconds = HistogramMetricFamily(
            "http_request_duration_seconds",
            "From an HTTP request's head to the end of its answer.",
            labels=["method", "handler"],
        )
        for of, taken in self._http_seconds.items():
            taken.add_to(seconds, of)
        yield seconds

    def _request_families(self, labels: dict[str, str]) -> Iterator[Metric]:
        for each in self.requests:
            yield each.family(labels)
        endings = CounterMetricFamily(
            "vllm:request_success", "Finished requests by how they ended.", labels=[*labels, "finished_reason"]
        )
        for ending, count in self.requests.endings.items():
            endings.add_metric([*labels.values(), ending], count)
        yield endings
        refused = CounterMetricFamily(
            "vllm:admission_rejections",
            "Requests refused because too many were waiting.",
            labels=["model_name", "reason"],
        )
        refused.add_metric([labels["model_name"], "max_num_queued_reqs"], self.requests.rejections)
        yield refused

    def _engine_families(self, client: EngineClient, stats: EngineStats, labels: dict[str, str]) -> Iterator[Metric]:
        def gauge(name: str, documentation: str, value: float) -> Metric:
            family = _gauge(name, documentation, list(labels))
            family.add_metric(list(labels.values()), value)
            return family

        def counter(name: str, documentation: str, value: float) -> Metric:
            family = CounterMetricFamily(name, documentation, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            return family

        def summary(name: str, documentation: str, count: int, total: float) -> Metric:
            family = SummaryMetricFamily(name, documentation, labels=list(labels))
            family.add_metric(list(labels.values()), count, total)
            return family

        yield gauge("vllm:num_requests_running", "Sequences that hold cache and take part in steps.", stats.num_running)
        yield gauge("vllm:num_requests_waiting", "Sequences that wait for room in a step.", stats.num_waiting)
        yield gauge("vllm:kv_cache_usage_perc", "Share of the KV cache that is held; 1 is all.", stats.kv_cache_usage)
        yield counter(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.total_prefix_cache_queries,
        )
        yield counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.total_prefix_cache_hits
        )
        yield counter("vllm:num_preemptions", "Sequences that gave up their cache to others.", stats.total_preemptions)
        computed, cached = stats.total_prompt_tokens, stats.total_prefix_cache_hits
        yield counter("vllm:prompt_tokens", "Prompt tokens, computed or found in the cache.", computed + cached)
        yield counter("vllm:prompt_tokens_cached", "Prompt tokens found in the cache.", cached)
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where they came from.", labels=[*labels, "source"]
        )
        sources.add_metric([*labels.values(), "local_compute"], computed)
        sources.add_metric([*labels.values(), "local_cache_hit"], cached)
        yield sources
        yield counter("vllm:generation_tokens", "Tokens sampled.", stats.total_generation_tokens)
        yield self._step_tokens.family(labels)
        overhead = max(0.0, stats.total_step_seconds - stats.total_model_seconds)
        yield summary(
            "lightvllm:step_seconds", "Wall time of steps, end to end.", stats.total_steps, stats.total_step_seconds
        )
        yield summary(
            "lightvllm:model_seconds",
            "Of that, in the output rank's model.",
            stats.total_steps,
            stats.total_model_seconds,
        )
        yield summary(
            "lightvllm:step_overhead_seconds", "Of that, anywhere but in the model.", stats.total_steps, overhead
        )
        yield summary(
            "lightvllm:executor_overhead_seconds",
            "From the sending of a step to its reply, less the model's time: what the executor costs.",
            stats.total_steps,
            stats.total_executor_seconds,
        )
        yield gauge("lightvllm:start_seconds", "How long the engine took to start.", client.info.start_seconds)
        yield counter("lightvllm:restarts", "How often the engine came back after a failure.", self._restarts)
        yield counter(
            "lightvllm:recovery_seconds", "How long it was away, all those times together.", self._recovery_seconds
        )
        up = _gauge(
            "lightvllm:rank_up", "1 while this worker is ready, 0 once it is not.", [*labels, "rank", "node", "worker"]
        )
        memory = _gauge("lightvllm:rank_parameter_bytes", "Memory of a rank's weights.", [*labels, "rank"])
        for rank in client.ranks:
            up.add_metric([*labels.values(), str(rank.rank), rank.node, rank.worker], float(rank.health == "ready"))
            memory.add_metric([*labels.values(), str(rank.rank)], rank.parameter_bytes)
        yield up
        yield memory
        yield _engine_info(client, labels)
        yield _cache_info(client, labels)


def stats_of(client: EngineClient) -> EngineStats:
    """What an engine told last; one that has ended runs nothing, whatever it said before."""
    if client.state in ("failed", "stopped"):
        return msgspec.structs.replace(client.stats, num_running=0, num_waiting=0, kv_cache_usage=0.0)
    return client.stats


def _gauge(name: str, documentation: str, labels: list[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, labels=labels)


def _info(name: str, documentation: str, **labels: str) -> Metric:
    family = _gauge(name, documentation, list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def _python() -> dict[str, str]:
    return {"python": platform.python_version()}


def _engine_info(client: EngineClient, labels: dict[str, str]) -> Metric:
    layout = client.info.config.parallel
    return _info(
        "lightvllm:engine_info",
        "What the engine was started with.",
        **labels,
        executor=client.info.executor,
        tensor_parallel_size=str(layout.tensor_parallel_size),
        pipeline_parallel_size=str(layout.pipeline_parallel_size),
        dtype=client.info.config.model.dtype,
        max_model_len=str(client.info.config.model.max_model_len),
    )


def _cache_info(client: EngineClient, labels: dict[str, str]) -> Metric:
    cache = client.info.config.cache
    return _info(
        "vllm:cache_config_info",
        "The KV cache's configuration.",
        **labels,
        block_size=str(cache.block_size),
        num_gpu_blocks=str(client.stats.num_kv_blocks),
        enable_prefix_caching=str(cache.enable_prefix_caching),
    )

"""``Tracer``: a span for each request of the engine, sent to an OpenTelemetry collector by OTLP/HTTP.

Spans and attributes are named as vLLM's (``vllm/tracing/utils.py``) and as OpenTelemetry's conventions for generative
AI, so that either's dashboards find them. A span is made when its request has ended, from the times that were noted on
the way: nothing is done per token. A thread of the SDK's sends them; the event loop never waits for the collector.

Needs the extra ``otel``; imported when a Tracer is made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightvllm.errors import ConfigError, MissingExtra
from lightvllm.server.logging import HttpRequest
from lightvllm.server.tracker import RequestTracker
from lightvllm.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

EXPORT_TIMEOUT = 10.0
"""Seconds that one batch of spans may take, tries that fail included."""


class Tracer:
    """Sends spans to ``endpoint`` until ``shutdown``.

    ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_EXPORTER_OTLP_TRACES_HEADERS``, ``OTEL_TRACES_SAMPLER``
    and ``OTEL_BSP_*`` have the meaning that OpenTelemetry gives them.

    Args:
        endpoint: URL, e.g. ``http://collector:4318``; without a path it is ``/v1/traces``.
        export_timeout: seconds; see ``EXPORT_TIMEOUT``.

    Raises:
        ConfigError: the endpoint is no URL of http or https.
        MissingExtra: opentelemetry is not installed.
    """

    def __init__(self, endpoint: str, *, export_timeout: float = EXPORT_TIMEOUT) -> None:
        self.endpoint = checked_endpoint(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as missing:
            raise MissingExtra("opentelemetry-sdk", "otel", "--otlp-traces-endpoint") from missing
        # One warning of ours says what fails; theirs come with every batch, with tracebacks.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "lightvllm"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(self.endpoint, timeout=export_timeout)
        self._provider.add_span_processor(BatchSpanProcessor(_warning_once(exporter, self.endpoint)))
        self._tracer = self._provider.get_tracer("lightvllm", __version__)

    def request(
        self, tracker: RequestTracker, request_id: str, model: str, http: HttpRequest | None, error: str | None = None
    ) -> None:
        """A request has ended: queue its span, a child of what the client's ``traceparent`` named.

        Args:
            error: why, if it failed.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        carrier = {} if http is None else {"traceparent": http.traceparent, "tracestate": http.tracestate}
        ended = tracker.ended_at if tracker.ended_at is not None else time.monotonic()
        clock = time.time_ns() - time.monotonic_ns()

        def since_1970(monotonic: float) -> int:
            return clock + int(monotonic * 1e9)

        span = self._tracer.start_span(
            "llm_request",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            _attributes(tracker, request_id, model),
            start_time=since_1970(tracker.arrival),
        )
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        if span.is_recording():
            within = set_span_in_context(span)
            for name, begin, end in _phases(tracker, ended):
                child: Span = self._tracer.start_span(name, within, start_time=since_1970(begin))
                child.end(since_1970(end))
        span.end(since_1970(ended))

    def shutdown(self, timeout: float = 5.0) -> None:
        """Send what is still queued, for at most ``timeout`` seconds; idempotent. Blocks."""
        ending = threading.Thread(target=self._provider.shutdown, name="otlp shutdown", daemon=True)
        ending.start()
        ending.join(timeout)
        if ending.is_alive():
            logger.warning("some traces could not be sent to %s within %g s and are lost", self.endpoint, timeout)


def checked_endpoint(endpoint: str) -> str:
    """The URL that spans are posted to; raises ConfigError if ``endpoint`` is none."""
    try:
        url = urlsplit(endpoint)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r} is no URL; give one of http or https, like http://localhost:4318"
        )
    return endpoint if url.path not in ("", "/") else url._replace(path="/v1/traces").geturl()


def _attributes(tracker: RequestTracker, request_id: str, model: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "gen_ai.provider.name": "lightvllm",
        "gen_ai.request.id": request_id,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.usage.prompt_tokens": tracker.prompt_tokens,
        "gen_ai.usage.completion_tokens": tracker.generated_tokens,
        "gen_ai.usage.input_tokens": tracker.prompt_tokens,
        "gen_ai.usage.output_tokens": tracker.generated_tokens,
        "gen_ai.usage.cached_tokens": tracker.cached_tokens,
        "gen_ai.latency.time_to_first_token": tracker.first_token_seconds,
    }
    if tracker.ending is not None:
        said["gen_ai.response.finish_reasons"] = [tracker.ending]
    if (params := tracker.params) is not None:
        said |= {
            "gen_ai.request.n": params.n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.num_sequences": params.n,
        }
    if tracker.ended_at is not None:
        said["gen_ai.latency.e2e"] = tracker.ended_at - tracker.arrival
    if (times := tracker.times) is not None and times.first_scheduled_time is not None:
        scheduled, first, last = times.first_scheduled_time, times.first_token_time, times.last_token_time
        said["gen_ai.latency.time_in_queue"] = max(0.0, scheduled - times.arrival_time)
        said["lightvllm.num_preemptions"] = times.num_preemptions
        if first is not None and last is not None:
            said["gen_ai.latency.time_in_model_prefill"] = first - scheduled
            said["gen_ai.latency.time_in_model_decode"] = last - first
            said["gen_ai.latency.time_in_model_inference"] = last - scheduled
    return {key: value for key, value in said.items() if value is not None}


def _phases(tracker: RequestTracker, ended: float) -> list[tuple[str, float, float]]:
    """Name, begin and end of what the request went through, one after the other; the last may not have come far."""
    times = tracker.times
    marks = [("queue", tracker.arrival)]
    if times is not None and times.first_scheduled_time is not None:
        marks.append(("prefill", times.first_scheduled_time))
        if times.first_token_time is not None:
            marks.append(("decode", times.first_token_time))
    ends = [begin for _, begin in marks[1:]]
    last = times.last_token_time if times is not None and len(marks) == 3 and times.last_token_time else ended
    return [(name, begin, max(begin, end)) for (name, begin), end in zip(marks, [*ends, last], strict=True)]


def _warning_once(exporter: SpanExporter, endpoint: str) -> SpanExporter:
    """``exporter``, saying once that it fails, and once that it works again."""
    from opentelemetry.sdk.trace import export

    class WarningOnce(export.SpanExporter):
        def __init__(self) -> None:
            self._failing = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = exporter.export(spans)
            failing = result is not export.SpanExportResult.SUCCESS
            if failing and not self._failing:
                logger.warning("traces cannot be sent to %s and are dropped until they can", endpoint)
            elif self._failing and not failing:
                logger.warning("traces can be sent to %s again", endpoint)
            self._failing = failing
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return WarningOnce()

"""Traces as a collector gets them: one span a request, its phases within, and never at the requests' expense."""

from __future__ import annotations

import asyncio
import builtins
import logging
import time
from typing import Any

import pytest
from otlp_collector import Collector, attributes, collecting
from scripted_client import ScriptedClient
from starlette.testclient import TestClient
from waiting import wait_until

from lightvllm.engine.outputs import RequestMetrics
from lightvllm.errors import ConfigError, MissingExtra, WorkerDied
from lightvllm.sampling_params import SamplingParams
from lightvllm.server.app import create_app
from lightvllm.server.metrics import Metrics
from lightvllm.server.observed import ObservedEngine
from lightvllm.server.settings import ServerSettings
from lightvllm.server.tracing import Tracer, checked_endpoint
from lightvllm.server.tracker import RequestHistograms, RequestTracker
from lightvllm.version import __version__

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def run(engine: ObservedEngine, **options: Any) -> None:
    async def request() -> None:
        async for _ in engine.generate([1, 2, 3], **options):
            pass

    asyncio.run(request())


def by_name(collector: Collector) -> dict[str, Any]:
    named = {span.name: span for span in collector.spans}
    assert len(named) == len(collector.spans)
    return named


def test_a_span_for_each_request_and_its_phases_within() -> None:
    with collecting() as collector:
        tracer = Tracer(collector.url)
        engine = ObservedEngine(ScriptedClient(), Metrics("served-name"), tracer)
        params = SamplingParams(temperature=0.5, top_p=0.75, max_tokens=9)
        run(engine, sampling_params=params, request_id="cmpl-1", output_kind="delta")
        tracer.shutdown()
        spans = by_name(collector)
        assert collector.paths == ["/v1/traces"]
        assert collector.resources[0]["service.name"] == "lightvllm"
        assert collector.resources[0]["service.version"] == __version__
        assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
        whole = spans["llm_request"]
        told = attributes(whole)
        times = {key: told.pop(key) for key in list(told) if key.startswith("gen_ai.latency.")}
        assert told == {
            "gen_ai.provider.name": "lightvllm",
            "gen_ai.request.id": "cmpl-1",
            "gen_ai.request.model": "served-name",
            "gen_ai.response.model": "served-name",
            "gen_ai.response.finish_reasons": ["length"],
            "gen_ai.request.n": 1,
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.75,
            "gen_ai.usage.prompt_tokens": 3,
            "gen_ai.usage.completion_tokens": 4,
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 4,
            "gen_ai.usage.cached_tokens": 0,
            "gen_ai.usage.num_sequences": 1,
            "lightvllm.num_preemptions": 0,
        }
        assert times["gen_ai.latency.time_in_queue"] == pytest.approx(0.5)
        assert times["gen_ai.latency.time_in_model_prefill"] == pytest.approx(0.25)
        assert times["gen_ai.latency.time_in_model_decode"] == pytest.approx(3 * 0.0625)
        assert times["gen_ai.latency.time_in_model_inference"] == pytest.approx(0.25 + 3 * 0.0625)
        assert {"gen_ai.latency.e2e", "gen_ai.latency.time_to_first_token"} <= set(times)
        assert not whole.parent_span_id
        for name in ("queue", "prefill", "decode"):
            assert (spans[name].parent_span_id, spans[name].trace_id) == (whole.span_id, whole.trace_id)


def test_the_service_may_have_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm-eu")
    with collecting() as collector:
        tracer = Tracer(collector.url)
        run(ObservedEngine(ScriptedClient(), Metrics(), tracer))
        tracer.shutdown()
        assert collector.resources[0]["service.name"] == "llm-eu"


def test_spans_lie_where_the_time_went() -> None:
    with collecting() as collector:
        tracer = Tracer(collector.url)
        tracker = RequestTracker(RequestHistograms(100), SamplingParams())
        begin = tracker.arrival
        tracker.times = RequestMetrics(begin, begin + 1, begin + 3, begin + 6, begin + 6)
        tracker.ending, tracker.ended_at = "stop", begin + 7
        tracer.request(tracker, "r", "m", None)
        tracer.shutdown()
        spans = by_name(collector)
        start = spans["llm_request"].start_time_unix_nano
        assert abs(start / 1e9 - (time.time() - (time.monotonic() - begin))) < 0.1
        lie = {
            name: ((span.start_time_unix_nano - start) / 1e9, (span.end_time_unix_nano - start) / 1e9)
            for name, span in spans.items()
        }
        expected = {"llm_request": (0, 7), "queue": (0, 1), "prefill": (1, 3), "decode": (3, 6)}
        assert lie == {name: pytest.approx(between, abs=1e-5) for name, between in expected.items()}


def test_the_clients_trace_is_continued_over_http() -> None:
    with collecting() as collector:
        app = create_app(ScriptedClient(), ServerSettings(otlp_traces_endpoint=f"{collector.url}/custom/path"))

        @app.get("/generate")
        async def generate() -> None:
            async for _ in app.state.engine.generate([1], request_id="r"):
                pass

        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
        client = TestClient(app)
        assert client.get("/generate", headers=headers).status_code == 200
        assert client.get("/generate", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}).status_code == 200
        assert client.get("/generate", headers={"traceparent": "rubbish"}).status_code == 200
        app.state.tracer.shutdown()
        assert set(collector.paths) == {"/custom/path"}
        whole = [span for span in collector.spans if span.name == "llm_request"]
        assert len(whole) == 2, "the client did not want the second one traced"
        assert (whole[0].trace_id.hex(), whole[0].parent_span_id.hex()) == (TRACE, PARENT)
        assert whole[0].trace_state == "vendor=1"
        assert whole[1].trace_id.hex() != TRACE


@pytest.mark.parametrize(("error_after", "phases"), [(0, {"queue"}), (1, {"queue", "prefill", "decode"})])
def test_a_request_that_fails(error_after: int, phases: set[str]) -> None:
    client = ScriptedClient()
    client.error, client.error_after = WorkerDied("w-1", "killed by SIGKILL", 1), error_after
    with collecting() as collector:
        tracer = Tracer(collector.url)
        with pytest.raises(WorkerDied):
            run(ObservedEngine(client, Metrics(), tracer))
        client.error = ConfigError("never was a request")
        client.error_after = 0
        with pytest.raises(ConfigError):
            run(ObservedEngine(client, Metrics(), tracer))
        tracer.shutdown()
        spans = by_name(collector)
        assert set(spans) == {"llm_request", *phases}
        status = spans["llm_request"].status
        assert (status.code, status.message) == (2, "worker w-1 (rank 1) died: killed by SIGKILL")
        assert attributes(spans["llm_request"])["gen_ai.response.finish_reasons"] == ["error"]


def test_a_collector_that_is_down_is_one_warning_and_costs_requests_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    caplog.set_level(logging.DEBUG)
    with collecting() as collector:
        port = collector.port
    tracer = Tracer(f"http://127.0.0.1:{port}", export_timeout=0.2)
    engine = ObservedEngine(ScriptedClient(), Metrics(), tracer)

    def told() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]

    run(engine)
    wait_until(told, "the warning")
    before = time.monotonic()
    for _ in range(20):
        run(engine)
    assert time.monotonic() - before < 5
    again = Collector(port)
    try:
        wait_until(lambda: run(engine) or again.spans, "spans come when the collector is there")
        wait_until(lambda: len(told()) == 2, "that is said")
    finally:
        again.close()
    tracer.shutdown(timeout=2)
    url = f"http://127.0.0.1:{port}/v1/traces"
    assert told()[:2] == [
        f"traces cannot be sent to {url} and are dropped until they can",
        f"traces can be sent to {url} again",
    ]


def test_shutdown_does_not_wait_for_a_collector_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    with collecting() as collector:
        collector.gate.clear()
        tracer = Tracer(collector.url, export_timeout=5)
        run(ObservedEngine(ScriptedClient(), Metrics(), tracer))
        before = time.monotonic()
        tracer.shutdown(timeout=0.2)
        assert time.monotonic() - before < 3
        assert "could not be sent" in caplog.text
        collector.gate.set()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        ("http://[::1]:4318/own/path", "http://[::1]:4318/own/path"),
    ],
)
def test_endpoints(given: str, taken: str) -> None:
    assert checked_endpoint(given) == taken


@pytest.mark.parametrize("given", ["", "localhost:4318", "grpc://x:4317", "http://", "http://x:99999", "http://[::1"])
def test_what_is_no_endpoint(given: str) -> None:
    with pytest.raises(ConfigError, match="is no URL; give one of http or https"):
        Tracer(given)


def test_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'lightvllm\[otel\]'"):
        Tracer("http://localhost:4318")

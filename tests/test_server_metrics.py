"""What Prometheus reads of a server is what its engine and its requests did, to the last count."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser
from scripted_client import ScriptedClient
from starlette.testclient import TestClient

from lightvllm.sampling_params import SamplingParams
from lightvllm.server import metrics as server_metrics
from lightvllm.server.metrics import Metrics
from lightvllm.server.observed import ObservedEngine


def scrape(metrics: Metrics, accept: str = "") -> dict[str, Any]:
    """All samples by name and labels, as Prometheus' own parser reads them."""
    app = FastAPI()
    app.state.metrics = metrics
    app.include_router(server_metrics.router)
    answer = TestClient(app).get("/metrics", headers={"accept": accept} if accept else {})
    assert answer.status_code == 200
    assert ("openmetrics" in answer.headers["content-type"]) == ("openmetrics" in accept)
    read = openmetrics_parser if accept else parser
    samples: dict[str, Any] = {}
    for family in read.text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            if "engine" in sample.labels:
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
            key = sample.name + ("" if not labels else str(sorted(labels.items())))
            assert key not in samples, "each series once"
            samples[key] = sample.value
    return samples


async def run(engine: ObservedEngine, prompt_tokens: int = 10, **options: Any) -> None:
    async for _ in engine.generate(list(range(prompt_tokens)), **options):
        pass


def run_all(engine: ObservedEngine, requests: Iterable[dict[str, Any]]) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(*(run(engine, **request) for request in requests))

    asyncio.run(all_of_them())


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final"])
@pytest.mark.parametrize("merged", [1, 2, 3, 20])
def test_a_request_is_counted_alike_however_its_outputs_come(kind: str, merged: int) -> None:
    client, metrics = ScriptedClient(), Metrics()
    client.tokens, client.merged, client.cached, client.preemptions = 8, merged, 4, 1
    before = time.monotonic()
    run_all(ObservedEngine(client, metrics), [{"output_kind": kind, "sampling_params": SamplingParams(n=2)}] * 3)
    got = scrape(metrics)
    assert got["vllm:request_success_total[('finished_reason', 'length')]"] == 3
    assert got["vllm:request_success_total[('finished_reason', 'abort')]"] == 0
    for name, count, total in [
        ("vllm:inter_token_latency_seconds", 3 * 7, 3 * 7 * 0.0625),
        ("vllm:request_time_per_output_token_seconds", 3, 3 * 0.0625),
        ("vllm:request_queue_time_seconds", 3, 3 * 0.5),
        ("vllm:request_prefill_time_seconds", 3, 3 * 0.25),
        ("vllm:request_decode_time_seconds", 3, 3 * 7 * 0.0625),
        ("vllm:request_inference_time_seconds", 3, 3 * (0.25 + 7 * 0.0625)),
        ("vllm:request_prompt_tokens", 3, 3 * 10),
        ("vllm:request_prefill_kv_computed_tokens", 3, 3 * 6),
        ("vllm:request_generation_tokens", 3, 3 * 2 * 8),
        ("vllm:request_max_num_generation_tokens", 3, 3 * 8),
        ("vllm:request_params_max_tokens", 3, 3 * 16),
        ("vllm:request_params_n", 3, 3 * 2),
        ("vllm:request_num_preemptions", 3, 3),
    ]:
        assert got[name + "_count"] == count, name
        assert got[name + "_sum"] == pytest.approx(total), name
        assert got[f"{name}_bucket[('le', '+Inf')]"] == count, name
    assert got["vllm:inter_token_latency_seconds_bucket[('le', '0.075')]"] == 21
    assert got["vllm:inter_token_latency_seconds_bucket[('le', '0.05')]"] == 0
    assert got["vllm:time_to_first_token_seconds_count"] == 3
    assert got["vllm:e2e_request_latency_seconds_count"] == 3
    assert 0 < got["vllm:e2e_request_latency_seconds_sum"] <= 3 * (time.monotonic() - before)


def test_refused_requests_are_counted_by_why() -> None:
    metrics = Metrics("tiny")
    metrics.requests.rejections = 3
    assert scrape(metrics)["vllm:admission_rejections_total[('reason', 'max_num_queued_reqs')]"] == 3


def test_the_engines_counters_are_read_at_the_scrape() -> None:
    client, metrics = ScriptedClient(tp=2, pp=2), Metrics()
    ObservedEngine(client, metrics)
    client.set(
        num_running=3, num_waiting=5, kv_cache_usage=0.25, total_prefix_cache_queries=100, total_prefix_cache_hits=40,
        total_preemptions=7, total_prompt_tokens=60, total_generation_tokens=9, total_steps=4, total_step_seconds=2.0,
        total_model_seconds=1.5, total_executor_seconds=0.125,
    )  # fmt: skip
    got = scrape(metrics)
    expected = {
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 5, "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prefix_cache_queries_total": 100, "vllm:prefix_cache_hits_total": 40, "vllm:num_preemptions_total": 7,
        "vllm:prompt_tokens_total": 100, "vllm:prompt_tokens_cached_total": 40,
        "vllm:prompt_tokens_by_source_total[('source', 'local_compute')]": 60,
        "vllm:prompt_tokens_by_source_total[('source', 'local_cache_hit')]": 40,
        "vllm:generation_tokens_total": 9, "vllm:iteration_tokens_total_count": 4,
        "vllm:iteration_tokens_total_sum": 69, "lightvllm:step_seconds_count": 4, "lightvllm:step_seconds_sum": 2.0,
        "lightvllm:model_seconds_sum": 1.5, "lightvllm:step_overhead_seconds_sum": 0.5,
        "lightvllm:executor_overhead_seconds_count": 4, "lightvllm:executor_overhead_seconds_sum": 0.125,
        "lightvllm:restarts_total": 0, "lightvllm:recovery_seconds_total": 0, "lightvllm:start_seconds": 1.5,
        "lightvllm:engine_state[('state', 'ready')]": 1, "lightvllm:engine_state[('state', 'failed')]": 0,
        "lightvllm:rank_up[('node', 'node-1'), ('rank', '3'), ('worker', 'worker-3')]": 1,
        "lightvllm:rank_parameter_bytes[('rank', '0')]": 3 << 28,
        "vllm:cache_config_info[('block_size', '16'), ('enable_prefix_caching', 'True'), ('num_gpu_blocks', '100')]": 1,
    }  # fmt: skip
    assert {name: got.get(name) for name in expected} == expected
    assert sum(name.startswith("lightvllm:rank_up") for name in got) == 4


def test_steps_are_counted_once_each_however_news_of_them_comes() -> None:
    client, metrics = ScriptedClient(), Metrics()
    ObservedEngine(client, metrics)
    client.set(total_steps=1, total_prompt_tokens=100)
    client.set(total_steps=1, num_running=2)  # no step
    client.set(total_steps=3, total_prompt_tokens=100, total_generation_tokens=4)  # two at once
    got = scrape(metrics)
    assert got["vllm:iteration_tokens_total_count"] == 3
    assert got["vllm:iteration_tokens_total_sum"] == 104
    assert got["vllm:iteration_tokens_total_bucket[('le', '8.0')]"] == 2
    assert got["vllm:iteration_tokens_total_bucket[('le', '128.0')]"] == 3


def test_a_dead_worker_shows(caplog: pytest.LogCaptureFixture) -> None:
    client, metrics = ScriptedClient(tp=2), Metrics()
    engine = ObservedEngine(client, metrics)
    client.set(num_running=3, num_waiting=2, kv_cache_usage=0.5, total_generation_tokens=9)
    client.kill(1)
    assert (engine.stats.num_running, engine.stats.total_generation_tokens) == (0, 9)
    got = scrape(metrics)
    assert (got["vllm:num_requests_running"], got["vllm:num_requests_waiting"], got["vllm:kv_cache_usage_perc"]) == (
        0,
        0,
        0,
    )
    assert got["vllm:generation_tokens_total"] == 9, "what has been done has been done"
    assert got["lightvllm:engine_state[('state', 'failed')]"] == 1
    assert got["lightvllm:rank_up[('node', 'node-1'), ('rank', '1'), ('worker', 'worker-1')]"] == 0
    assert [error.message for error in metrics.errors] == ["worker worker-1 (rank 1) died: killed by SIGKILL"]
    (record,) = caplog.records
    assert record.getMessage() == "the engine has failed: worker worker-1 (rank 1) died: killed by SIGKILL"
    assert (vars(record)["rank"], vars(record)["worker"], vars(record)["node"]) == (1, "worker-1", "node-1")
    client.set(state="ready")
    assert "the engine is ready again after" in caplog.text
    got = scrape(metrics)
    assert got["lightvllm:restarts_total"] == 1
    assert got["lightvllm:recovery_seconds_total"] >= 0


def test_before_there_is_an_engine_there_are_no_figures_of_it() -> None:
    got = scrape(Metrics("tiny"))
    assert got["lightvllm:engine_state[('state', 'starting')]"] == 1
    assert "vllm:num_requests_running" not in got
    assert got["vllm:e2e_request_latency_seconds_count"] == 0


def test_http_requests_are_counted_by_route_method_and_status() -> None:
    metrics = Metrics("tiny")
    metrics.answered("POST", "/v1/completions", 200, 0.02)
    metrics.answered("POST", "/v1/completions", 200, 0.2)
    metrics.answered("POST", "/v1/completions", 429, 0.001)
    got = scrape(metrics)
    key = "[('handler', '/v1/completions'), ('method', 'POST'), ('status', '{}')]"
    assert got["http_requests_total" + key.format(200)] == 2
    assert got["http_requests_total" + key.format(429)] == 1
    assert got[
        "http_request_duration_seconds_sum[('handler', '/v1/completions'), ('method', 'POST')]"
    ] == pytest.approx(0.221)


def test_several_servers_in_one_process_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    client = ScriptedClient()
    run_all(ObservedEngine(client, first), [{}])
    ObservedEngine(client, second)
    assert scrape(first)["vllm:e2e_request_latency_seconds_count"] == 1
    assert scrape(second)["vllm:e2e_request_latency_seconds_count"] == 0


def test_openmetrics_for_those_who_ask_for_it() -> None:
    client, metrics = ScriptedClient(), Metrics()
    run_all(ObservedEngine(client, metrics), [{}])
    got = scrape(metrics, accept="application/openmetrics-text; version=1.0.0")
    assert got["vllm:request_success_total[('finished_reason', 'length')]"] == 1


def test_another_engine_takes_the_place_of_the_first() -> None:
    first, second, metrics = ScriptedClient(), ScriptedClient(), Metrics()
    ObservedEngine(first, metrics)
    ObservedEngine(second, metrics)
    assert not first.listeners
    second.set(num_running=2)
    assert scrape(metrics)["vllm:num_requests_running"] == 2
    metrics.detach()
    assert not second.listeners


def test_every_metric_is_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "observability.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+:?\w+)` \| (\w+) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    client, metrics = ScriptedClient(), Metrics()
    ObservedEngine(client, metrics)
    metrics.answered("GET", "/", 200, 0.1)
    told = []
    for family in metrics.collect():
        labels = {label: None for sample in family.samples for label in sample.labels}
        further = ", ".join(f"`{label}`" for label in labels if label not in ("model_name", "engine", "le"))
        name = family.name + "_total" * (family.type == "counter")
        told.append((name, family.type, further, family.documentation))
    assert documented == told

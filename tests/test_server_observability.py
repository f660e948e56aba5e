"""One real server, two workers behind the Kubernetes backend: what it tells is what it did, until a worker is killed.

The tests stand in the order of the server's life; the last one ends it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
import tiny_llama
from browser import CHROMIUM, Watched, chromium
from otlp_collector import Collector, attributes, collecting
from playwright.sync_api import expect
from prometheus_client import parser
from server_process import ServerProcess, started
from waiting import wait_until

pytestmark = pytest.mark.slow

TRACE = "0af7651916cd43dd8448eb211c80319c"
PROMPTS = [[5, 6, 7], [8] * 40, [8] * 40, [9, 10]]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[ServerProcess]:
    model = tiny_llama.build(tmp_path_factory.mktemp("tiny"))
    command = [sys.executable, "-c", "from lightvllm.cli.main import run; run()", "serve", str(model), "--port", "0"]
    options = ["--executor", "k8s", "-pp", "2", "--served-model-name", "tiny", "--log-format", "json"]
    traces = ["--otlp-traces-endpoint", collector.url]
    env = os.environ | {"LIGHTVLLM_API_KEY": "", "OMP_NUM_THREADS": "1", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with started([*command, *options, *traces], env) as server:
        server.ready()
        yield server


def scrape(server: ServerProcess) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics").text
    return {
        " ".join(
            [sample.name, *(v for k, v in sample.labels.items() if k not in ("model_name", "engine"))]
        ): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def status(server: ServerProcess) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{server.url}/status.json").json()
    return answer


def complete(server: ServerProcess, prompt: list[int], number: int, **options: Any) -> dict[str, Any]:
    """The usage, by an answer in one piece or by a stream."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 5 + number, "ignore_eos": True, "temperature": 0} | options
    headers = {"X-Request-Id": f"request-{number}", "traceparent": f"00-{TRACE}-b7ad6b716920333{number}-01"}
    url = f"{server.url}/v1/completions"
    if number % 2:
        answer = httpx.post(url, json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["usage"])
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        chunks = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert chunks.pop() == "[DONE]"
    streamed: dict[str, Any] = json.loads(chunks[-1])
    return dict(streamed["usage"])


@pytest.fixture(scope="module")
def usages(server: ServerProcess) -> list[dict[str, Any]]:
    """Of known requests, one after the other."""
    return [complete(server, prompt, number) for number, prompt in enumerate(PROMPTS)]


def test_the_scrape_agrees_with_what_the_answers_said(server: ServerProcess, usages: list[dict[str, Any]]) -> None:
    prompts = [usage["prompt_tokens"] for usage in usages]
    tokens = [usage["completion_tokens"] for usage in usages]
    assert prompts == [len(prompt) for prompt in PROMPTS]
    assert tokens == [5, 6, 7, 8]
    got = wait_until(lambda: (s := scrape(server))["vllm:generation_tokens_total"] >= sum(tokens) and s, "all is told")
    cached = 32  # of the second of the equal prompts: its full blocks of 16
    expected = {
        "vllm:request_success_total length": 4, "vllm:request_success_total stop": 0,
        "vllm:request_success_total abort": 0, "vllm:request_success_total error": 0,
        "vllm:prompt_tokens_total": sum(prompts), "vllm:prompt_tokens_cached_total": cached,
        "vllm:prompt_tokens_by_source_total local_compute": sum(prompts) - cached,
        "vllm:prefix_cache_queries_total": sum(prompts), "vllm:prefix_cache_hits_total": cached,
        "vllm:generation_tokens_total": sum(tokens), "vllm:num_preemptions_total": 0,
        "vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, "vllm:kv_cache_usage_perc": 0,
        "vllm:request_prompt_tokens_count": 4, "vllm:request_prompt_tokens_sum": sum(prompts),
        "vllm:request_prefill_kv_computed_tokens_sum": sum(prompts) - cached,
        "vllm:request_generation_tokens_count": 4, "vllm:request_generation_tokens_sum": sum(tokens),
        "vllm:request_params_max_tokens_sum": 5 + 6 + 7 + 8, "vllm:request_params_n_sum": 4,
        "vllm:time_to_first_token_seconds_count": 4, "vllm:e2e_request_latency_seconds_count": 4,
        "vllm:request_queue_time_seconds_count": 4, "vllm:inter_token_latency_seconds_count": sum(tokens) - 4,
        "vllm:request_time_per_output_token_seconds_count": 4,
        "vllm:iteration_tokens_total_sum": sum(prompts) - cached + sum(tokens),
        "lightvllm:engine_state ready": 1, "lightvllm:restarts_total": 0,
        "http_requests_total /v1/completions POST 200": 4,
    }  # fmt: skip
    assert {name: got.get(name) for name in expected} == expected
    assert got["lightvllm:step_seconds_count"] == got["vllm:iteration_tokens_total_count"] >= 5
    assert 0 < got["lightvllm:model_seconds_sum"] <= got["lightvllm:step_seconds_sum"]
    assert got["lightvllm:executor_overhead_seconds_sum"] > 0
    ttft, e2e = (got[f"vllm:{name}_sum"] for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"))
    assert 0 < ttft < e2e < got["http_request_duration_seconds_sum /v1/completions POST"]
    up = {name: value for name, value in got.items() if name.startswith("lightvllm:rank_up")}
    assert list(up.values()) == [1, 1]


def test_a_client_that_leaves_is_counted(server: ServerProcess, usages: list[dict[str, Any]]) -> None:
    before = scrape(server)
    body = {"model": "tiny", "prompt": [5], "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)

    def after(name: str) -> float:
        return scrape(server).get(name, 0) - before.get(name, 0)

    wait_until(lambda: after("vllm:request_success_total abort") == 1, "the abort is counted")
    wait_until(lambda: after("http_requests_total /v1/completions POST 499") == 1, "and the answer that was not read")
    assert after("vllm:e2e_request_latency_seconds_count") == 0
    wait_until(lambda: scrape(server)["vllm:num_requests_running"] == 0, "it does not run on")


def test_every_line_of_the_log_is_json(server: ServerProcess, usages: list[dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in server.err if line.startswith("{")]
    answered = {line["request_id"]: line for line in lines if line["logger"] == "lightvllm.access"}
    for number, usage in enumerate(usages):
        line = answered[f"request-{number}"]
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
        assert (line["model"], line["prompt_tokens"], line["generated_tokens"]) == (
            "tiny",
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )
        assert 0 < line["first_token_seconds"] < line["seconds"]


def test_the_collector_has_a_span_for_each_request(
    server: ServerProcess, collector: Collector, usages: list[dict[str, Any]]
) -> None:
    def whole() -> list[Any]:
        spans = [span for span in collector.spans if span.name == "llm_request" and span.trace_id.hex() == TRACE]
        return spans if len(spans) >= len(usages) else []

    spans = wait_until(whole, "the spans come")
    told = sorted(
        (attributes(span)["gen_ai.usage.prompt_tokens"], attributes(span)["gen_ai.usage.completion_tokens"])
        for span in spans
    )
    assert told == sorted((usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages)
    parents = {span.parent_span_id.hex() for span in spans}
    assert parents == {f"b7ad6b716920333{number}" for number in range(4)}
    children = [span for span in collector.spans if span.parent_span_id in {each.span_id for each in spans}]
    assert sorted(span.name for span in children) == ["decode"] * 4 + ["prefill"] * 4 + ["queue"] * 4


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_shows_live_ranks_and_the_one_that_is_killed(server: ServerProcess) -> None:
    with chromium() as browser:
        page = browser.new_page()
        expect.set_options(timeout=30_000)
        watched = Watched(page)
        page.goto(server.url)
        expect(page.locator("h1")).to_have_text("tiny")
        expect(page.locator(".rank")).to_have_count(2)
        for rank in status(server)["ranks"]:
            box = page.locator(f'.rank[data-rank="{rank["rank"]}"]')
            expect(box).to_have_attribute("data-health", "ready")
            expect(box).to_contain_text(f"pid {rank['pid']}")
        complete(server, [3, 4], 1, max_tokens=100)
        expect(page.locator(".chart path.first").first).to_have_count(1)
        assert not watched.wrong
        os.kill(status(server)["ranks"][1]["pid"], signal.SIGKILL)
        expect(page.locator('.rank[data-rank="1"]')).to_have_attribute("data-health", "dead")
        expect(page.locator('.rank[data-rank="1"]')).to_contain_text("SIGKILL")
        expect(page.locator("#banner")).to_contain_text("rank 1")
        expect(page.locator("#phase")).to_have_text("failed")
        assert not watched.wrong


def test_a_killed_worker_is_told_everywhere(server: ServerProcess) -> None:
    if status(server)["phase"] == "ready":  # there was no browser to look at it
        os.kill(status(server)["ranks"][1]["pid"], signal.SIGKILL)
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503, "it is not ready")
    told = status(server)
    assert (told["phase"], told["ranks"][1]["health"]) == ("failed", "dead")
    assert "SIGKILL" in told["reason"]
    assert any("SIGKILL" in error["message"] for error in told["errors"])
    got = scrape(server)
    assert got["lightvllm:engine_state failed"] == 1
    (up,) = (
        value for name, value in got.items() if name.startswith("lightvllm:rank_up") and name.endswith(" 1 local-1")
    )
    assert up == 0
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": [5]})
    assert refused.status_code == 503
    server.signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM

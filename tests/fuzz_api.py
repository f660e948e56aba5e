"""Requests that schemathesis makes from a server's own description, and what must hold of every answer.

Half of them follow the description, half break it. Few of those come far, so most name the right model, and many are a
plain good request with a few of those fields, or with options that are rare or hostile. Held of each: it comes in time,
it is no 5xx, it is described (status, content type, headers, shape), a refusal has OpenAI's shape, and a stream ends as
one should. Held afterwards: ``Leaks``. Everything is made from a seed. For ``test_server_fuzz.py`` and
``benchmarks/fuzz_api.py``.
"""

from __future__ import annotations

import collections
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import hypothesis
import psutil
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from waiting import wait_until

from lightvllm.server.errors import ErrorResponse

CASE_TIMEOUT = 30.0  # seconds; what takes longer hangs
CHECKS = [status_code_conformance, content_type_conformance, response_headers_conformance]

GOOD: dict[str, dict[str, Any]] = {
    "POST /v1/completions": {"prompt": "Paris is", "max_tokens": 8},
    "POST /v1/chat/completions": {"messages": [{"role": "user", "content": "Paris?"}], "max_tokens": 8},
    "POST /v1/embeddings": {"input": "Paris"},
    "POST /tokenize": {"prompt": "Paris"},
    "POST /detokenize": {"tokens": [5, 6]},
}

_DEEP: Any = "x"
for _ in range(200):
    _DEEP = [_DEEP]

HOSTILE: list[dict[str, Any]] = [
    {"n": 10**6},
    {"n": 128, "temperature": 1.0},
    {"best_of": 100},
    {"max_tokens": 10**12},
    {"max_completion_tokens": -1},
    {"logprobs": 5, "echo": True},
    {"logprobs": True, "top_logprobs": 20},
    {"prompt_logprobs": 20},
    {"logit_bias": {"0": 100, "1": -100}},
    {"logit_bias": {"99999999": 1}},
    {"logit_bias": {"x": 1}},
    {"stop": ["a"] * 1000},
    {"stop": "\x00"},
    {"stop_token_ids": [2**63]},
    {"bad_words": ["the", ""]},
    {"allowed_token_ids": []},
    {"allowed_token_ids": [5], "ignore_eos": True},
    {"seed": -(2**63)},
    {"seed": 2**64},
    {"temperature": 1e-300},
    {"top_k": 2**62},
    {"min_tokens": 10**9},
    {"priority": -(2**40)},
    {"timeout": 1e-9},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream": True, "n": 3, "temperature": 2.0},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
    {"guided_regex": "(" * 500},
    {"guided_regex": "(a{1,1000}){1,1000}"},
    {"structured_outputs": {"regex": "(a{1,1000}){1,1000}"}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"grammar": "start: start"}},
    {"structured_outputs": {"grammar": "%%%"}},
    {"structured_outputs": {"json": {"$ref": "#"}}},
    {"structured_outputs": {"json": "{}", "regex": "a"}},
    {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
        "tool_choice": "required",
    },
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto", "stream": True},
    {"tool_choice": {"type": "function", "function": {"name": "none"}}},
    {"chat_template": "{% for x in range(10**9) %}x{% endfor %}"},
    {"chat_template_kwargs": {"tools": _DEEP}},
    {"messages": [{"role": "user", "content": "x" * 100_000}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}]},
    {"messages": [{"role": "tool", "content": "x", "tool_call_id": "none"}]},
    {"messages": _DEEP},
    {"allowed_token_ids": [1], "guided_regex": "0"},
    {"prompt": [[1, 2], [3]]},
    {"prompt": ["x"] * 3, "n": 2},
    {"prompt": [2**31]},
    {"prompt": [-1]},
    {"prompt": ""},
    {"prompt": []},
    {"prompt": "\ud800"},
    {"prompt": "x" * 1_000_000},
    {"user": "\u0000"},
    {"no_such_option": True},
]


@dataclass
class Found:
    """What has been asked and what was wrong; safe to fill from several threads."""

    cases: int = 0
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: dict[str, str] = field(default_factory=dict)  # by kind: the first such request and its answer
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, operation: str, status: int | str, failure: tuple[str, str] | None) -> None:
        with self.lock:
            self.cases += 1
            self.statuses[f"{status}"] += 1
            if failure is not None:
                self.failures.setdefault(f"{operation}: {failure[0]}", failure[1])


class Leaks:
    """What a server holds when nothing runs; taken before and compared after.

    Args:
        url: of the server.
        pid: its process.
        headers: what its API wants.
    """

    def __init__(self, url: str, pid: int, headers: dict[str, str] | None = None) -> None:
        self._url, self._pid, self._headers = url, pid, headers or {}
        self.free_blocks = self._idle()["free_blocks"]

    def rss(self) -> list[int]:
        """Bytes of the server's process and of each of its children."""
        process = psutil.Process(self._pid)
        return [each.memory_info().rss for each in [process, *process.children(recursive=True)]]

    def _load(self) -> dict[str, Any]:
        load: dict[str, Any] = httpx.get(f"{self._url}/load", headers=self._headers).json()
        return load | {"free_blocks": 1.0 - load["kv_cache_usage"]}

    def _idle(self) -> dict[str, Any]:
        load: dict[str, Any] = {}

        def idle() -> bool:
            load.update(self._load())
            return not (load["server_load"] or load["num_running"] or load["num_waiting"])

        wait_until(idle, "no request is left", limit=30)
        return load

    def check(self) -> None:
        """Raises unless nothing is held that was not held before, and the server is ready."""
        assert self._idle()["free_blocks"] == self.free_blocks, "blocks of the KV cache are held by nobody"
        assert httpx.get(f"{self._url}/health?deep=true", timeout=30).status_code == 200


def fuzz(url: str, cases: int, seed: int, model: str, headers: dict[str, str] | None = None, threads: int = 2) -> Found:
    """Ask about ``cases`` times; each operation gets a share by how much it takes in."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.output.sanitization.update(enabled=False)  # it takes tokens for secrets
    operations = [result.ok() for result in schema.get_all_operations()]
    weights = {operation.label: 20 if operation.body else 1 for operation in operations}
    total = sum(weights.values()) * 2
    found = Found()
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(
                _fuzz_operation,
                operation,
                mode,
                max(2, round(cases * weights[operation.label] / total)),
                f"{seed}-{operation.label}-{mode.name}",
                model,
                headers or {},
                found,
            )
            for operation in operations
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        ]
        for job in jobs:
            job.result()
    return found


def _fuzz_operation(
    operation: Any, mode: GenerationMode, examples: int, seed: str, model: str, headers: dict[str, str], found: Found
) -> None:
    dice = random.Random(seed)
    session = requests.Session()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and dice.random() < 0.9:
            good = GOOD.get(operation.label)
            if good is not None and dice.random() < 0.6:
                few = dice.sample(sorted(case.body), min(len(case.body), dice.choice([0, 0, 1, 2])))
                case.body = good | {name: case.body[name] for name in few}
            case.body["model"] = model
            if dice.random() < 0.4:
                case.body.update(dice.choice(HOSTILE))
        # schemathesis makes up keys of its own; few of the requests should end there.
        found.add(operation.label, *_ask(case, session, headers if dice.random() < 0.95 else {}))

    try:
        run()
    except (hypothesis.errors.Unsatisfiable, hypothesis.errors.Flaky):
        pass  # nothing can be broken in an operation that takes nothing in
    finally:
        session.close()


def _ask(case: Any, session: requests.Session, headers: dict[str, str]) -> tuple[int | str, tuple[str, str] | None]:
    """The status, and what is wrong with the answer and how to ask again. ``headers`` override the case's own."""
    shown = case.as_curl_command()[:3000]
    try:
        # Not case.call, which leaves a stream after its first events.
        request = case.as_transport_kwargs()
        request["headers"] = {**(request.get("headers") or {}), **headers}
        answer = session.request(**request, timeout=CASE_TIMEOUT)
    except requests.Timeout:
        return "hangs", ("hangs", shown)
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        return "broken", (f"connection broken: {error}"[:200], shown)
    except (requests.exceptions.InvalidHeader, ValueError, UnicodeError):
        return "unsendable", None
    status = answer.status_code
    shown += f"\n{status} {answer.text[:1000]}{' … ' + answer.text[-1000:] if len(answer.text) > 1000 else ''}"
    if status >= 500:
        return status, (f"{status}", shown)
    if "x-request-id" not in answer.headers:
        return status, ("no request id", shown)
    if status >= 400:
        try:
            ErrorResponse.model_validate_json(answer.text)
        except ValueError as error:
            return status, (f"error of another shape: {error}"[:200], shown)
    if status == 405:
        return status, None  # other methods are not described
    try:
        streamed = "text/event-stream" in answer.headers["content-type"]  # described as text, which it is
        case.validate_response(answer, checks=CHECKS if streamed else [*CHECKS, response_schema_conformance])
    except BaseException as error:  # noqa: BLE001  schemathesis raises groups of its failures
        first = getattr(error, "exceptions", [error])[0]
        return status, (f"{type(first).__name__}: {str(first).splitlines()[0]}"[:200], f"{shown}\n{error}")
    if streamed:
        *events, last, end = answer.content.split(b"\n\n")
        if (last, end) != (b"data: [DONE]", b""):
            return status, ("a stream that does not end with [DONE]", shown)
        try:
            [json.loads(event.removeprefix(b"data: ")) for event in events]
        except ValueError:
            return status, ("a stream with an event that is no JSON", shown)
    return status, None

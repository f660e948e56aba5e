"""``vllm serve`` with our executor: the answers of vLLM's own; and a worker that is killed while a client reads.

Once with worker processes of its own, on Unix sockets, and once with ``lightvllm worker`` servers, by mutual TLS.
The tests of one server run in the order in which they stand: the last one kills it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai", reason="the test extra is not installed")

import httpx2 as httpx
import openai
import psutil
from vllm_models import CHAT, MESSAGES, PROMPTS, SMOLLM2, folder, reference
from vllm_process import END_LIMIT, KUBERNETES, MARKS
from vllm_remote import remote_workers
from vllm_server import NAME, Server, options, server
from waiting import gone, wait_until

pytestmark = [pytest.mark.demo, *MARKS]

LAYOUT = SMOLLM2[1]
TOLD_WITHIN = 2.0
"""Seconds from a worker's death until its client knows."""


@pytest.fixture(scope="module", params=[pytest.param("unix", marks=pytest.mark.smoke), "mtls"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        remote = None
        if request.param == "mtls":
            remote = stack.enter_context(remote_workers(tmp_path_factory.mktemp("group"), LAYOUT.pp))
        env = remote.env if remote else {}
        one = stack.enter_context(server(folder(LAYOUT.model), KUBERNETES, *options(LAYOUT.arguments), **env))
        one.ready()
        one.remote_pids = [each.server_pid() for each in remote.servers] if remote else []
        yield one


def worker_pids(served: Server) -> list[int]:
    """By the titles that vLLM gives its workers."""
    pids = served.remote_pids
    found = [psutil.Process(pid) for pid in pids] if pids else served.household.processes()
    titles = {" ".join(process.cmdline()): process.pid for process in found}
    workers = [titles[title] for title in sorted(titles) if "VLLM::Worker" in title]
    assert len(workers) == LAYOUT.pp, titles
    return workers


def ask(served: Server, **more: Any) -> Any:
    return served.openai.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=0.0, max_tokens=CHAT["max_tokens"], **more
    )


def test_chat(served: Server) -> None:
    expected = reference(LAYOUT)["chat"]
    answer = ask(served, logprobs=True, top_logprobs=CHAT["logprobs"]).choices[0]
    assert answer.message.content == expected["text"]
    assert "Paris" in expected["text"]
    got = [[each.logprob for each in token.top_logprobs] for token in answer.logprobs.content]
    # The server rounds nothing; with the chosen token among the likeliest there are as many as were asked for.
    assert got == [sorted(step.values(), reverse=True) for step in expected["logprobs"]]


def test_streamed(served: Server) -> None:
    expected = reference(LAYOUT)["chat"]["text"]
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(served, stream=True) if chunk.choices]
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 3, "it came in pieces"


def test_completions_together(served: Server) -> None:
    expected = [each["text"] for each in reference(LAYOUT)["together"]]
    assert served.complete(PROMPTS) == expected


def test_a_worker_is_killed_in_mid_stream(served: Server) -> None:
    """The client is told within two seconds, health says so, and the server ends, as under vLLM's own executor."""
    workers = worker_pids(served)
    served.household.look()
    body = {"model": NAME, "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(workers[-1], signal.SIGKILL)
        killed = time.monotonic()
        rest, cut = [], False
        try:
            rest = [line.removeprefix("data: ") for line in lines if line]
        except httpx.TransportError:  # the server was gone before the stream's end
            cut = True
        seconds = time.monotonic() - killed
    assert seconds < TOLD_WITHIN
    events = [json.loads(line) for line in rest if line != "[DONE]"]
    assert cut or any("error" in event for event in events), rest
    with pytest.raises(openai.APIError):
        ask(served)
    assert served.answers_health() != 200
    wait_until(lambda: served.process.poll() is not None, "vLLM's server ends", END_LIMIT)
    assert all(gone(pid) for pid in workers)
    told = re.search(r"KubernetesExecutor: .*rank 1.*", served.household.log())
    assert told, "who has died is told"
    if not served.remote_pids:
        assert "SIGKILL" in told[0], "and how, where that is known"
    served.household.nothing_left()

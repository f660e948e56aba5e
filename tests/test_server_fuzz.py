"""A server taken at its own word: a small part of what ``make fuzz-api`` asks (``benchmarks/fuzz_api.py``)."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="the test extra is not installed")

import tiny_llama
from server_process import started

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # schemathesis' own at import
    from fuzz_api import Leaks, fuzz

CASES = 400
SEED = 1
KEY = "the-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_no_request_of_any_kind_breaks_it(model):
    code = "from lightvllm.cli.main import run; run()"
    options = ["--port", "0", "--served-model-name", "tiny", "--disable-log-requests"]
    command = [sys.executable, "-c", code, "serve", str(model), *options]
    with started(command, os.environ | {"OMP_NUM_THREADS": "1", "LIGHTVLLM_API_KEY": KEY}) as server:
        url = server.ready()
        headers = {"Authorization": f"Bearer {KEY}"}
        leaks = Leaks(url, server.process.pid, headers)
        found = fuzz(url, CASES, SEED, "tiny", headers)
        assert not found.failures, "\n\n".join(f"{kind}\n{request}" for kind, request in found.failures.items())
        assert found.cases >= CASES * 0.8
        assert found.statuses["200"] >= found.cases / 10, "some must come through, or nothing is tested"
        leaks.check()
        assert "Traceback" not in server.text

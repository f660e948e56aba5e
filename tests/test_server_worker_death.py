"""A worker of two that share each layer is killed while a stream runs: the server names that one, not its peer.

The peer's collective fails in the same moment, and its error may well be heard before the death that it came of.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
import tiny_llama
from server_process import started
from waiting import wait_until

pytestmark = pytest.mark.slow

TOLD_WITHIN = 5.0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_dead_rank_is_named(rank: int, tmp_path: Path) -> None:
    model = tiny_llama.build(tmp_path)
    command = [sys.executable, "-c", "from lightvllm.cli.main import run; run()", "serve", str(model), "--port", "0"]
    env = os.environ | {"LIGHTVLLM_API_KEY": "", "OMP_NUM_THREADS": "1"}
    with started([*command, "--executor", "k8s", "-tp", "2", "--served-model-name", "tiny"], env) as server:
        url = server.ready()
        ranks = httpx.get(f"{url}/status.json").json()["ranks"]
        body = {"model": "tiny", "prompt": [5], "max_tokens": 250, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(ranks[rank]["pid"], signal.SIGKILL)
            killed = time.monotonic()
            health = wait_until(
                lambda: (got := httpx.get(f"{url}/health")).status_code == 503 and got.json(), "it is not ready"
            )
            assert time.monotonic() - killed < TOLD_WITHIN
            events = [line.removeprefix("data: ") for line in lines if line]
        assert health["dead_ranks"] == [rank], health
        assert f"rank {rank}" in health["reason"]
        assert "SIGKILL" in health["reason"]
        assert "SIGKILL" in json.loads(events[-1])["error"]["message"]
        told = httpx.get(f"{url}/status.json").json()["ranks"]
        assert [each["health"] for each in told] == ["dead" if i == rank else "stopped" for i in range(2)]
        assert ["SIGKILL" in each["reason"] for each in told] == [i == rank for i in range(2)]

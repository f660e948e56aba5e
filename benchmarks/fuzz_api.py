"""Requests of every kind to ``lightvllm serve``, at length: ``python benchmarks/fuzz_api.py --cases 5000``.

The requests, and what must hold of the answers, are the tests' (``tests/fuzz_api.py``): no 5xx, no hang, nothing that
is not described. Afterwards no request and no block of the KV cache may be left; memory is shown from round to round,
and must not grow in the second half by more than ``--growth`` MiB. Ends with status 1 and the first request of each
kind that did otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = str(Path(__file__).resolve().parent.parent / "tests")
sys.path.insert(0, TESTS)

import httpx2 as httpx  # noqa: E402
import tiny_llama  # noqa: E402
from fuzz_api import Leaks, fuzz  # noqa: E402
from server_process import started  # noqa: E402

ROUNDS = 6


def warm_up(url: str) -> None:
    """Have every thread that tokenizes take a long text: each keeps the working memory of its longest."""
    with ThreadPoolExecutor(16) as pool:
        asked = [
            pool.submit(httpx.post, f"{url}/tokenize", json={"model": "tiny", "prompt": "x" * 1_000_000}, timeout=300)
            for _ in range(32)
        ]
        assert {job.result().status_code for job in asked} == {200}


def run(cases: int, seed: int, growth_mib: float) -> int:
    failures: dict[str, str] = {}
    statuses: dict[str, int] = {}
    memory: list[float] = []
    began, asked = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_llama.build(Path(folder, "tiny"))
        code = "from lightvllm.cli.main import run; run()"
        options = ["--port", "0", "--served-model-name", "tiny", "--disable-log-requests"]
        command = [sys.executable, "-c", code, "serve", str(model), *options]
        with started(command, os.environ | {"OMP_NUM_THREADS": "1"}) as server:
            url = server.ready()
            warm_up(url)
            leaks = Leaks(url, server.process.pid)
            number = 0
            while asked < cases:  # hypothesis makes fewer where there is little to choose
                found = fuzz(url, cases // ROUNDS + 1, seed + number, "tiny")
                if not found.cases:
                    raise SystemExit("no request could be made; is the description of the API empty?")
                number += 1
                asked += found.cases
                for status, count in found.statuses.items():
                    statuses[status] = statuses.get(status, 0) + count
                for kind, request in found.failures.items():
                    failures.setdefault(kind, request)
                leaks.check()
                each = [bytes_ / 2**20 for bytes_ in leaks.rss()]
                memory.append(sum(each))
                print(
                    f"{asked} requests, {time.monotonic() - began:.0f} s, {memory[-1]:.0f} MiB "
                    f"({' + '.join(f'{part:.0f}' for part in each)}), "
                    f"{len(failures)} kinds of failures",
                    flush=True,
                )
            log = [line for line in server.text.splitlines() if "unexpected error" in line or "Traceback" in line]
    print("answers by status: " + ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())))
    for kind, request in failures.items():
        print(f"\n--- {kind}\n{request}")
    grown = memory[-1] - memory[(len(memory) - 1) // 2]
    print(f"memory grew by {grown:.1f} MiB in the second half; {len(log)} unexpected errors in the server's log")
    return int(bool(failures) or bool(log) or grown > growth_mib)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--growth", type=float, default=30.0, help="MiB that the second half may add")
    given = parser.parse_args()
    sys.exit(run(given.cases, given.seed, given.growth))

"""Two pipeline stages say what one process says, under every executor and transport, and leave nothing behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tiny_llama
from stage_channels import TRANSPORTS
from waiting import wait_until

from lightvllm import LLM, SamplingParams, hub
from lightvllm.errors import WorkerDied, WorkerError
from lightvllm.parity.prompts import Prompt, default_prompts
from lightvllm.parity.report import explain
from lightvllm.parity.run import Plan, parse_layouts, run_parity

pytestmark = [pytest.mark.parity, pytest.mark.slow]

every_transport = pytest.mark.parametrize("transport", TRANSPORTS)


def check(plan: Plan, transport: str) -> None:
    report = run_parity(plan)
    assert [line for mismatch in report.mismatches for line in explain(mismatch)] == []
    assert {run.layout: run.pp_transport for run in report.runs} == {"1x1": "", "1x2": transport}
    assert len({run.digest for run in report.runs if run.layout == "1x2"}) == 1


def options(transport: str, folder: Path) -> dict[str, str]:
    shared = {"pp_shared_dir": str(folder)} if transport == "shared" else {}
    return {"pp_transport": transport} | shared


@pytest.mark.ray
@pytest.mark.parametrize("transport", ["grpc", "shared"])  # test_parity_executors.py has torch
def test_a_tiny_llama(tmp_path: Path, transport: str) -> None:
    (tmp_path / "files").mkdir()
    executors = ["uniproc", "ray", "k8s"]
    plan = Plan(
        model=str(tiny_llama.build(tmp_path / "model")),
        executors=executors,
        layouts=parse_layouts("1x1,1x2"),
        prompts=[Prompt(prompt=text) for text in ("The quick brown", "1 2 3 4 5 6 7 8 9 10 " * 3, "Grüße")],
        max_tokens=8,
        threads=1,
        reference="none",
        options={name: options(transport, tmp_path / "files") for name in executors},
    )
    check(plan, transport)
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.demo
@every_transport
def test_smollm2(tmp_path: Path, transport: str) -> None:
    if not hub.installed("smollm2-135m"):
        pytest.skip("run: lightvllm models get smollm2-135m")
    plan = Plan(
        model="smollm2-135m",
        executors=["uniproc", "k8s"],
        layouts=parse_layouts("1x1,1x2"),
        prompts=default_prompts(),
        max_tokens=12,
        threads=1,
        reference="none",
        options={name: options(transport, tmp_path) for name in ("uniproc", "k8s")},
    )
    check(plan, transport)


@every_transport
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_stage_is_a_dead_worker_and_nothing_stays(tmp_path: Path, transport: str, victim: int) -> None:
    (tmp_path / "files").mkdir()
    with LLM(
        str(tiny_llama.build(tmp_path / "model")),
        executor="k8s",
        pipeline_parallel_size=2,
        threads=1,
        **options(transport, tmp_path / "files"),  # type: ignore[arg-type]
    ) as llm:
        stream = llm.stream({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=40, ignore_eos=True))
        next(stream)
        os.kill(llm.executor.workers[victim].pid, signal.SIGKILL)

        def run_on() -> None:
            for _ in stream:
                pass

        # The stage that waits may say so before the backend has noticed the death.
        with pytest.raises((WorkerDied, WorkerError), match=r"SIGKILL|stage \(rank"):
            run_on()
        wait_until(lambda: llm.executor.is_failed, "the death is noticed")
    wait_until(lambda: not list((tmp_path / "files").iterdir()), "the files are removed")

"""The point of it all: uniproc, Ray and the Kubernetes protocol say the same, and what transformers says."""

import pytest
import tiny_llama

from lightvllm import hub
from lightvllm.parity.prompts import Prompt, default_prompts
from lightvllm.parity.report import explain
from lightvllm.parity.run import Plan, parse_layouts, run_parity

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.ray]


def check(report, layouts):
    assert [line for mismatch in report.mismatches for line in explain(mismatch)] == []
    names = [run.name for run in report.runs]
    assert names == [
        f"{ex} {la}" for la in layouts for ex in ("uniproc", "ray", "k8s") if ex != "uniproc" or la == "1x1"
    ]
    for layout in layouts:
        assert len({run.digest for run in report.runs if run.layout == layout}) == 1
    assert len({run.threads for run in report.runs}) == 1
    assert max(run.max_abs_logit_difference for run in report.runs) < 1e-3


def test_a_tiny_llama(tmp_path):
    layouts = ["1x1", "2x1", "1x2", "2x2", "4x1"]
    prompts = ["The quick brown", "Paris is", "1 2 3 4 5 6 7 8 9 10 " * 3, "Grüße"]
    plan = Plan(
        model=str(tiny_llama.build(tmp_path)),
        executors=["uniproc", "ray", "k8s"],
        layouts=parse_layouts(",".join(layouts)),
        prompts=[Prompt(prompt=text) for text in prompts],
        max_tokens=12,
        threads=1,
    )
    check(run_parity(plan), layouts)


@pytest.mark.demo
@pytest.mark.timeout(600)
def test_smollm2():
    if not hub.installed("smollm2-135m"):
        pytest.skip("run: lightvllm models get smollm2-135m")
    layouts = ["1x1", "1x2", "3x1"]
    plan = Plan(
        model="smollm2-135m",
        executors=["uniproc", "ray", "k8s"],
        layouts=parse_layouts(",".join(layouts)),
        prompts=default_prompts(),
        max_tokens=12,
        threads=1,
    )
    report = run_parity(plan)
    check(report, layouts)
    assert {run.prompts[0].text for run in report.runs} == {"The capital of France is Paris."}

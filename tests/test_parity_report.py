"""The report in its three forms: 80 columns, JSON that reads back, HTML that needs nothing else."""

import json
from html.parser import HTMLParser

import msgspec
import pytest
from rich.console import Console

from lightvllm.parity import report as reports
from lightvllm.parity.compare import PromptRun, Run, TopToken, compare
from lightvllm.parity.run import Question, Report


def run(executor, layout="1x1", token=3, digest="d", repeat=1):
    tops = [[TopToken(token, "<b>Paris</b>", 9.5), TopToken(4, " Rome", 9.25)]]
    answer = PromptRun(text="<b>Paris</b>", token_ids=[token], step_digests=[digest * 64], step_tops=tops)
    return Run(
        executor=executor,
        layout=layout,
        repeat=repeat,
        prompts=[answer],
        digest=digest * 64,
        max_abs_logit_difference=1.2e-5,
        threads=2,
        device="cpu",
        attention_backend="sdpa",
        kernels="reference",
        output_tokens=10,
        steps=1,
        seconds=2.0,
        outside_us_p50=812.4,
        outside_us_p99=1900.6,
        start_seconds=3.21,
    )


def make(*runs, reference=True):
    said = Run(executor="transformers", layout="", prompts=[run("x").prompts[0]]) if reference else None
    return Report(
        created="2026-01-02T03:04:05+00:00",
        machine={"cpu": "Z80", "cores": "1"},
        model="tiny",
        dtype="float32",
        max_tokens=4,
        prompts=[Question("capital of <France>?", "capital of <France>?", 5)],
        reference=said,
        reference_version="5.0" if reference else None,
        runs=list(runs),
        mismatches=compare(runs, said),
    )


GOOD = make(run("uniproc"), run("ray"), run("k8s"), run("ray", "2x1", digest="e"))
BAD = make(run("ray"), run("k8s", digest="e"), run("k8s", token=7, digest="e", repeat=2))


def printed(report, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        reports.print_report(report, console)
        return console.export_text()


def test_the_table_fits_into_80_columns():
    lines = printed(GOOD).splitlines()
    table = [line for line in lines if line.startswith((" 1x1", " 2x1"))]
    assert [line.split() for line in table] == [
        ["1x1", name, "yes", "yes", "d" * 8, "1.2e-05", "5.0", "812/1901", "3.2"] for name in ("uniproc", "ray", "k8s")
    ] + [["2x1", "ray", "yes", "–", "e" * 8, "1.2e-05", "5.0", "812/1901", "3.2"]]
    assert all(len(line) <= 80 for line in table)
    assert "…" not in "\n".join(table)


def test_the_verdict_and_a_sample():
    text = printed(GOOD)
    assert (
        "All 4 runs (uniproc, ray, k8s) gave the same 10 tokens as transformers 5.0, and within each layout the same "
        "logits, bit for bit." in text
    )
    assert "'capital of <France>?' → '<b>Paris</b>'" in text


def test_nothing_is_claimed_that_was_not_compared():
    alone = make(run("uniproc"), reference=False)
    assert reports.verdict(alone) == "The run (uniproc) gave the same 10 tokens."
    (row,) = reports.rows(alone)
    assert (row.tokens, row.logits) == (None, None)


def test_a_mismatch_is_named_with_both_sides():
    text = printed(BAD)
    assert "the logits of ray 1x1 and k8s 1x1 differ at prompt 1, step 1" in text
    assert "the tokens of transformers and k8s 1x1 (run 2) differ at prompt 1, step 1: token 3 against token 7" in text
    assert "  k8s 1x1 (run 2): 7 '<b>Paris</b>' 9.500000 · 4 ' Rome' 9.250000" in text
    assert "Not the same: 3 differences between all 3 runs (ray, k8s)." in text
    assert [(row.tokens, row.logits) for row in reports.rows(BAD)] == [(True, True), (True, False), (False, False)]


@pytest.mark.parametrize("report", [GOOD, BAD])
def test_json_reads_back(report):
    raw = reports.to_json(report)
    found = json.loads(raw)
    assert found["version"] == 1
    assert found["identical"] is report.identical
    assert found["verdict"] == reports.verdict(report)
    assert found["runs"][0]["tokens_per_second"] == 5.0
    again = msgspec.json.decode(raw, type=Report)
    assert again.mismatches == report.mismatches
    assert [r.digest for r in again.runs] == [r.digest for r in report.runs]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("report", [GOOD, BAD])
def test_html_is_whole_and_needs_nothing_else(report):
    html = reports.to_html(report)
    page = Tags()
    page.feed(html)
    assert page.open == []
    assert page.links == []
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert reports.verdict(report) in page.text
    assert "capital of <France>?" in page.text
    assert "<b>Paris</b>" in page.text, "what a model says is text, not markup"
    for mismatch in report.mismatches:
        assert mismatch.sentence() in page.text

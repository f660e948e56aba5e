"""Shows a report: a table and a verdict on the terminal, JSON for machines, one HTML file for everybody else."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import msgspec

from lightvllm.parity.compare import Mismatch, Run
from lightvllm.parity.run import Report

if TYPE_CHECKING:
    from rich.console import Console

FOOTNOTES = """\
Tokens are greedy. The logits digest is the SHA-256 over the float32 logits of every step in order; it is compared
within a layout, because another layout adds the same numbers up in another order. Largest Δlogit is the largest
absolute difference from the reference's logits on the same tokens. Time outside the model is a step's time in the
driver less the time that the output rank spent in it, its waiting for other ranks included. Times are taken without
logits being sent.
"""


class Row(msgspec.Struct, frozen=True):
    """One run as a line of the table. ``tokens`` and ``logits``: the same as what they are compared with; None when
    there is nothing to compare with."""

    run: Run
    tokens: bool | None
    logits: bool | None


def rows(report: Report) -> list[Row]:
    def differs(run: Run, *kinds: str) -> bool:
        return any(m.right == run.name and m.kind in kinds for m in report.mismatches)

    found = []
    for run in report.runs:
        alone = sum(other.layout == run.layout for other in report.runs) == 1
        compared = report.reference is not None or len(report.runs) > 1
        found.append(
            Row(
                run,
                not differs(run, "tokens") if compared else None,
                None if alone else not differs(run, "logits", "schedule"),
            )
        )
    return found


def verdict(report: Report) -> str:
    """One sentence."""
    if report.mismatches:
        count = len(report.mismatches)
        return f"Not the same: {count} difference{'s' * (count > 1)} between {_several(report.runs)}."
    tokens = report.runs[0].output_tokens
    against = f"the same {tokens} tokens"
    if report.reference is not None:
        against += f" as {report.reference.executor} {report.reference_version}"
    sentence = f"{_several(report.runs)} gave {against}"
    if any(row.logits for row in rows(report)):
        sentence += ", and within each layout the same logits, bit for bit"
    return f"{sentence[0].upper()}{sentence[1:]}."


def explain(mismatch: Mismatch) -> list[str]:
    """Where two runs part, and what each held most probable there; one line each."""
    lines = [mismatch.sentence()]
    for name, top in ((mismatch.left, mismatch.left_top), (mismatch.right, mismatch.right_top)):
        if top:
            lines.append(f"  {name}: " + " · ".join(map(str, top)))
    return lines


def print_report(report: Report, console: Console) -> None:
    """Table, verdict and a sample of what was said."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    # Narrow enough for 80 columns: a table that is cut off says nothing.
    table = Table(box=box.HORIZONTALS, padding=(0, 0, 0, 1), pad_edge=False)
    for column in ("TPxPP", "executor", "same\ntokens", "same\nlogits", "logits\ndigest"):
        table.add_column(column, no_wrap=True)
    for column in ("largest\nΔlogit", "tokens\n/s", "outside the\nmodel, µs", "start\ns"):
        table.add_column(column, justify="right", no_wrap=True)
    layout = None
    for row in rows(report):
        run = row.run
        if layout not in (None, run.layout):
            table.add_section()
        layout = run.layout
        table.add_row(
            run.layout,
            run.executor if run.repeat == 1 else f"{run.executor} ({run.repeat})",
            _mark(row.tokens),
            _mark(row.logits),
            run.digest[:8],
            "–" if run.max_abs_logit_difference is None else f"{run.max_abs_logit_difference:.1e}",
            f"{run.tokens_per_second:.1f}",
            f"{run.outside_us_p50:.0f}/{run.outside_us_p99:.0f}",
            f"{run.start_seconds:.1f}",
        )
    asked = f"{report.model}, {report.dtype}, {len(report.prompts)} prompts, at most {report.max_tokens} tokens each"
    console.print(asked, markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    console.print("outside the model: p50/p99 per step", style="dim")
    for mismatch in report.mismatches:
        for line in explain(mismatch):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"[bold {'green' if report.identical else 'red'}]{escape(verdict(report))}[/]", soft_wrap=True)
    question, answer = report.prompts[0], report.runs[0].prompts[0]
    console.print(f"{question.title!r} → {answer.text!r}", markup=False, highlight=False, soft_wrap=True)


def to_json(report: Report) -> bytes:
    """The report, indented. The most probable tokens are left out except where runs part."""
    content: dict[str, Any] = msgspec.to_builtins(report)
    for run in [*content["runs"], *filter(None, [content["reference"]])]:
        run["tokens_per_second"] = round(run["output_tokens"] / run["seconds"], 3) if run["seconds"] else None
        for prompt in run["prompts"]:
            del prompt["step_tops"]
    content["identical"] = report.identical
    content["verdict"] = verdict(report)
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def to_html(report: Report) -> str:
    """One page that needs nothing from anywhere else."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    explained = [explain(mismatch) for mismatch in report.mismatches]
    return environment.from_string(source).render(
        report=report, rows=rows(report), verdict=verdict(report), explained=explained, footnotes=FOOTNOTES
    )


def _several(runs: list[Run]) -> str:
    names = ", ".join(dict.fromkeys(run.executor for run in runs))
    return f"all {len(runs)} runs ({names})" if len(runs) > 1 else f"the run ({names})"


def _mark(same: bool | None) -> str:
    return {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "–"}[same]

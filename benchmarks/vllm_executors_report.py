"""What ``vllm_executors.py`` has measured: cells, ratios, targets, tables. Pure: no process is started here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rpc_report import Target

Key = tuple[int, int]
"""A round: the batch of contenders that were up together, and its number."""

ROLES = ("front", "engine", "workers", "daemons")
"""Whose CPU time it is: the process that asks and reads the tokens, vLLM's engine core, the workers and what serves
them, and Ray's daemons."""

REFERENCE, RAYS, OURS = "mp", ("ray-v2", "ray-v1"), ("k8s-unix", "k8s-tls", "ray")
AT_LEAST = {REFERENCE: 0.98} | dict.fromkeys(RAYS, 1.0)


@dataclass
class Cell:
    """One contender in one layout with so many streams at a time.

    Attributes:
        rounds: of each burst ``tokens_per_second``, percentiles in seconds (``serve_report.figures``), and
            ``cpu_ROLE``: seconds per token.
        unlike: streams with other tokens than the reference's in the same round, of ``compared``.
    """

    contender: str
    layout: str
    concurrency: int
    rounds: dict[Key, dict[str, float]] = field(default_factory=dict)
    unlike: int = 0
    compared: int = 0

    def median(self, figure: str) -> float:
        return statistics.median(row[figure] for row in self.rounds.values())

    def as_json(self) -> dict[str, Any]:
        rounds = [{"batch": batch, "round": number} | row for (batch, number), row in self.rounds.items()]
        return vars(self) | {"rounds": rounds}


@dataclass
class Results:
    """Everything that one run has measured.

    Attributes:
        start_seconds: from making vLLM's engine until it takes requests, by layout and contender.
        idle: CPU seconds by role, by layout and contender.
        failures: a text for each contender that did not start or broke off.
    """

    cells: list[Cell] = field(default_factory=list)
    start_seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    idle: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def cell(self, contender: str, layout: str, concurrency: int) -> Cell:
        """The cell, made if it is not there."""
        for cell in self.cells:
            if (cell.contender, cell.layout, cell.concurrency) == (contender, layout, concurrency):
                return cell
        self.cells.append(Cell(contender, layout, concurrency))
        return self.cells[-1]


def speed_ratios(cell: Cell, other: Cell) -> list[float]:
    """Of tokens per second, round by round, for the rounds that both have taken part in."""
    figure = "tokens_per_second"
    return [row[figure] / other.rounds[key][figure] for key, row in cell.rounds.items() if key in other.rounds]


class Floor(Target):
    """A bound that the measured ratio must not fall below."""

    @property
    def met(self) -> bool | None:
        return None if self.value is None else round(self.value, 3) >= self.bound


def targets(
    results: Results, names: Sequence[str], layouts: Sequence[str], concurrencies: Sequence[int]
) -> list[Floor]:
    """Ours against those of vLLM's that are among ``names``.

    Contenders that were never up together are compared by way of the reference.
    """
    found = []
    for layout in layouts:
        for concurrency in concurrencies:
            cells = {
                cell.contender: cell
                for cell in results.cells
                if (cell.layout, cell.concurrency) == (layout, concurrency)
            }
            for ours in filter(cells.get, OURS):
                for theirs, bound in AT_LEAST.items():
                    what = f"{ours} / {theirs}, {layout}, {streams(concurrency)}"
                    if theirs not in names:
                        continue
                    if theirs not in cells:
                        found.append(Floor(what, bound))
                        continue
                    ratios = speed_ratios(cells[ours], cells[theirs])
                    if ratios:
                        found.append(Floor(what, bound, statistics.median(ratios), (min(ratios), max(ratios))))
                    elif (reference := cells.get(REFERENCE)) is not None:
                        ways = [speed_ratios(cells[name], reference) for name in (ours, theirs)]
                        value = statistics.median(ways[0]) / statistics.median(ways[1]) if all(ways) else None
                        found.append(Floor(what, bound, value))
    return found


# ------------------------------------------------------------------------------------------------ tables


def streams(concurrency: int) -> str:
    return f"{concurrency} stream{'s' if concurrency > 1 else ''}"


def print_results(console: Console, results: Results, titles: dict[str, str], idle_seconds: float) -> None:
    for layout, concurrency in dict.fromkeys((cell.layout, cell.concurrency) for cell in results.cells):
        cells = [c for c in results.cells if (c.layout, c.concurrency) == (layout, concurrency) and c.rounds]
        if cells:
            console.print(_speeds(f"{layout} (TP×PP), {streams(concurrency)}", cells, titles))
    if results.start_seconds:
        console.print(_starts(results, titles, idle_seconds))


def _speeds(title: str, cells: list[Cell], titles: dict[str, str]) -> Table:
    table = Table("contender", "", "tokens/s", "it / mp", "rounds", "first token, ms", "per token, ms", "CPU ms/token")
    table.title, table.title_justify = f"{title}: p50 / p99; CPU: {' + '.join(ROLES)}", "left"
    for column in table.columns[2:]:
        column.justify = "right"
    reference = next((cell for cell in cells if cell.contender == REFERENCE), None)
    for cell in sorted(cells, key=lambda cell: list(titles).index(cell.contender)):
        ratios = speed_ratios(cell, reference) if reference is not None else []
        table.add_row(
            cell.contender,
            titles[cell.contender],
            f"{cell.median('tokens_per_second'):.1f}",
            f"{statistics.median(ratios):.3f}" if ratios else "",
            f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "",
            *(
                f"{cell.median(f'{name}_p50') * 1000:.1f} / {cell.median(f'{name}_p99') * 1000:.1f}"
                for name in ("ttft", "itl")
            ),
            " + ".join(f"{cell.median(f'cpu_{role}') * 1000:.1f}" for role in ROLES),
        )
    return table


def _starts(results: Results, titles: dict[str, str], idle_seconds: float) -> Table:
    title = f"start of the engine, seconds; CPU seconds in {idle_seconds:g} s idle: {' + '.join(ROLES)}"
    table = Table("layout", "contender", "start", "idle", title=title, title_justify="left")
    for (layout, name), seconds in results.start_seconds.items():
        idle = results.idle.get((layout, name))
        used = " + ".join(f"{idle[role]:.2f}" for role in ROLES) if idle else ""
        table.add_row(layout, name, f"{statistics.median(seconds):.1f}", used)
    return table


def print_targets(console: Console, found: Sequence[Floor]) -> None:
    if not found:
        return
    table = Table("", "measured", "rounds", "at least", "", title_justify="left")
    table.title = "targets, of tokens per second: medians of the rounds' ratios"
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not measured[/]"}
    for target in found:
        value = "" if target.value is None else f"{target.value:.3f}"
        spread = "" if target.spread is None else "{:.3f} to {:.3f}".format(*target.spread)
        table.add_row(target.what, value, spread, f"{target.bound:g}", words[target.met])
    console.print(table)

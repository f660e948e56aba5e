"""What ``rpc.py`` has measured: cells, ratios, targets, tables. Pure: no process is started here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rpc_process import Burst, CpuSeconds

IDLE_BOUND = 0.05
"""Seconds that count as 0.0."""


@dataclass
class Cell:
    """One contender with one number of workers and one payload: a burst per round."""

    contender: str
    workers: int
    payload: int
    bursts: list[Burst] = field(default_factory=list)
    cpu: CpuSeconds = field(default_factory=CpuSeconds)

    def add(self, burst: Burst, cpu: CpuSeconds) -> None:
        self.bursts.append(burst)
        self.cpu += cpu

    @property
    def p50(self) -> float:
        return statistics.median(burst.p50 for burst in self.bursts)

    @property
    def p99(self) -> float:
        return statistics.median(burst.p99 for burst in self.bursts)

    @property
    def tail(self) -> float:
        """p99 / p50, the median of the rounds."""
        return statistics.median(burst.p99 / burst.p50 for burst in self.bursts)

    @property
    def cpu_per_call(self) -> CpuSeconds:
        """Microseconds."""
        calls = sum(len(burst.times) for burst in self.bursts)
        return CpuSeconds(*(1e6 * used / calls for used in (self.cpu.driver, self.cpu.workers, self.cpu.daemons)))

    def as_json(self) -> dict[str, Any]:
        return {
            "contender": self.contender,
            "workers": self.workers,
            "payload": self.payload,
            "p50_us": self.p50,
            "p99_us": self.p99,
            "cpu_us_per_call": vars(self.cpu_per_call),
            "rounds": [{"p50_us": b.p50, "p99_us": b.p99, "calls": len(b.times)} for b in self.bursts],
        }


@dataclass
class Results:
    """Everything that one run has measured."""

    cells: list[Cell] = field(default_factory=list)
    idle: dict[str, CpuSeconds] = field(default_factory=dict)
    growth: list[Cell] = field(default_factory=list)

    def find(self, contender: str, workers: int, payload: int) -> Cell | None:
        return next(
            (c for c in self.cells if (c.contender, c.workers, c.payload) == (contender, workers, payload)), None
        )


@dataclass(frozen=True)
class Target:
    """A bound and what was measured; ``value`` None where it was not. ``spread``: the rounds' least and greatest."""

    what: str
    bound: float
    value: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.bound


def rounds_ratios(ours: Cell, theirs: Cell) -> list[float]:
    """Of the p50 of each round, in which both ran shortly after one another."""
    return [a.p50 / b.p50 for a, b in zip(ours.bursts, theirs.bursts, strict=True)]


RATIOS: tuple[tuple[str, str, float], ...] = (
    *((f"direct-{kind}", "ray-graph", 0.5) for kind in ("unix", "tcp", "tls")),
    ("direct-unix", "vllm-shm", 1.0),
    ("direct-tcp", "vllm-tcp", 1.0),
    *((f"direct-{kind}", f"socket-{kind}", 1.5) for kind in ("unix", "tcp", "tls")),
    ("direct-tls", "direct-tcp", 1.3),
    *((f"grpc-{kind}", "ray-actor", 0.5) for kind in ("unix", "tcp", "tls")),
    ("graph-k8s", "ray-graph", 0.6),
)
"""Ours, theirs, and the bound of the ratio of their p50, with ``TARGET_WORKERS`` and ``TARGET_PAYLOAD``."""

TARGET_WORKERS, TARGET_PAYLOAD = 2, 1024
TAIL_BOUND = 3.0
GROWTH_WORKERS, GROWTH_BOUND = 64, 40.0


def targets(results: Results, ours: Sequence[str], idle_seconds: float) -> list[Target]:
    """``ours``: names of the contenders that the bounds on p99 and on idle CPU are for."""

    def cell(name: str) -> Cell | None:
        return results.find(name, TARGET_WORKERS, TARGET_PAYLOAD)

    found = [_ratio(f"{a} / {b}", bound, cell(a), cell(b)) for a, b, bound in RATIOS]
    one, many = (next((c for c in results.growth if c.workers == n), None) for n in (1, GROWTH_WORKERS))
    found.append(_ratio(f"direct-unix, {GROWTH_WORKERS} workers / 1 worker", GROWTH_BOUND, many, one))
    for name in ours:
        if (c := cell(name)) is not None:
            tails = [b.p99 / b.p50 for b in c.bursts]
            found.append(Target(f"{name}, p99 / p50", TAIL_BOUND, c.tail, (min(tails), max(tails))))
    for name in ours:
        if (used := results.idle.get(name)) is not None:
            what = f"{name}, CPU seconds in {idle_seconds:g} s idle"
            found.append(Target(what, IDLE_BOUND, round(used.driver + used.workers, 2)))  # of ticks of 10 ms
    return found


def _ratio(what: str, bound: float, ours: Cell | None, theirs: Cell | None) -> Target:
    if ours is None or theirs is None:
        return Target(what, bound)
    ratios = rounds_ratios(ours, theirs)
    return Target(what, bound, statistics.median(ratios), (min(ratios), max(ratios)))


# ------------------------------------------------------------------------------------------------ tables


def size_name(size: int) -> str:
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def microseconds(value: float) -> str:
    return f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"


def print_results(console: Console, results: Results, titles: dict[str, str], idle_seconds: float) -> None:
    workers = sorted({cell.workers for cell in results.cells})
    by_workers = {n: sorted({c.payload for c in results.cells if c.workers == n}) for n in workers}
    by_payload = {p: [n for n in workers if p in by_workers[n]] for p in {c.payload for c in results.cells}}
    shown: set[tuple[int, int]] = set()
    for n, payloads in by_workers.items():
        if len(payloads) > 1 or len(workers) == 1:
            shown |= {(n, payload) for payload in payloads}
            columns = [(size_name(payload), n, payload) for payload in payloads]
            title = f"{n} worker{'s' if n > 1 else ''}: round trip, µs, p50 / p99, by payload"
            console.print(_times(title, columns, results, titles))
    for payload, counts in sorted(by_payload.items()):
        if any((n, payload) not in shown for n in counts):
            columns = [(f"{n} worker{'s' if n > 1 else ''}", n, payload) for n in counts]
            title = f"{size_name(payload)}: round trip, µs, p50 / p99, by number of workers"
            console.print(_times(title, columns, results, titles))
    if results.growth:
        console.print(_growth(results.growth))
    if results.cells:
        console.print(_cpu(results, titles, idle_seconds))


def _times(title: str, columns: list[tuple[str, int, int]], results: Results, titles: dict[str, str]) -> Table:
    table = Table("contender", "", *(name for name, _, _ in columns), title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for row, name in enumerate(names := _names(results, titles)):
        cells = [results.find(name, n, payload) for _, n, payload in columns]
        texts = [f"{microseconds(c.p50)} / {microseconds(c.p99)}" if c else "" for c in cells]
        last_of_its_kind = row + 1 < len(names) and _kind(names[row + 1]) != _kind(name)
        table.add_row(name, titles[name], *texts, end_section=last_of_its_kind)
    return table


def _names(results: Results, titles: dict[str, str]) -> list[str]:
    measured = {cell.contender for cell in results.cells}
    return [name for name in titles if name in measured]


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _growth(cells: list[Cell]) -> Table:
    table = Table("workers", "p50", "p99", "p50 / p50(1)", "p50 per worker", title_justify="left")
    table.title = f"direct-unix, {size_name(cells[0].payload)}: round trip, µs, as workers grow"
    for column in table.columns:
        column.justify = "right"
    for cell in cells:
        table.add_row(
            str(cell.workers),
            microseconds(cell.p50),
            microseconds(cell.p99),
            f"{statistics.median(rounds_ratios(cell, cells[0])):.2f}",
            microseconds(cell.p50 / cell.workers),
        )
    return table


def _cpu(results: Results, titles: dict[str, str], idle_seconds: float) -> Table:
    n, payload = TARGET_WORKERS, TARGET_PAYLOAD
    if not any((c.workers, c.payload) == (n, payload) for c in results.cells):
        n, payload = results.cells[0].workers, results.cells[0].payload
    table = Table(
        "contender", "driver", "workers", "Ray's daemons", "idle driver", "idle workers", "idle daemons",
        title=f"CPU: µs per call with {n} workers and {size_name(payload)}; seconds in {idle_seconds:g} s idle",
        title_justify="left",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name in _names(results, titles):
        cell, idle = results.find(name, n, payload), results.idle.get(name)
        calls = cell.cpu_per_call if cell else None
        table.add_row(name, *_three(calls, microseconds, name), *_three(idle, "{:.2f}".format, name))
    return table


def _three(used: CpuSeconds | None, show: Callable[[float], str], name: str) -> list[str]:
    if used is None:
        return ["", "", ""]
    return [show(used.driver), show(used.workers), show(used.daemons) if "ray" in name else ""]


def print_targets(console: Console, found: Iterable[Target]) -> None:
    title = f"targets: {TARGET_WORKERS} workers, {size_name(TARGET_PAYLOAD)}; medians of the rounds' ratios"
    table = Table("", "measured", "rounds", "at most", "", title=title, title_justify="left")
    for column in table.columns[1:4]:
        column.justify = "right"
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not measured[/]"}
    for target in found:
        value = "" if target.value is None else f"{target.value:.2f}"
        spread = "" if target.spread is None else "{:.2f} to {:.2f}".format(*target.spread)
        table.add_row(target.what, value, spread, f"{target.bound:g}", words[target.met])
    console.print(table)

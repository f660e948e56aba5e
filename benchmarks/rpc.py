"""The round trip of a no-op call to all workers: ours, Ray's, vLLM's, and bare sockets, interleaved in one run.

    python benchmarks/rpc.py [--vllm-python .venv-vllm/bin/python] [--matrix cross|full|none] [--growth] [--json FILE]

Each contender is a process with workers of its own (``rpc_child.py``). For each number of workers all contenders are
started; then, payload by payload, every round has each of them run one short burst of calls, in an order that changes
from round to round. p50 and p99 are taken of each burst, figures are medians over the rounds, and ratios are medians of
the rounds' ratios. README.md says what the contenders are.
"""

from __future__ import annotations

import contextlib
import enum
import fnmatch
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rpc_process import (
    ContenderFailed,
    ContenderProcess,
    RayCluster,
    describe_machine,
    print_machine,
    raise_interrupt,
    undisturbed,
    write_secrets,
)  # fmt: skip
from rpc_report import Cell, Results, print_results, print_targets, size_name, targets

VERSIONS = ("lightvllm", "grpcio", "ray", "msgspec", "cloudpickle", "psutil")


@dataclass(frozen=True)
class Entry:
    """A contender of the catalogue: what its child is told, and whether its idle workers must be stopped."""

    title: str
    spec: dict[str, Any]
    ours: bool = False
    freeze: bool = False

    @property
    def needs_ray(self) -> bool:
        return "ray" in (self.spec["kind"], self.spec.get("backend"))

    @property
    def needs_vllm(self) -> bool:
        return bool(self.spec["kind"] == "vllm")


def _ours(title: str, backend: str, graph: bool = False, **spec: str) -> Entry:
    return Entry(title, {"kind": "lightvllm", "backend": backend, "graph": graph, **spec}, ours=True)


_SOCKETS = {"unix": "Unix socket", "tcp": "TCP", "tls": "TCP, mutual TLS"}

CATALOGUE: dict[str, Entry] = {
    "inprocess": _ours("our executor, threads of one process", "inprocess"),
    **{
        f"{kind}-{carrier}": _ours(f"our executor, {kind}, {name}", "k8s", transport=kind, carrier=carrier)
        for kind in ("direct", "grpc")
        for carrier, name in _SOCKETS.items()
    },
    "executor-ray": _ours("our executor on Ray", "ray"),
    "graph-k8s": _ours("our compiled graph, direct, Unix socket", "k8s", True, transport="direct", carrier="unix"),
    "graph-ray": _ours("our compiled graph on Ray", "ray", True),
    "ray-actor": Entry("Ray: actor calls and ray.get", {"kind": "ray", "carrier": "actor"}),
    "ray-graph": Entry("Ray: compiled graph", {"kind": "ray", "carrier": "graph"}, freeze=True),
    "vllm-shm": Entry("vLLM: MessageQueue, shared memory", {"kind": "vllm", "carrier": "shm"}, freeze=True),
    "vllm-tcp": Entry("vLLM: MessageQueue, ZMQ over TCP", {"kind": "vllm", "carrier": "tcp"}),
    **{
        f"socket-{carrier}": Entry(f"bare socket, {name}", {"kind": "floor", "carrier": carrier})
        for carrier, name in _SOCKETS.items()
    },
    "socket-grpc": Entry("bare gRPC unary, Unix socket", {"kind": "floor", "carrier": "grpc"}),
}
GROWTH_CONTENDER, GROWTH_COUNTS, GROWTH_PAYLOAD = "direct-unix", (1, 2, 4, 8, 16, 32, 64), 1024


_FILE_WIDTH = 120  # of tables that go into a file


class Matrix(enum.StrEnum):
    cross = "cross"
    full = "full"
    none = "none"


@dataclass
class Bench:
    """The settings of a run, and what its contenders share."""

    console: Console
    folder: Path
    python: str
    vllm_python: str | None
    rounds: int
    seconds: float
    least: int
    most: int
    warm: int
    idle_seconds: float
    debug: bool
    cluster: RayCluster | None = None
    results: Results = field(default_factory=Results)
    about: dict[str, str] = field(default_factory=dict)
    _order: random.Random = field(default_factory=lambda: random.Random(0))

    @contextlib.contextmanager
    def contenders(self, wanted: Sequence[tuple[str, str, int]]) -> Iterator[dict[str, ContenderProcess]]:
        """Start ``(key, name, workers)`` each, and end them all."""
        running: dict[str, ContenderProcess] = {}
        try:
            if self.cluster is not None:
                self.cluster.find_daemons()
            for key, name, workers in wanted:
                with self.console.status(f"starting {name} with {workers} worker{'s' if workers > 1 else ''}"):
                    running[key] = self._start(name, workers)
                    running[key].wait_ready()
                    self.about[name] = running[key].about
            yield running
        finally:
            with undisturbed(), self.console.status("ending the contenders"):
                for contender in running.values():
                    contender.hang_up()
                for contender in running.values():
                    contender.close()

    def _start(self, name: str, workers: int) -> ContenderProcess:
        entry = CATALOGUE[name]
        spec = entry.spec | {"world_size": workers, "folder": str(self.folder)}
        if entry.needs_ray and self.cluster is not None:
            # The cluster ends with this process, and Ray would go on looking for it: so is the contender to end.
            spec |= {"address": self.cluster.address, "temp_dir": self.cluster.temp_dir, "parent": os.getpid()}
        python = self.vllm_python if entry.needs_vllm and self.vllm_python else self.python
        return ContenderProcess(
            name,
            spec,
            python,
            freeze=entry.freeze,
            cluster=self.cluster if entry.needs_ray else None,
            debug=self.debug,
        )

    def run_rounds(self, what: str, cells: dict[str, Cell], running: dict[str, ContenderProcess]) -> None:
        order = list(cells)
        with self.console.status(what) as status:
            for number in range(self.rounds):
                self._order.shuffle(order)
                for key in order:
                    status.update(f"{what}, round {number + 1} of {self.rounds}: {cells[key].contender}")
                    payload = cells[key].payload
                    cells[key].add(*running[key].burst(payload, self.seconds, self.least, self.most, self.warm))

    def measure(self, names: Sequence[str], workers: int, payloads: Sequence[int], idle: bool) -> None:
        """All cells with this number of workers; ``idle``: the idle CPU time, too."""
        with self.contenders([(name, name, workers) for name in names]) as running:
            for payload in payloads:
                cells = {name: Cell(name, workers, payload) for name in names}
                self.run_rounds(f"{workers} workers, {size_name(payload)}", cells, running)
                self.results.cells.extend(cells.values())
            if idle:
                self._measure_idle(running)

    def _measure_idle(self, running: dict[str, ContenderProcess]) -> None:
        """Each contender runs a burst and is then left alone, the windows of all overlapping."""
        begun = {}
        with self.console.status(f"{self.idle_seconds:g} s idle"):
            for name, contender in running.items():
                contender.burst(0, 0.0, self.warm, self.warm, self.warm)
                contender.thaw()
                begun[name] = (time.monotonic(), contender.cpu_seconds())
            for name, contender in running.items():
                since, before = begun[name]
                time.sleep(max(0.0, since + self.idle_seconds - time.monotonic()))
                self.results.idle[name] = contender.cpu_seconds() - before
                contender.freeze()

    def measure_growth(self, counts: Sequence[int]) -> None:
        with self.contenders([(str(n), GROWTH_CONTENDER, n) for n in counts]) as running:
            cells = {str(n): Cell(GROWTH_CONTENDER, n, GROWTH_PAYLOAD) for n in counts}
            self.run_rounds("growth", cells, running)
            self.results.growth.extend(cells.values())


# ----------------------------------------------------------------------------------------------- options


def _numbers(text: str, option: str, parse: Callable[[str], int]) -> list[int]:
    try:
        return sorted({parse(part.strip()) for part in text.split(",")})
    except ValueError as error:
        raise typer.BadParameter(f"{error} in {text!r}", param_hint=option) from None


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise ValueError(f"{text!r} is no number of workers from 1 to 256")
    return int(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*(?:(k|m)(?:ib)?|b)?", text.lower())
    if found is None:
        raise ValueError(f"{text!r} is no number of bytes such as 0, 1KiB or 1MiB")
    size = int(found[1]) * {"k": 2**10, "m": 2**20}.get(found[2] or "", 1)
    if size > 64 * 2**20:
        raise ValueError(f"{text!r} is more than 64MiB")
    return size


def _choose(patterns: str, vllm_python: Path | None, console: Console) -> list[str]:
    chosen: list[str] = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matching = fnmatch.filter(CATALOGUE, pattern)
        if not matching:
            raise typer.BadParameter(
                f"{pattern!r} matches no contender; there are {', '.join(CATALOGUE)}", param_hint="--contenders"
            )
        chosen += matching
    names = [name for name in CATALOGUE if name in chosen]
    if left_out := [name for name in names if CATALOGUE[name].needs_vllm and vllm_python is None]:
        console.print(f"[yellow]left out: {', '.join(left_out)}; they need --vllm-python (see install_vllm.py)[/]")
    return [name for name in names if name not in left_out]


def main(
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Interpreter of an environment with vLLM; without it vLLM takes no part."
        ),
    ] = None,
    matrix: Annotated[
        Matrix,
        typer.Option(
            help="cross: every payload with 2 workers, every number of workers with 1 KiB (or with the first that is "
            "given); full: every payload with every number; none: only --growth."
        ),
    ] = Matrix.cross,
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "1,2,4,8",
    payloads: Annotated[str, typer.Option(help="Payloads, bytes; KiB and MiB are known.")] = "0,1KiB,64KiB,1MiB",
    contenders: Annotated[str, typer.Option(help="Names or patterns, comma-separated; --list shows them.")] = "*",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 9,
    burst: Annotated[float, typer.Option(min=0.01, max=60, help="Seconds of one burst.")] = 0.2,
    least: Annotated[int, typer.Option(min=1, help="Counted calls of a burst at least.")] = 100,
    most: Annotated[int, typer.Option(min=1, help="Counted calls of a burst at most.")] = 5000,
    warm: Annotated[int, typer.Option(min=1, help="Calls before them that are not counted.")] = 10,
    idle: Annotated[float, typer.Option(min=0, help="Seconds to measure idle CPU time for; 0 leaves it out.")] = 10.0,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also measure direct-unix with 1, 2, 4 … 64 workers and 1 KiB.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write everything that was measured.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show what the contenders print.")] = False,
    list_contenders: Annotated[bool, typer.Option("--list", help="List the contenders and end.")] = False,
) -> None:
    """Round trips of no-op calls to N workers, all contenders interleaved in one run."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    if list_contenders:
        for name, entry in CATALOGUE.items():
            console.print(f"{name:<14}{entry.title}")
        return
    if least > most:
        raise typer.BadParameter(f"{least} is more than --most {most}", param_hint="--least")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_file.absolute().parent}", param_hint="--json")
    if matrix is Matrix.none and not growth:
        raise typer.BadParameter("with 'none' there is nothing to do without --growth", param_hint="--matrix")
    counts, sizes = _numbers(workers, "--workers", _count), _numbers(payloads, "--payloads", _size)
    names = _choose(contenders, vllm_python, console) if matrix is not Matrix.none else []
    if matrix is not Matrix.none and not names:
        raise typer.BadParameter("no contender is left", param_hint="--contenders")
    signal.signal(signal.SIGTERM, raise_interrupt)
    machine = describe_machine(VERSIONS)
    print_machine(console, machine)
    begun, status = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="lightvllm-rpc-") as folder:
        write_secrets(Path(folder))
        bench = Bench(
            console, Path(folder), _own_python(), str(vllm_python.absolute()) if vllm_python else None,
            rounds, burst, least, most, warm, idle, debug,
        )  # fmt: skip
        try:
            if any(CATALOGUE[name].needs_ray for name in names):
                with console.status("starting Ray"):
                    bench.cluster = RayCluster()
            for count, row in _plan(matrix, counts, sizes).items():
                bench.measure(names, count, row, idle > 0 and count == _main_of(counts, 2))
            if growth:
                bench.measure_growth(GROWTH_COUNTS)
        except ContenderFailed as failure:
            console.print("[red]error:[/]", escape(str(failure)))
            status = 1
        except KeyboardInterrupt:
            console.print("[yellow]interrupted; what had been measured completely until then:[/]")
            status = 130
        finally:
            with undisturbed():
                if bench.cluster is not None:
                    bench.cluster.close()
    ours = [name for name in names if CATALOGUE[name].ours]
    if status and not bench.results.cells:
        raise typer.Exit(status)
    found = targets(bench.results, ours, idle)
    print_results(console, bench.results, {name: CATALOGUE[name].title for name in names}, idle)
    print_targets(console, found)
    console.print(f"{time.monotonic() - begun:.0f} s; {rounds} rounds of bursts of {burst:g} s")
    if json_file is not None:
        document = {
            "machine": machine,
            "settings": {
                "rounds": rounds, "burst_seconds": burst, "least": least, "most": most, "warm": warm,
                "idle_seconds": idle,
            },
            "about": {name: about for name, about in bench.about.items() if about},
            "cells": [cell.as_json() for cell in bench.results.cells],
            "growth": [cell.as_json() for cell in bench.results.growth],
            "idle_cpu_seconds": {name: vars(used) for name, used in bench.results.idle.items()},
            "targets": [vars(target) | {"met": target.met} for target in found],
        }  # fmt: skip
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    if status:
        raise typer.Exit(status)


def _own_python() -> str:
    import sys

    return sys.executable


def _main_of(values: Sequence[int], wanted: int) -> int:
    return wanted if wanted in values else values[0]


def _plan(matrix: Matrix, counts: list[int], sizes: list[int]) -> dict[int, list[int]]:
    """The payloads to measure for each number of workers."""
    if matrix is Matrix.none:
        return {}
    count, size = _main_of(counts, 2), _main_of(sizes, 1024)
    return {n: sizes if matrix is Matrix.full or n == count else [size] for n in counts}


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()

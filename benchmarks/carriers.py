"""The choices in the wire's design, each against its alternatives, interleaved in one run.

    python benchmarks/carriers.py [--only spin,grpc] [--rounds 9] [--burst 0.1] [--json FILE]
    python benchmarks/carriers.py --list

Each group has the chosen way, made of the package's own parts, and contenders that differ from it in the one thing that
the group is about (``rpc_frames.py``, ``rpc_streams.py``, ``rpc_encoding.py``). Of a group all contenders are started;
then every round has each of them run one short burst of round trips to all workers, in an order that changes from round
to round. p50 and p99 are taken of each burst, figures are medians over the rounds, and a ratio is the median of the
rounds' ratios of p50 to the chosen way's.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rpc import VERSIONS, Bench, _print_machine, _terminated
from rpc_process import ContenderFailed, ContenderProcess, describe_machine
from rpc_report import Cell, microseconds, rounds_ratios, size_name

from lightvllm.backends.k8s.wire import PIECE_BYTES
from lightvllm.transfer.frames import SPIN_SECONDS

WORKERS, PAYLOAD = 2, 2**10
_FILE_WIDTH = 120  # of tables that go into a file


@dataclass(frozen=True)
class Point:
    """What all contenders of a group are measured with. ``spec``: what all of them are told besides."""

    workers: int = WORKERS
    payload: int = PAYLOAD
    spec: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def title(self) -> str:
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}" if self.workers else "one process"
        return f"{workers}, {self.name or size_name(self.payload)}"


@dataclass(frozen=True)
class Group:
    """Alternatives by name, each with what it is told; the first is the chosen way. ``kind`` names their module."""

    title: str
    kind: str
    ways: dict[str, dict[str, Any]]
    points: tuple[Point, ...] = (Point(),)

    @property
    def chosen(self) -> str:
        return next(iter(self.ways))


def _spins() -> dict[str, dict[str, Any]]:
    chosen = round(1e6 * SPIN_SECONDS)
    ways: dict[str, dict[str, Any]] = {f"{chosen} µs on both sides": {}}
    for spin in (0, 20, 50, 100, 200):
        if spin != chosen:
            worker, driver = {"worker_spin": spin / 1e6}, {"driver_spin": spin / 1e6}
            ways[f"{spin} µs on both sides"] = worker | driver
            ways[f"{spin} µs at the workers, {chosen} µs at the driver"] = worker
            ways[f"{chosen} µs at the workers, {spin} µs at the driver"] = driver
    return ways


def _pieces(payload: int) -> dict[str, dict[str, Any]]:
    sizes = [PIECE_BYTES, *(size for size in (2**16, 2**18, 2**20, 2**22) if size != PIECE_BYTES)]
    return {f"pieces of {size_name(size)}": {"piece": size} for size in sizes} | {"whole": {"piece": payload}}


def _steps() -> Iterator[Point]:
    for workers, (sequences, prompt) in itertools.product((WORKERS, 0), ((16, 0), (256, 0), (4, 1024))):
        name = f"{sequences} prompts of {prompt} tokens" if prompt else f"{sequences} sequences, a token each"
        yield Point(workers, 0, {"sequences": sequences, "prompt_tokens": prompt}, name)


_LARGE = 16 * 2**20


def groups(crowd: int) -> dict[str, Group]:
    """``crowd``: workers where there are to be more processes than cores."""
    return {
        "spin": Group("busy-polling before blocking", "frames", _spins(), (Point(), Point(workers=crowd))),
        "reader": Group(
            "who reads the replies at the driver",
            "frames",
            {
                "the waiting thread (Reactor.wait)": {},
                "the waiting thread, without spinning": {"driver_spin": 0.0},
                "the reactor's thread, Future.result": {"reader": "result"},
                "the reactor's thread, futures.wait": {"reader": "wait"},
                "a thread per worker": {"reader": "threads"},
                "a thread per worker, without spinning": {"reader": "threads", "driver_spin": 0.0},
            },
        ),
        "worker": Group(
            "how a worker reads",
            "frames",
            {
                "non-blocking recv and poll": {},
                "non-blocking recv and poll, without spinning": {"worker_spin": 0.0},
                "blocking recv": {"worker": "blocking"},
                "asyncio streams": {"worker": "asyncio"},
            },
        ),
        "writes": Group(
            "how the driver writes header and payload",
            "frames",
            {
                "joined up to the threshold, else sendmsg": {},
                "joined": {"write": "joined"},
                "sendmsg of two pieces": {"write": "sendmsg"},
                "two sends": {"write": "two"},
            },
            tuple(Point(payload=size) for size in (2**10, 2**15, 2**18, 2**20)),
        ),
        "nodelay": Group(
            "TCP_NODELAY, on both sides",
            "frames",
            {
                "on": {},
                "off": {"nodelay": False},
                "on, header and payload in two sends": {"write": "two"},
                "off, header and payload in two sends": {"write": "two", "nodelay": False},
            },
            tuple(Point(payload=size, spec={"carrier": "tcp"}) for size in (2**10, 2**18)),
        ),
        "grpc": Group(
            "gRPC's bidirectional stream",
            "streams",
            {
                "in the handler's thread, bytes encoded once": {},
                "replies yielded by a generator": {"server": "generator"},
                "handed over to another thread": {"server": "thread"},
                "bytes encoded once per worker": {"messages": "each"},
                "protobuf classes, left to gRPC": {"messages": "classes"},
                "grpc.aio server": {"server": "aio"},
            },
        ),
        "pieces": Group(
            "pieces of a payload on gRPC's stream",
            "streams",
            _pieces(_LARGE),
            # What comes in pieces is encoded once per worker (CallEncoder), and so must be what comes whole.
            (Point(payload=_LARGE, spec={"messages": "each"}),),
        ),
        "encoding": Group(
            "a step's input and output",
            "encoding",
            {"typed (msgspec)": {"encoding": "typed"}, "pickled (cloudpickle)": {"encoding": "pickled"}},
            tuple(_steps()),
        ),
    }


class Carriers(Bench):
    """``rpc.py``'s way of starting contenders and of running rounds, with other contenders."""

    group: Group
    point: Point

    def _start(self, name: str, workers: int) -> ContenderProcess:
        told = {"kind": self.group.kind, "world_size": workers, "folder": str(self.folder)}
        spec = told | self.point.spec | self.group.ways[name]
        return ContenderProcess(name, spec, self.python, freeze=False, cluster=None, debug=self.debug)

    def measure_group(self, group: Group) -> list[tuple[Point, list[Cell]]]:
        """The cells of every point, in the order of the group's ways."""
        self.group = group
        measured = []
        together = itertools.groupby(group.points, lambda point: (point.workers, point.spec))
        for (workers, _), points in together:  # these differ in nothing that a contender is started with
            self.point, *others = points
            with self.contenders([(way, way, workers) for way in group.ways]) as running:
                for point in (self.point, *others):
                    cells = {way: Cell(way, workers, point.payload) for way in group.ways}
                    self.run_rounds(f"{group.title}: {point.title}", cells, running)
                    measured.append((point, list(cells.values())))
        return measured


def table_of(group: Group, measured: list[tuple[Point, list[Cell]]]) -> Table:
    title = f"{group.title}: round trip, and CPU time per call, µs"
    table = Table("", "p50", "p99", "p50 / chosen", "rounds", "CPU driver", "CPU workers", title=title)
    table.title_justify = "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for point, cells in measured:
        chosen = cells[0]
        table.add_row(f"[bold]{point.title}[/]")
        for cell in cells:
            ratios = rounds_ratios(cell, chosen)
            against = "chosen" if cell is chosen else f"{statistics.median(ratios):.2f}"
            spread = "" if cell is chosen else f"{min(ratios):.2f} to {max(ratios):.2f}"
            cpu = cell.cpu_per_call
            used = (microseconds(cpu.driver), microseconds(cpu.workers) if cell.workers else "")
            table.add_row(
                cell.contender, microseconds(cell.p50), microseconds(cell.p99), against, spread, *used,
                end_section=cell is cells[-1],
            )  # fmt: skip
    return table


def _as_json(point: Point, cells: list[Cell]) -> dict[str, Any]:
    return {
        "point": point.title,
        "cells": [cell.as_json() | {"ratio": statistics.median(rounds_ratios(cell, cells[0]))} for cell in cells],
    }


def _choose(only: str | None, catalogue: dict[str, Group]) -> list[str]:
    if only is None:
        return list(catalogue)
    wanted = {part.strip() for part in only.split(",")} - {""}
    if not wanted or (unknown := wanted - set(catalogue)):
        got = ", ".join(sorted(unknown)) if wanted else only
        raise typer.BadParameter(f"{got!r} is no group; there are {', '.join(catalogue)}", param_hint="--only")
    return [name for name in catalogue if name in wanted]


def main(
    only: Annotated[str | None, typer.Option(help="Groups, comma-separated; --list shows them.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 9,
    burst: Annotated[float, typer.Option(min=0.01, max=60, help="Seconds of one burst.")] = 0.1,
    least: Annotated[int, typer.Option(min=1, help="Counted calls of a burst at least.")] = 20,
    warm: Annotated[int, typer.Option(min=1, help="Calls before them that are not counted.")] = 10,
    crowd: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Workers for 'spin' with more processes than cores; default: cores, at least 4."
        ),
    ] = min(64, max(4, len(os.sched_getaffinity(0)))),
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write everything that was measured.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show what the contenders print.")] = False,
    list_groups: Annotated[bool, typer.Option("--list", help="List groups and contenders and end.")] = False,
) -> None:
    """The choices in the wire's design, each against its alternatives, interleaved."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    catalogue = groups(crowd)
    names = _choose(only, catalogue)
    if list_groups:
        for name in names:
            console.print(f"[bold]{name}[/]: {catalogue[name].title}")
            for way in catalogue[name].ways:
                console.print(f"    {way}{' (chosen)' if way == catalogue[name].chosen else ''}")
        return
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_file.absolute().parent}", param_hint="--json")
    signal.signal(signal.SIGTERM, _terminated)
    machine = describe_machine(VERSIONS)
    _print_machine(console, machine)
    begun = time.monotonic()
    document: dict[str, Any] = {
        "machine": machine,
        "settings": {"rounds": rounds, "burst_seconds": burst, "least": least, "warm": warm},
        "groups": {},
    }
    with tempfile.TemporaryDirectory(prefix="lightvllm-carriers-") as folder:
        bench = Carriers(
            console, Path(folder), sys.executable, None, rounds, burst, least, sys.maxsize, warm, 0.0, debug
        )
        try:
            for name in names:
                measured = bench.measure_group(catalogue[name])
                console.print(table_of(catalogue[name], measured))
                document["groups"][name] = [_as_json(point, cells) for point, cells in measured]
                if json_file is not None:  # now, in case that a later group fails
                    json_file.write_text(json.dumps(document, indent=1) + "\n")
        except ContenderFailed as failure:
            console.print(f"[red]error:[/] {failure}")
            raise typer.Exit(1) from None
    console.print(f"{time.monotonic() - begun:.0f} s; {rounds} rounds of bursts of {burst:g} s")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()

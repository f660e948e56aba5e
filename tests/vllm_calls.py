"""Callables that the tests have vLLM's workers run, by `collective_rpc`. Workers import this module."""

from __future__ import annotations

import os
import time
from typing import Any


def who(worker: Any) -> dict[str, Any]:
    """Which worker this is, as itself sees it."""
    return {
        "pid": os.getpid(),
        "rank": worker.rank,
        "local_rank": worker.local_rank,
        "driver": worker.is_driver_worker,
        "class": type(worker).__name__,
    }


def add(worker: Any, left: int, right: int) -> list[int]:
    return [worker.rank, left + right]


def copied(worker: Any, data: bytes) -> bytes:
    return data


def doze(worker: Any, seconds: float) -> None:
    time.sleep(seconds)


def fail_on(worker: Any, rank: int) -> int:
    if worker.rank == rank:
        raise ValueError(f"rank {rank} will not")
    return int(worker.rank)


def samples_later(worker: Any) -> bool:
    """Whether a step's tokens are handed over by an ``AsyncModelRunnerOutput``."""
    return bool(worker.worker.model_runner.use_async_scheduling)

"""What a worker does before it imports vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightvllm.adapters.vllm import worker

MARKED = "VLLM_OMP_NUM_THREADS_SET_BY_VLLM"


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "3200000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
@pytest.mark.usefixtures("eight_cpus")
def test_cpus_within_a_containers_quota(files: dict[str, str], cpus: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert worker.usable_cpus(str(tmp_path)) == cpus


@pytest.mark.parametrize(
    ("own", "sharing", "threads", "marked"),
    [(None, 4, "2", "1"), (None, 16, "1", "1"), (None, 0, None, None), ("3", 4, "3", None)],
)
def test_workers_of_a_host_divide_its_cpus_unless_they_were_told(
    monkeypatch: pytest.MonkeyPatch, own: str | None, sharing: int, threads: str | None, marked: str | None
) -> None:
    monkeypatch.setattr(worker, "usable_cpus", lambda: 8)
    monkeypatch.setattr(os, "environ", {} if own is None else {"OMP_NUM_THREADS": own})
    worker.VllmWorker().prepare({"CUDA_VISIBLE_DEVICES": "0,1"}, sharing)
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert os.environ.get(MARKED) == marked
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"

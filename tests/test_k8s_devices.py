"""GPUs that are seen, and how local workers share them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightvllm.backends.k8s.devices import deal_gpus, own_gpus, visible_gpus
from lightvllm.errors import PlacementError


@pytest.mark.parametrize(
    ("declared", "seen"), [("", []), ("-1", []), ("2, 0", ["2", "0"]), ("GPU-5ebe,GPU-1f", ["GPU-5ebe", "GPU-1f"])]
)
def test_the_environment_counts(declared: str, seen: list[str], tmp_path: Path) -> None:
    (tmp_path / "nvidia7").touch()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": declared}, str(tmp_path)) == seen


def test_else_the_device_files_count(tmp_path: Path) -> None:
    for name in ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, str(tmp_path)) == ["2", "10"]


def test_amds_are_render_nodes_beside_rocms_own_device(tmp_path: Path) -> None:
    (tmp_path / "dri").mkdir()
    for name in ("card0", "card1", "renderD129", "renderD128", "by-path"):
        (tmp_path / "dri" / name).touch()
    assert visible_gpus({}, str(tmp_path)) == []  # graphics alone
    (tmp_path / "kfd").touch()
    assert visible_gpus({}, str(tmp_path)) == ["0", "1"]


def test_local_workers_are_dealt_what_cuda_knows_by_that_number(tmp_path: Path) -> None:
    for name in ("nvidia6", "nvidia7", "nvidiactl"):  # a container with the last two of a host's eight
        (tmp_path / name).touch()
    assert own_gpus({}, str(tmp_path)) == ["0", "1"]
    assert own_gpus({"CUDA_VISIBLE_DEVICES": "7,6"}, str(tmp_path)) == ["7", "6"]


def test_each_worker_gets_its_own() -> None:
    assert deal_gpus(["4", "5", "6"], 3, 1) == [["4"], ["5"], ["6"]]
    assert deal_gpus(["0", "1", "2", "3", "4"], 2, 2) == [["0", "1"], ["2", "3"]]
    assert deal_gpus([], 2, 0) == [[], []]


def test_too_few_are_counted() -> None:
    with pytest.raises(PlacementError, match=r"0 of 2 workers: 4 GPUs are needed \(2 each\), this machine has 1 \(7\)"):
        deal_gpus(["7"], 2, 2)

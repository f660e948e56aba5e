"""Which GPU each of vLLM's workers takes."""

from __future__ import annotations

import pytest

from lightvllm.adapters.vllm.devices import shared_devices
from lightvllm.backends.base import WorkerRef
from lightvllm.errors import PlacementError


def workers(*seen: tuple[str, str]) -> list[WorkerRef]:
    """``(node, devices by comma)`` of each."""
    return [
        WorkerRef(id=f"w{i}", node=node, device_ids=tuple(filter(None, devices.split(","))), index=i)
        for i, (node, devices) in enumerate(seen)
    ]


@pytest.mark.parametrize(
    ("seen", "indices", "visible"),
    [
        ([("pod-0", "0,1"), ("pod-0", "0,1")], [0, 1], [None, None]),  # a pod's workers, who see all that it has
        ([("pod-0", "6,7"), ("pod-0", "6,7")], [0, 1], [None, None]),  # the host's numbers: CUDA calls them 0 and 1
        ([("pod-0", "1,0"), ("pod-0", "1,0")], [0, 1], [None, None]),  # in the order of the variable
        ([("pod-0", "0"), ("pod-1", "0")], [0, 0], [None, None]),  # one GPU to a pod
        ([("a", "0,1"), ("b", "4,5"), ("a", "0,1"), ("b", "4,5")], [0, 0, 1, 1], [None] * 4),
        ([("a", "0"), ("b", "4,5"), ("a", "1"), ("b", "4,5")], [0, 0, 1, 1], ["0,1", None, "0,1", None]),
        ([("a", "GPU-b"), ("a", "GPU-a")], [1, 0], ["GPU-a,GPU-b"] * 2),
        ([("a", "0,1,2,3")], [0], [None]),
    ],
)
def test_workers_of_a_node_see_each_others_devices_and_take_their_own(
    seen: list[tuple[str, str]], indices: list[int], visible: list[str | None]
) -> None:
    assert shared_devices(workers(*seen), dealt=False) == (indices, visible)


@pytest.mark.parametrize(
    ("given", "indices", "visible"),
    [
        ([("a", "3"), ("a", "10"), ("a", "2")], [1, 2, 0], ["2,3,10"] * 3),
        ([("a", "3"), ("b", "0")], [0, 0], ["3", "0"]),  # Ray may have been told to leave the variable alone
    ],
)
def test_devices_that_were_dealt_are_always_set(
    given: list[tuple[str, str]], indices: list[int], visible: list[str | None]
) -> None:
    assert shared_devices(workers(*given), dealt=True) == (indices, visible)


@pytest.mark.parametrize("seen", [[("a", "0"), ("a", "0")], [("a", "")]])
def test_too_few_devices_are_an_error_that_names_the_worker(seen: list[tuple[str, str]]) -> None:
    last = len(seen) - 1
    with pytest.raises(PlacementError, match=rf"w{last} \(rank {last}\) has no GPU of its own on a: it sees (0|none)"):
        shared_devices(workers(*seen), dealt=False)

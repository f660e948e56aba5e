"""Dealing ranks: TP groups stay on one node, the driver's node is first, the order of the workers does not matter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightvllm.backends.base import WorkerRef
from lightvllm.errors import PlacementError
from lightvllm.executors.ranks import deal_ranks, device_indices, local_ranks


def refs(nodes: str) -> list[WorkerRef]:
    return [WorkerRef(f"w{i}", node, index=i) for i, node in enumerate(nodes)]


def nodes_of(ranked: list[WorkerRef]) -> str:
    return "".join(worker.node for worker in ranked)


@pytest.mark.parametrize(
    ("nodes", "tp", "driver", "expected"),
    [
        ("ab", 1, "b", "ba"),  # the driver's node first
        ("abab", 2, "b", "bbaa"),  # interleaved placement, groups made whole
        ("aabb", 2, "", "aabb"),
        ("aaabbb", 2, "a", "aabbab"),  # three per node: two whole groups, and one that has to span
        ("abcd", 2, "c", "cabd"),
    ],
)
def test_order(nodes: str, tp: int, driver: str, expected: str) -> None:
    assert nodes_of(deal_ranks(refs(nodes), tp, len(nodes) // tp, driver)) == expected


@given(
    nodes=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12),
    tp=st.sampled_from([1, 2, 3, 4]),
    driver=st.sampled_from("abcdx"),
    data=st.data(),
)
def test_properties(nodes: list[str], tp: int, driver: str, data: st.DataObject) -> None:
    nodes = nodes[: len(nodes) - len(nodes) % tp] or nodes[:1] * tp
    workers = refs("".join(nodes))
    ranked = deal_ranks(workers, tp, len(workers) // tp, driver)
    assert sorted(worker.id for worker in ranked) == sorted(worker.id for worker in workers)
    groups = [ranked[i : i + tp] for i in range(0, len(ranked), tp)]
    split = sum(len({worker.node for worker in group}) > 1 for group in groups)
    whole_possible = sum(nodes.count(node) // tp for node in set(nodes))
    assert len(groups) - split >= whole_possible
    if nodes.count(driver) >= tp:
        assert ranked[0].node == driver
    shuffled = data.draw(st.permutations(workers))
    assert deal_ranks(shuffled, tp, len(workers) // tp, driver) == ranked


def test_wrong_number_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"3 workers were placed .* expected 4"):
        deal_ranks(refs("aaa"), 2, 2)


def test_local_ranks() -> None:
    assert local_ranks(refs("aabab")) == [(0, 3), (1, 3), (0, 2), (2, 3), (1, 2)]


def test_device_indices() -> None:
    pod = [WorkerRef(f"p{i}", "a", device_ids=("0", "1"), index=i) for i in range(2)]
    actors = [WorkerRef(f"r{i}", "a", device_ids=(str(i),), index=i) for i in range(2)]
    assert device_indices(pod) == [0, 1]
    assert device_indices(actors) == [0, 0]
    assert device_indices([*pod, WorkerRef("q0", "b", device_ids=("0", "1"))]) == [0, 1, 0]


def test_no_gpu_is_taken_by_two_though_they_see_different_ones() -> None:
    def indices(*seen: str) -> list[int]:
        return device_indices([WorkerRef(f"w{i}", "a", device_ids=tuple(ids)) for i, ids in enumerate(seen)])

    assert indices("0", "01") == [0, 1]
    assert indices("01", "12", "12") == [0, 0, 1]
    assert indices("01", "10") == [0, 0]


def test_a_worker_for_which_no_gpu_is_left_gets_an_index_that_there_is_not() -> None:
    pod = [WorkerRef(f"p{i}", "a", device_ids=("0", "1")) for i in range(3)]
    assert device_indices(pod) == [0, 1, 2]
    assert device_indices([WorkerRef(f"c{i}", "a") for i in range(2)]) == [0, 0]  # on CPUs nobody asks

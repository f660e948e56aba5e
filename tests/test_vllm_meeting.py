"""Which workers of data-parallel engines cannot find each other."""

from __future__ import annotations

import pytest

from lightvllm.adapters.vllm.meeting import check_meeting
from lightvllm.backends.base import WorkerRef
from lightvllm.errors import ConfigError


def workers(*nodes: str) -> list[WorkerRef]:
    return [WorkerRef(id=f"w{i}", node=node, index=i) for i, node in enumerate(nodes)]


@pytest.mark.parametrize(
    ("nodes", "address", "dp_rank"),
    [
        ("a a", "127.0.0.1", 0),
        ("a a", "127.0.0.1", 1),
        ("a b", "10.0.0.1", 0),
        ("b b", "10.0.0.1", 1),
        ("b b", "llm-0.llm-headless", 1),
    ],
)
def test_they_meet(nodes: str, address: str, dp_rank: int) -> None:
    check_meeting(workers(*nodes.split()), "a", address, dp_rank)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_nobody_elsewhere_reaches_a_loopback_address(address: str) -> None:
    with pytest.raises(ConfigError, match=r"meet at .*, but worker w1 is on b; give vLLM --data-parallel-address"):
        check_meeting(workers("a", "b"), "a", address, 1)


def test_the_first_rank_opens_the_port_where_the_others_look_for_it() -> None:
    with pytest.raises(ConfigError, match=r"first engine's own host, a; it is w0 on b: run"):
        check_meeting(workers("b", "b"), "a", "10.0.0.1", 0)

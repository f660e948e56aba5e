"""Which replica a request goes to: stable under changes, bounded in load."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lightvllm.router.balance import capacity, choose, rendezvous

KEYS = [b"conversation %d" % number for number in range(2000)]


@dataclass
class Replica:
    name: str
    load: int = 0


def named(count: int) -> list[Replica]:
    return [Replica(f"10.0.0.{number}:8000") for number in range(count)]


def first(replicas: list[Replica], key: bytes) -> str:
    return rendezvous(replicas, key)[0].name


def test_keys_are_spread_evenly():
    counts = Counter(first(named(5), key) for key in KEYS)
    assert len(counts) == 5
    assert all(abs(count - 400) < 100 for count in counts.values()), counts


def test_only_the_keys_of_a_replica_that_goes_move_and_they_spread():
    replicas = named(5)
    before = {key: first(replicas, key) for key in KEYS}
    gone = replicas.pop(2).name
    after = {key: first(replicas, key) for key in KEYS}
    assert all(after[key] == before[key] for key in KEYS if before[key] != gone)
    assert len({after[key] for key in KEYS if before[key] == gone}) == 4


def test_a_new_replica_takes_its_share_from_all_and_nothing_else_moves():
    before = {key: first(named(4), key) for key in KEYS}
    after = {key: first(named(5), key) for key in KEYS}
    moved = [key for key in KEYS if after[key] != before[key]]
    assert {after[key] for key in moved} == {"10.0.0.4:8000"}
    assert abs(len(moved) / len(KEYS) - 1 / 5) < 0.05


def test_the_order_of_replicas_does_not_matter():
    assert [r.name for r in rendezvous(named(7), b"k")] == [r.name for r in rendezvous(named(7)[::-1], b"k")]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=16) | st.none(),
    st.floats(1, 4),
    st.integers(0, 8),
)
def test_load_stays_bounded(loads, key, factor, slack):
    replicas = [Replica(str(number), load) for number, load in enumerate(loads)]
    chosen = choose(replicas, key, factor, slack)
    assert chosen in replicas
    if len(replicas) > 1:
        most = capacity(sum(loads), len(loads), factor, slack)
        assert chosen.load < most or chosen.load == min(loads)
        assert most >= math.ceil((sum(loads) + 1) / len(loads)), "somebody is always below it"
    if key is None:
        assert chosen.load == min(loads)


def test_one_conversation_overflows_in_order_and_the_bound_holds():
    replicas = named(4)
    order = [replica.name for replica in rendezvous(replicas, b"popular")]
    for _ in range(400):
        choose(replicas, b"popular", 1.25, 4).load += 1
    loads = {replica.name: replica.load for replica in replicas}
    assert max(loads.values()) <= math.ceil(1.25 * 400 / 4)
    assert [loads[name] for name in order] == sorted(loads.values(), reverse=True)
    assert loads[order[-1]] < loads[order[0]]


def test_a_replica_with_little_to_do_is_never_passed_over():
    replicas = named(50)
    favourite = rendezvous(replicas, b"k")[0]
    for _ in range(4):
        assert choose(replicas, b"k", 1.25, 4) is favourite
        favourite.load += 1
    assert choose(replicas, b"k", 1.25, 4) is not favourite

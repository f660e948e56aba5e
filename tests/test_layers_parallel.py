"""Process groups without global state: several groups in one process, and time-outs that say what happened.

The ranks are threads here: a ``ParallelContext`` owns its groups, so it needs no process of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.layers.parallel import ParallelContext, host_address, join_store, open_store

CPU = torch.device("cpu")
T = TypeVar("T")


def group(tp: int, pp: int, timeout: float = 30, stages: bool = True, host: str = "127.0.0.1") -> list[ParallelContext]:
    store, address = open_store(host, tp * pp)
    local = host == "127.0.0.1"

    def join(rank: int) -> ParallelContext:
        mine = store if rank == 0 else join_store(address, tp * pp)
        return ParallelContext.connect(CPU, rank, tp, pp, mine, timeout, local=local, stages=stages)

    return everywhere(join, list(range(tp * pp)))


def everywhere(action: Callable[..., T], ranks: list[object]) -> list[T]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(action, ranks, timeout=60))


def test_a_world_of_one_has_no_group() -> None:
    alone, x = ParallelContext(CPU), torch.ones(2, 3)
    assert alone.is_first_stage
    assert alone.is_last_stage
    assert alone.all_reduce(x) is x
    assert alone.gather(x) is x
    assert not dist.is_initialized()


def test_ranks_are_stages_of_tensor_ranks() -> None:
    places = [(c.pp_rank, c.tp_rank, c.is_first_stage, c.is_last_stage) for c in group(2, 2)]
    assert places == [(0, 0, True, False), (0, 1, True, False), (1, 0, False, True), (1, 1, False, True)]
    assert not dist.is_initialized()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_collectives_stay_within_their_stage(dtype: torch.dtype) -> None:
    contexts = group(2, 2)

    def work(context: ParallelContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        mine = torch.full((2, 3), float(1 + context.tp_rank + 10 * context.pp_rank), dtype=dtype)
        gathered = context.gather(mine)
        return context.all_reduce(mine), gathered

    results = everywhere(work, list(contexts))
    assert [float(total[0, 0]) for total, _ in results] == [3, 3, 23, 23]
    assert results[1][1] is results[3][1] is None
    for rank, values in ((0, [1, 1, 1, 2, 2, 2]), (2, [11, 11, 11, 12, 12, 12])):
        gathered = results[rank][1]
        assert gathered is not None
        assert gathered.dtype == dtype
        assert gathered.tolist() == [values, values]


def test_what_tensor_rank_0_knows_reaches_its_stage() -> None:
    contexts = group(2, 2)
    assert [c.broadcast(torch.tensor([5, 6])).tolist() for c in [ParallelContext(torch.device("cpu"))]] == [[5, 6]]

    def work(context: ParallelContext) -> list[int]:
        tokens: list[int] = context.broadcast(torch.tensor([context.tp_rank, 2**40 + context.pp_rank])).tolist()
        return tokens

    assert everywhere(work, list(contexts)) == [[0, 2**40], [0, 2**40], [0, 2**40 + 1], [0, 2**40 + 1]]


def test_equal_tensor_ranks_of_all_stages_have_a_group_if_it_is_wanted() -> None:
    contexts = group(2, 2)
    assert all(c.stage_groups is not None and c.stage_groups[0] is c.stage_groups[1] for c in contexts)

    def hand_on(context: ParallelContext) -> float:
        assert context.stage_groups is not None
        headers, x = context.stage_groups[0], torch.tensor([float(context.tp_rank)])
        if context.is_first_stage:
            headers.send([x], 1, 5).wait()
        else:
            headers.recv([x.zero_()], 0, 5).wait()
        return float(x)

    assert everywhere(hand_on, list(contexts)) == [0, 1, 0, 1]
    assert all(c.stage_groups is None for c in group(2, 2, stages=False))


def test_a_peer_that_does_not_come_is_a_time_out() -> None:
    contexts = group(2, 1, timeout=0.5)
    with pytest.raises(LightvllmError, match=r"the sum over the tensor ranks failed, .* Timed out"):
        contexts[0].all_reduce(torch.ones(1))


def test_two_groups_live_in_one_process() -> None:
    one, other = group(2, 1), group(2, 1)
    totals = everywhere(lambda c: float(c.all_reduce(torch.ones(1))), [*one, *other])
    assert totals == [2, 2, 2, 2]


def test_the_rendezvous_listens_on_its_address_alone() -> None:
    store, address = open_store("127.0.0.1", 1)
    host, _, port = address.rpartition(":")
    assert host == "127.0.0.1"
    store.set("key", "value")
    assert join_store(address, 1).get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(port)), timeout=5)


def test_the_hosts_address_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTVLLM_HOST_IP", "192.0.2.7")
    assert host_address() == "192.0.2.7"
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.7 .*; set LIGHTVLLM_HOST_IP"):
        open_store(host_address(), 2)
    monkeypatch.delenv("LIGHTVLLM_HOST_IP")
    store, address = open_store(host_address(), 1)
    store.set("key", "value")
    assert join_store(address, 1).get("key") == b"value"


def test_hosts_that_have_ipv6_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    monkeypatch.setenv("LIGHTVLLM_HOST_IP", "::1")
    totals = everywhere(lambda c: float(c.all_reduce(torch.ones(1))), [*group(2, 1, host=host_address())])
    assert totals == [2, 2]


@pytest.mark.parametrize("wrong", ["", "host", "host:", ":80", "host:port"])
def test_a_rendezvous_that_is_no_address_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="expected 'host:port'"):
        join_store(wrong, 2)

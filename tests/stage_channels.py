"""Two ends of a stage channel in one process, for every transport."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lightvllm.layers.parallel import ParallelContext, join_store, open_store
from lightvllm.messages import StageCredentials
from lightvllm.transfer.stage import Inlet, Outlet, StageTransport

CPU = torch.device("cpu")
CREDENTIALS = StageCredentials(group="0123456789abcdef", token="a token of the tests")
LIMIT = 64 << 20
TRANSPORTS = ("torch", "grpc", "shared")


def groups(size: int = 2, timeout: float = 30.0) -> list[ParallelContext]:
    """The contexts of ``size`` stages of one tensor rank."""
    store, address = open_store("127.0.0.1", size)

    def join(rank: int) -> ParallelContext:
        mine = store if rank == 0 else join_store(address, size)
        return ParallelContext.connect(CPU, rank, 1, size, mine, timeout, local=True)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size), timeout=60))


def open_ends(name: str, folder: Path, capacity: int = 2, timeout: float = 30.0) -> tuple[Outlet, Inlet]:
    """From rank 0 to rank 1."""
    if name == "torch":
        from lightvllm.transfer.group import GroupInlet, GroupOutlet

        first, second = groups(timeout=timeout)
        assert first.stage_groups is not None
        assert second.stage_groups is not None
        inlet = GroupInlet(*second.stage_groups, 0, capacity, LIMIT, CPU, timeout)
        return GroupOutlet(*first.stage_groups, 1, capacity), inlet
    if name == "shared":
        from lightvllm.transfer.shared import SharedInlet, SharedOutlet

        files = SharedInlet(folder, CREDENTIALS.group, 1, LIMIT)
        return SharedOutlet(files.address, capacity), files
    from lightvllm.transfer.push import PushInlet, PushOutlet, channel_name

    pushed = PushInlet("127.0.0.1", CREDENTIALS, channel_name(1, 1), 0, capacity, LIMIT)
    return PushOutlet(pushed.address, CREDENTIALS, channel_name(1, 1), 1, capacity, 30.0), pushed


@contextlib.contextmanager
def connected(
    name: str, folder: Path, capacity: int = 2, timeout: float = 30.0
) -> Iterator[tuple[StageTransport, StageTransport]]:
    """The transports of a first and a second, last stage."""
    outlet, inlet = open_ends(name, folder, capacity, max(timeout, 5.0))
    first = StageTransport(name, CPU, timeout, outlet=outlet, next_rank=1)
    second = StageTransport(name, CPU, timeout, inlet=inlet, previous_rank=0)
    try:
        yield first, second
    finally:
        first.close()
        second.close()

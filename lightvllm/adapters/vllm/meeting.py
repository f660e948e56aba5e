"""Whether the ranks of data-parallel engines of a mixture-of-experts model can find each other. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from lightvllm.backends.base import WorkerRef
from lightvllm.errors import ConfigError


def check_meeting(workers: Sequence[WorkerRef], driver_node: str, address: str, dp_rank: int) -> None:
    """Raise ConfigError where vLLM's ranks would wait for each other in vain.

    All ranks of all engines form one group. They meet at vLLM's data-parallel address, where the first engine's process
    is; there the first rank of all opens the port that the others are told of.

    Args:
        workers: of one engine, in rank order.
        driver_node: where the engine's own process is.
        address: ``ParallelConfig.data_parallel_master_ip``.
        dp_rank: the engine's number.
    """
    away = [worker for worker in workers if worker.node != driver_node]
    if away and _is_loopback(address):
        raise ConfigError(
            f"data-parallel engines meet at {address}, but worker {away[0].id} is on {away[0].node}; give vLLM "
            "--data-parallel-address with an address of the first engine's host that all workers reach"
        )
    if dp_rank == 0 and away and workers[0] is away[0]:
        raise ConfigError(
            f"data-parallel engines meet where the first rank is, which must be the first engine's own host, "
            f"{driver_node}; it is {workers[0].id} on {workers[0].node}: run the first engine beside its workers"
        )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"

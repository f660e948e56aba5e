"""Which GPU each worker takes, where vLLM's workers are not children of one process. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lightvllm.backends.base import WorkerRef
from lightvllm.errors import PlacementError
from lightvllm.executors.ranks import device_indices


def shared_devices(workers: Sequence[WorkerRef], dealt: bool) -> tuple[list[int], list[str | None]]:
    """For workers in rank order: the index of each one's device, and what CUDA_VISIBLE_DEVICES is to be.

    The workers of a node all see the node's devices, so that they can reach each other's memory; a worker that saw its
    own alone keeps it, and those that saw the same ones take them in turn.

    ``dealt``: the orchestrator has given each worker its ``device_ids``, whether or not it shows it those alone.
    Otherwise they are what each sees; where all of a node see the same already, the variable is to stay as it is, set
    or not (None): the numbers of a container's device files are the host's, and CUDA counts from 0 in it.

    Raises PlacementError where there are too few.
    """
    by_node: dict[str, list[str]] = defaultdict(list)
    for worker in workers:
        by_node[worker.node] += [device for device in worker.device_ids if device not in by_node[worker.node]]
    differ = {worker.node for worker in workers if dealt or worker.device_ids != tuple(by_node[worker.node])}
    for node in differ:
        by_node[node].sort(key=lambda device: (0, int(device), "") if device.isdigit() else (1, 0, device))
    indices = []
    for rank, (worker, own) in enumerate(zip(workers, device_indices(workers), strict=True)):
        if own >= len(worker.device_ids):
            raise PlacementError(
                f"{worker.id} (rank {rank}) has no GPU of its own on {worker.node}: it sees "
                f"{', '.join(worker.device_ids) or 'none'}, and the ranks before it take those; start fewer workers "
                "there, or show it more"
            )
        indices.append(by_node[worker.node].index(worker.device_ids[own]))
    return indices, [",".join(by_node[worker.node]) if worker.node in differ else None for worker in workers]

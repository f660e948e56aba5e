"""Dealing ranks to placed workers: a pure function, the same for every backend.

Rank = pipeline rank × tensor_parallel_size + tensor rank. The tensor-parallel workers of one stage talk to each other
several times per layer, so they are kept on one node; stages talk once per step and may be apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lightvllm.backends.base import WorkerRef
from lightvllm.errors import PlacementError


def deal_ranks(
    workers: Sequence[WorkerRef], tensor_parallel_size: int, pipeline_parallel_size: int, driver_node: str = ""
) -> list[WorkerRef]:
    """The workers in rank order.

    The driver's node comes first, then the others in the order of their first worker's ``index``; inside a node workers
    go by ``index``. Each node gives as many whole tensor-parallel groups as it holds, so a group lies on one node
    wherever that can be done; what is left over on the nodes forms the last groups. The same workers give the same
    ranks in whatever order they are passed.

    Raises PlacementError if the number of workers is not the layout's.
    """
    world_size = tensor_parallel_size * pipeline_parallel_size
    if len(workers) != world_size:
        raise PlacementError(
            f"{len(workers)} workers were placed for tensor_parallel_size={tensor_parallel_size} × "
            f"pipeline_parallel_size={pipeline_parallel_size}; expected {world_size}"
        )
    nodes: dict[str, list[WorkerRef]] = defaultdict(list)
    for worker in sorted(workers, key=lambda w: (w.index, w.id)):
        nodes[worker.node].append(worker)
    by_node = sorted(nodes.values(), key=lambda held: (held[0].node != driver_node, held[0].index, held[0].id))
    whole: list[WorkerRef] = []
    rest: list[WorkerRef] = []
    for held in by_node:
        cut = len(held) - len(held) % tensor_parallel_size
        whole += held[:cut]
        rest += held[cut:]
    return whole + rest


def device_indices(ranked: Sequence[WorkerRef]) -> list[int]:
    """For workers in rank order: which of the GPUs that it sees each one takes.

    Each takes the first that no earlier one of its node has taken: workers that see the same GPUs (processes of one
    pod) take them in turn, one that sees its own alone (a Ray actor) takes the first. Where all are taken, or there are
    none, the index is the number of those that it sees: too large by one, for whoever uses it to refuse.
    """
    taken: dict[str, set[str]] = defaultdict(set)
    indices = []
    for worker in ranked:
        free = [index for index, gpu in enumerate(worker.device_ids) if gpu not in taken[worker.node]]
        indices.append(free[0] if free else len(worker.device_ids))
        taken[worker.node].update(worker.device_ids[index] for index in free[:1])
    return indices


def local_ranks(ranked: Sequence[WorkerRef]) -> list[tuple[int, int]]:
    """For workers in rank order: each one's ``(local_rank, local_world_size)`` on its node."""
    totals: dict[str, int] = defaultdict(int)
    for worker in ranked:
        totals[worker.node] += 1
    seen: dict[str, int] = defaultdict(int)
    locals_: list[tuple[int, int]] = []
    for worker in ranked:
        locals_.append((seen[worker.node], totals[worker.node]))
        seen[worker.node] += 1
    return locals_

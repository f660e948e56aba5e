"""Which GPUs a process sees, without a CUDA library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from lightvllm.errors import PlacementError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(env: Mapping[str, str] | None = None, device_folder: str = "/dev") -> list[str]:
    """Ids of the GPUs that a process with this environment (the caller's, if None) sees: CUDA_VISIBLE_DEVICES if it is
    set, else the indices of the NVIDIA device files."""
    declared = (os.environ if env is None else env).get(VISIBLE)
    if declared is not None:
        return [entry.strip() for entry in declared.split(",") if entry.strip() not in ("", "-1")]
    found = (re.fullmatch(r"nvidia(\d+)", name) for name in os.listdir(device_folder))
    return sorted((match[1] for match in found if match), key=int)


def deal_gpus(available: list[str], world_size: int, gpus_per_worker: int) -> list[list[str]]:
    """Each local worker's share, in order. Raises PlacementError if there are too few."""
    needed = world_size * gpus_per_worker
    if needed > len(available):
        raise PlacementError(
            f"0 of {world_size} workers: {needed} GPUs are needed ({gpus_per_worker} each), this machine has "
            f"{len(available)} ({', '.join(available) or 'none'})"
        )
    return [available[i * gpus_per_worker : (i + 1) * gpus_per_worker] for i in range(world_size)]

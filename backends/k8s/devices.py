"""Which GPUs a process sees, without a CUDA library."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from lightvllm.errors import ConfigError, PlacementError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_FIRST_RENDER_NODE = 128  # as Linux numbers them
_ID = r"\d+|(GPU|MIG)-[\w/-]+"


def visible_gpus(env: Mapping[str, str] | None = None, device_folder: str = "/dev") -> list[str]:
    """Ids of the GPUs that a process with this environment (the caller's, if None) sees: CUDA_VISIBLE_DEVICES if it is
    set, else the indices of NVIDIA's device files, or of the render nodes beside that of ROCm."""
    declared = (os.environ if env is None else env).get(VISIBLE)
    if declared is not None:
        return [entry.strip() for entry in declared.split(",") if entry.strip() not in ("", "-1")]
    if nvidia := _numbers(r"nvidia(\d+)", device_folder):
        return [str(number) for number in nvidia]
    if os.path.exists(f"{device_folder}/kfd") and os.path.isdir(f"{device_folder}/dri"):
        return [str(number - _FIRST_RENDER_NODE) for number in _numbers(r"renderD(\d+)", f"{device_folder}/dri")]
    return []


def _numbers(pattern: str, folder: str) -> list[int]:
    found = (re.fullmatch(pattern, name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


def own_gpus(env: Mapping[str, str], device_folder: str = "/dev") -> list[str]:
    """Those that processes started here can be dealt, as CUDA_VISIBLE_DEVICES takes them.

    The device files of a container have the host's numbers, and CUDA counts from 0 in it.
    """
    seen = visible_gpus(env, device_folder)
    return seen if VISIBLE in env else [str(index) for index in range(len(seen))]


def check_ids(option: str, gpus: Sequence[str]) -> None:
    """Raise ConfigError unless ``gpus`` are ids as in CUDA_VISIBLE_DEVICES, each once."""
    if isinstance(gpus, str) or not all(re.fullmatch(_ID, str(gpu)) and gpu == str(gpu) for gpu in gpus):
        raise ConfigError(f"{option}={gpus!r}; expected a list of GPUs by index or UUID, such as ['0', '1']")
    if repeated := sorted({gpu for gpu in gpus if list(gpus).count(gpu) > 1}):
        raise ConfigError(f"{option} names {', '.join(repeated)} more than once; a GPU is dealt to one worker")


def deal_gpus(
    available: list[str], world_size: int, gpus_per_worker: int, whose: str = "this machine has"
) -> list[list[str]]:
    """Each local worker's share, in order. Raises PlacementError if there are too few; ``whose`` they are is for its
    message."""
    needed = world_size * gpus_per_worker
    if needed > len(available):
        raise PlacementError(
            f"0 of {world_size} workers: {needed} GPUs are needed ({gpus_per_worker} each), {whose} "
            f"{len(available)} ({', '.join(available) or 'none'})"
        )
    return [available[i * gpus_per_worker : (i + 1) * gpus_per_worker] for i in range(world_size)]

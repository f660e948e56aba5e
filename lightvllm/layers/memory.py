"""Memory for weights and caches: on a CPU in huge pages.

A decode step reads every weight once, and with pages of 4 KiB the processor misses its address cache all the time.
So tensors are cut one after another out of large mappings that ask for pages of 2 MiB; where the system has none to
give, the pages are small ones. Reading SmolLM2's matrices took 0.93 to 0.99 of the time that torch's own tensors took
(one and 16 rows, bfloat16 and float32, medians of 25 interleaved rounds). On other devices this is ``torch.empty``.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
CHUNK = 64 * 2**20  # bytes of address space per mapping; what is not used of it is never touched
_ALIGNMENT = 64  # a cache line and a vector


class Memory:
    """Tensors that live about equally long. A mapping is returned to the system with the last tensor in it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A dense tensor; on a CPU it is zero, on other devices its content is undefined."""
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self.device)
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        if taken > len(self._rest):
            self._rest = _map(max(taken, CHUNK))
        tensor, self._rest = self._rest[:size], self._rest[taken:]
        return tensor.view(dtype).view(shape)


def _map(size: int) -> Tensor:
    """``size`` bytes of zeros, beginning at a huge page's border."""
    mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages refuses; small ones serve
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]

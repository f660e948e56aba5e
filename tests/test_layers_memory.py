"""Memory for weights and caches: tensors side by side that do not overlap, zero, aligned, and returned in the end."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch

from lightvllm.layers.memory import CHUNK, HUGE_PAGE, Memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_tensors_are_zero_dense_aligned_and_apart(dtype: torch.dtype) -> None:
    memory = Memory(CPU)
    tensors = [memory.empty(*shape, dtype=dtype) for shape in [(3, 5), (7,), (1,), (129, 3, 2), (0, 4)]]
    for number, tensor in enumerate(tensors, 1):
        assert tensor.dtype is dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        assert not tensor.any()
        tensor.fill_(number)
    for number, tensor in enumerate(tensors, 1):
        assert (tensor == number).all(), "written to by another"


def test_large_tensors_begin_at_a_huge_page() -> None:
    memory = Memory(CPU)
    small = memory.empty(5, dtype=torch.float32)
    large = memory.empty(CHUNK + 1, dtype=torch.uint8)
    assert large.data_ptr() % HUGE_PAGE == 0
    large[-1] = 1
    assert not small.any()


def test_unused_address_space_costs_nothing_and_memory_is_returned() -> None:
    process = psutil.Process()
    memory = Memory(CPU)
    gc.collect()
    before = process.memory_info().rss
    tensors = [memory.empty(CHUNK, dtype=torch.uint8) for _ in range(4)]
    assert process.memory_info().rss - before < CHUNK
    for tensor in tensors:
        tensor.fill_(1)
    assert process.memory_info().rss - before > 3 * CHUNK
    del tensors, tensor, memory
    gc.collect()
    assert process.memory_info().rss - before < CHUNK

"""Bits in, bits out; and nothing is allocated for what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightvllm.errors import LightvllmError
from lightvllm.messages import Tensor
from lightvllm.transfer import tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", tensors.DTYPES)
def test_a_message_keeps_every_bit(dtype: str) -> None:
    raw = torch.arange(2 * 3 * tensors.torch_dtype(dtype).itemsize, dtype=torch.uint8)
    x = (raw % 2 > 0) if dtype == "bool" else raw.view(tensors.torch_dtype(dtype))
    x = x.reshape(2, 3)
    message = tensors.to_message(x)
    assert (message.dtype, message.shape, len(message.data)) == (dtype, [2, 3], x.nbytes)
    back = tensors.from_message(message)
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    assert torch.equal(tensors.flat_bytes(back), tensors.flat_bytes(x))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_shapes_at_the_edge(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 1.5, dtype=torch.bfloat16)
    back = tensors.from_message(tensors.to_message(x))
    assert back.shape == x.shape
    assert torch.equal(back, x)


def test_a_view_is_sent_in_its_own_order() -> None:
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    for view in (x.t(), x[:, 1:3], x[::2]):
        assert torch.equal(tensors.from_message(tensors.to_message(view)), view)


def test_nothing_is_copied_that_is_in_order() -> None:
    x = torch.zeros(4, dtype=torch.float16)
    assert tensors.to_host(x) is x
    tensors.buffer_of(x)[:2] = b"\x00\x3c"
    assert x.tolist() == [1, 0, 0, 0]
    buffer = bytearray(8)
    over = tensors.from_buffer(buffer, (2,), "float16", offset=4)
    buffer[4:6] = b"\x00\x3c"
    assert over.tolist() == [1, 0]
    assert tensors.to_device(x, CPU) is x


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2,), "complex64", "dtype 'complex64'; expected one of float32"),
        ((2,), "__class__", "dtype '__class__'"),
        ((-1, -2), "int8", "none negative"),
        ((1,) * 9, "int8", "at most 8 dimensions"),
        ((1 << 40, 1 << 40), "int8", "expected at most 100"),
        ((101,), "int8", r"a tensor of 101 bytes came \(int8 \[101\]\); expected at most 100"),
    ],
)
def test_what_cannot_be_is_refused_before_memory_is_taken(shape: Any, dtype: str, message: str) -> None:
    with pytest.raises(LightvllmError, match=message):
        tensors.check_size(shape, dtype, 100)


def test_sizes_are_in_bytes() -> None:
    assert tensors.check_size((5, 10), "bfloat16", 100) == 100
    assert tensors.check_size((0, 1 << 40), "float32", 100) == 0
    assert tensors.check_size((), "float32", 100) == 4


@pytest.mark.parametrize(("size", "expected"), [(7, 8), (9, 8)])
def test_bytes_that_are_not_the_tensors_are_refused(size: int, expected: int) -> None:
    with pytest.raises(LightvllmError, match=f"{size} bytes came for a tensor of float32 .2.; expected {expected}"):
        tensors.from_message(Tensor("float32", [2], bytes(size)))


def test_a_dtype_that_has_no_name_on_the_wire() -> None:
    with pytest.raises(LightvllmError, match="complex64 cannot be handed on"):
        tensors.dtype_name(torch.complex64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_tensor_goes_through_pinned_memory() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(257, 129, device=device).to(torch.bfloat16)
    host = tensors.to_host(x.t())
    assert host.is_pinned()
    assert torch.equal(host, x.cpu().t())
    back = tensors.to_device(host, device)
    pageable = tensors.to_device(host.clone(), device)
    assert torch.equal(back, x.t())
    assert torch.equal(pageable, x.t())

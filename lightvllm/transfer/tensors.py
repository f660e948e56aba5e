"""Tensors as raw bytes, and back: the bits, a dtype's name and a shape. Knows no transport.

Every dtype of ``DTYPES`` crosses bit for bit, fp8 included, which numpy does not have. torch is imported when a
function is called.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightvllm.errors import LightvllmError
from lightvllm.messages import Buffer
from lightvllm.messages import Tensor as TensorMessage

if TYPE_CHECKING:
    import torch

DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float64",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "bool",
)
"""torch's names without ``torch.``. A dtype's place in this list is its number on the wire: append only."""

MAX_DIMENSIONS = 8


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """Raises LightvllmError for a name that is not in ``DTYPES``."""
    import torch

    if name not in DTYPES:
        raise LightvllmError(f"a tensor came with dtype {name!r:.40}; expected one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Raises LightvllmError for a dtype that is not in ``DTYPES``."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise LightvllmError(f"a tensor of dtype {name} cannot be handed on; use one of {', '.join(DTYPES)}")
    return name


def check_size(shape: Sequence[int], dtype: str, limit: int) -> int:
    """Bytes of a tensor of this shape and dtype; to be called before memory is allocated for it.

    Raises LightvllmError for an unknown dtype, a shape that cannot be, and more bytes than ``limit``.
    """
    size = torch_dtype(dtype).itemsize
    if len(shape) > MAX_DIMENSIONS or any(extent < 0 for extent in shape):
        raise LightvllmError(
            f"a tensor came with shape {list(shape)[: MAX_DIMENSIONS + 1]}; expected at most {MAX_DIMENSIONS} "
            "dimensions, none negative"
        )
    total = math.prod(shape) * size
    if total > limit:
        raise LightvllmError(f"a tensor of {total} bytes came ({dtype} {list(shape)}); expected at most {limit}")
    return total


def to_host(x: torch.Tensor) -> torch.Tensor:
    """``x`` contiguous in host memory: itself where it is, a pinned copy of one on a GPU (this waits for the GPU)."""
    import torch

    if x.device.type != "cuda":
        return x.contiguous()
    staged = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    staged.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return staged


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x``, which is in host memory, on ``device``; to a GPU through pinned memory, in the current stream's order."""
    import torch

    if device.type != "cuda":
        return x
    if not x.is_pinned():
        x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    return x.to(device, non_blocking=True)  # torch keeps the pinned block until the copy is done


def empty(shape: Sequence[int], dtype: str, pinned: bool = False) -> torch.Tensor:
    """Uninitialised, in host memory."""
    import torch

    return torch.empty(tuple(shape), dtype=torch_dtype(dtype), pin_memory=pinned)


def flat_bytes(x: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor ``x`` as uint8 [x.nbytes]; shares its memory."""
    import torch

    return x.detach().reshape(-1).view(torch.uint8)


def buffer_of(x: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, writable; no copy. It lives as long as the memoryview does."""
    return flat_bytes(x).numpy().data


def from_buffer(buffer: Buffer, shape: Sequence[int], dtype: str, offset: int = 0) -> torch.Tensor:
    """A tensor over the writable ``buffer`` from byte ``offset`` on; no copy, and it keeps ``buffer`` alive.

    Raises LightvllmError unless the rest of ``buffer`` is as long as the tensor.
    """
    import torch

    rest = len(buffer) - offset
    if (size := check_size(shape, dtype, sys.maxsize)) != rest:
        raise LightvllmError(f"{rest} bytes came for a tensor of {dtype} {list(shape)}; expected {size}")
    if rest == 0:
        return empty(shape, dtype)
    flat = torch.frombuffer(buffer, dtype=torch.uint8, offset=offset)
    return flat.view(torch_dtype(dtype)).view(tuple(shape))


def to_message(x: torch.Tensor) -> TensorMessage:
    """``x`` by value."""
    return TensorMessage(dtype_name(x.dtype), list(x.shape), bytes(buffer_of(to_host(x))))


def from_message(message: TensorMessage) -> torch.Tensor:
    """The tensor, in host memory of its own. Raises LightvllmError for a message that contradicts itself."""
    return from_buffer(bytearray(message.data), message.shape, message.dtype)

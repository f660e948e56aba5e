"""Loads the compiled CPU kernels and makes them whole torch operators of the namespace ``lightvllm``.

The library brings the operators' definitions and their CPU kernels. Registered from here: the references, for other
devices and, as ``<name>_reference``, for CPU tensors that a kernel does not serve; and the shapes, so that the
operators can be traced. Imported only to use the compiled kernels; a process can load them once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightvllm.errors import ConfigError
from lightvllm.kernels import reference

_library: torch.library.Library | None = None


def load(path: Path) -> None:
    """Load the library at ``path``. Raises ConfigError if the dynamic linker refuses it; a second call does nothing."""
    global _library
    if _library is not None:
        return
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as refused:
        raise ConfigError(
            f"{path} cannot be loaded ({refused}); delete its folder, it will be compiled again"
        ) from None
    _library = torch.library.Library("lightvllm", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, (function, shape) in _OPERATORS.items():
        schema = str(getattr(torch.ops.lightvllm, name).default._schema).split("(", 1)[1]
        _library.define(f"{name}_reference({schema}")  # type: ignore[no-untyped-call]
        for operator in (name, f"{name}_reference"):
            _library.impl(operator, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"lightvllm::{name}", shape, lib=_library)


def set_num_threads(count: int) -> None:
    """Of the kernels; 0: as many as torch's operations have."""
    torch.ops.lightvllm.set_num_threads(count)


def function(name: str) -> Callable[..., Any]:
    """The operator, with its reference's signature."""
    # The only overload: cheaper to call than the packet of overloads.
    operator: Callable[..., Any] = getattr(torch.ops.lightvllm, name).default
    if name != "fused_add_rms_norm":
        return operator

    def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # An operator must not return one of its arguments.
        return operator(x, residual, weight, eps), residual

    return fused_add_rms_norm


def _fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return reference.fused_add_rms_norm(x, residual, weight, eps)[0]


def _nothing(*_: Tensor) -> None:
    """The shape of an operator that works in place."""


# Each operator's reference, and the shape of its result for tracing.
_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (reference.linear, lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0])),
    "rms_norm": (reference.rms_norm, lambda x, weight, eps: torch.empty_like(x)),
    "fused_add_rms_norm": (_fused_add_rms_norm, lambda x, residual, weight, eps: torch.empty_like(x)),
    "rotary_embedding": (reference.rotary_embedding, _nothing),
    "silu_and_mul": (reference.silu_and_mul, lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2)),
    "reshape_and_cache": (reference.reshape_and_cache, _nothing),
    "paged_attention": (reference.paged_attention, lambda query, *_: torch.empty_like(query)),
}

"""The kernels behind one seam: each name here is a compiled kernel where one serves these tensors, else its reference.

``use("reference")`` holds a process to the references; ``use("auto")`` (the default) builds or loads the compiled
kernels once. The meaning, shapes and dtypes of each are documented in ``reference.py``.
"""

from typing import Literal

from lightvllm.kernels.reference import (
    fused_add_rms_norm,
    linear,
    paged_attention,
    reshape_and_cache,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
)

__all__ = [
    "compiled",
    "fused_add_rms_norm",
    "linear",
    "paged_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "use",
]


def use(which: Literal["auto", "reference"]) -> None:
    """Choose the kernels of this process. There are only the references yet, so both choices are the same."""


def compiled() -> bool:
    """Whether compiled kernels are in use."""
    return False

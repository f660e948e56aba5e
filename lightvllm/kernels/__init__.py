"""The kernels behind one seam: each name here is a compiled kernel where one serves these tensors, else its reference.

``use("reference")`` holds a process to the references; ``use("auto")`` (the default) builds or loads the compiled
kernels once. The meaning, shapes and dtypes of each are documented in ``reference.py``.
"""

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
    "fused_add_rms_norm",
    "linear",
    "paged_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
]

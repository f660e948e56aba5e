"""The kernels behind one seam: each function is a compiled kernel where one serves these tensors, else its reference.

``use("reference")`` holds a process to the references; ``use("auto")`` (the default, at the latest with the first
call) builds or loads the compiled kernels once; where that cannot be done it says why in one warning and takes the
references. Call as ``kernels.linear(...)``. The meaning, shapes and dtypes of each are documented in ``reference.py``.

Without ``set_num_threads`` the kernels have as many threads as torch's operations.

A compiled kernel's result for a row depends on that row (and its sequence) alone: not on the rows beside it in the
batch, not on how a prompt was cut into chunks, not on the number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from lightvllm.errors import ConfigError
from lightvllm.kernels import reference

__all__ = [
    "Info",
    "compiled",
    "fused_add_rms_norm",
    "info",
    "linear",
    "paged_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "set_num_threads",
    "silu_and_mul",
    "use",
]

logger = logging.getLogger(__name__)

Mode = Literal["auto", "compiled", "reference"]


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """What runs in this process, and why.

    Attributes:
        compiled: True if the compiled kernels are in use.
        reason: in words: what was asked for, or what went wrong.
        library: the compiled kernels' file, or None.
    """

    compiled: bool
    reason: str
    library: Path | None = None


def use(mode: Mode = "auto") -> Info:
    """Choose what this process computes with from now on; may be called again.

    ``"auto"``: the compiled kernels, compiled now if need be, and the references with a warning where that fails.
    ``"compiled"``: the same, but raises ConfigError where it fails. ``"reference"``: the references.
    """
    global _info
    if mode not in ("auto", "compiled", "reference"):
        raise ConfigError(f"kernels={mode!r} is unknown; use 'auto', 'compiled' or 'reference'")
    if mode == "reference":
        _info = Info(compiled=False, reason="kernels='reference' was asked for")
    else:
        from lightvllm.kernels import build, operators

        try:
            library = build.build()
            operators.load(library)
            _info = Info(compiled=True, reason="compiled for this machine", library=library)
        except ConfigError as failed:
            if mode == "compiled":
                raise
            logger.warning("slow: torch's own operations run in place of the compiled kernels: %s", failed)
            _info = Info(compiled=False, reason=str(failed))
    for name in _NAMES:
        globals()[f"_{name}"] = operators.function(name) if _info.compiled else getattr(reference, name)
    return _info


def info() -> Info:
    """What is in use; decides it (``use("auto")``) if that has not happened yet."""
    return _info or use()


def compiled() -> bool:
    """True if the compiled kernels are in use."""
    return info().compiled


def set_num_threads(count: int) -> None:
    """Compute with ``count`` threads from now on (1 or more).

    With the compiled kernels torch's own operations get one thread: those left to do are small, and torch's threads
    spin for milliseconds after each of them, on the cores that the kernels' threads need next. A program that calls
    ``torch.set_num_threads`` afterwards has that number for torch's operations alone.
    """
    if count < 1:
        raise ConfigError(f"threads={count}; use 1 or more")
    if compiled():
        from lightvllm.kernels import operators

        operators.set_num_threads(count)
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(count)


# What the functions below call: bound by ``use``, so that a call costs no decision. Until then each of them decides.
_NAMES = (
    "fused_add_rms_norm",
    "linear",
    "paged_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
)


def _undecided(name: str) -> Callable[..., Any]:
    def decide(*args: Any) -> Any:
        use()
        return globals()[f"_{name}"](*args)

    return decide


_info: Info | None = None
_fused_add_rms_norm = _undecided("fused_add_rms_norm")
_linear = _undecided("linear")
_paged_attention = _undecided("paged_attention")
_reshape_and_cache = _undecided("reshape_and_cache")
_rms_norm = _undecided("rms_norm")
_rotary_embedding = _undecided("rotary_embedding")
_silu_and_mul = _undecided("silu_and_mul")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _linear(x, weight, bias)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fused_add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]


def rotary_embedding(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    _rotary_embedding(positions, query, key, cos_sin)


def silu_and_mul(x: Tensor) -> Tensor:
    return _silu_and_mul(x)  # type: ignore[no-any-return]


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    _reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
) -> Tensor:
    return _paged_attention(  # type: ignore[no-any-return]
        query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale
    )

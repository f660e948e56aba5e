"""How a layer says which part of which checkpoint tensor belongs where in its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """``target`` receives ``checkpoint[name]`` at ``start : start + target.shape[dim]`` along ``dim``, whole otherwise.

    Attributes:
        name: the tensor's name in a Hugging Face checkpoint.
        shape: of the whole tensor there.
        target: the memory to fill, a view of a layer's parameter; its dtype is the one that is wanted.
    """

    name: str
    shape: tuple[int, ...]
    target: Tensor
    dim: int = 0
    start: int = 0


def parameter_bytes(weights: Iterable[WeightSlice]) -> int:
    """Bytes of memory that the slices fill, each counted once (a tied head's is the embedding's)."""
    return sum({w.target.data_ptr(): w.target.nbytes for w in weights}.values())

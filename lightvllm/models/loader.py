"""Fills a model's memory from safetensors, or with generated weights. Only this rank's slices are read.

Peak memory is one copy of the weights in the dtype that was asked for: each slice goes from the mapped file into its
place by pieces of at most ``PIECE_BYTES``, and the file is mapped anew between pieces, because pages of a mapping
that were touched count as this process's memory until it is closed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError
from lightvllm.layers.weights import WeightSlice

PIECE_BYTES = 64 << 20
"""Bytes of a file that are mapped and touched at a time."""
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_DECODER = "model."
_FLOATS = ("F64", "F32", "F16", "BF16")
_LARGEST_ELEMENT = 8


class Loadable(Protocol):
    """What the loader asks of a model."""

    def weights(self) -> Iterator[WeightSlice]:
        """What this rank needs."""

    def is_known(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor."""


def load_weights(model: Loadable, config: ModelConfig) -> None:
    """Fill every tensor of ``model``.

    Raises ConfigError, naming them, when tensors are missing, unexpected or of a wrong shape, or a file is broken.
    """
    wanted = list(model.weights())
    if config.load_format == "dummy":
        for weight in wanted:
            _generate(weight)
        return
    folder = Path(config.path)
    files = _tensor_files(folder)
    # What LlamaModel itself saves has the names without the one that LlamaForCausalLM gives it.
    bare = config.pooling is not None and not any(name.startswith(_DECODER) for name in files)
    if bare:
        wanted = [replace(weight, name=weight.name.removeprefix(_DECODER)) for weight in wanted]
    missing = [weight.name for weight in wanted if weight.name not in files]
    if missing:
        raise ConfigError(f"{folder}: the checkpoint lacks {_some(missing)}; is the download complete?")
    unexpected = [name for name in files if not model.is_known(f"{_DECODER}{name}" if bare else name)]
    if unexpected:
        raise ConfigError(
            f"{folder}: the checkpoint has tensors that {config.architecture} with {config.num_hidden_layers} layers "
            f"does not know: {_some(unexpected)}; does config.json belong to these weights?"
        )
    by_file: dict[Path, list[WeightSlice]] = {}
    for weight in wanted:
        by_file.setdefault(files[weight.name], []).append(weight)
    for path, weights in by_file.items():
        try:
            _fill(path, weights)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read as safetensors ({error}); download it again") from None


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file: by the index, else ``model.safetensors``, else every ``*.safetensors``."""
    index = folder / _INDEX
    if index.exists():
        try:
            by_name = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): folder / str(file) for name, file in by_name.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: no usable weight_map ({type(error).__name__}: {error})") from None
        absent = sorted({path.name for path in files.values() if not path.is_file()})
        if absent:
            raise ConfigError(f"{folder}: {_INDEX} names files that are not there: {_some(absent)}")
        return files
    paths = [folder / _WHOLE] if (folder / _WHOLE).exists() else sorted(folder.glob("*.safetensors"))
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: cannot be read as safetensors ({error}); download it again") from None
        for name in names:
            if name in found:
                raise ConfigError(f"{folder}: {name} is both in {found[name].name} and in {path.name}; keep one")
            found[name] = path
    return found


def _fill(path: Path, weights: list[WeightSlice]) -> None:
    touched = 0
    file: Any = safe_open(path, framework="pt")
    for weight in weights:
        source = file.get_slice(weight.name)
        shape, dtype = tuple(source.get_shape()), source.get_dtype()
        if shape != weight.shape:
            raise ConfigError(
                f"{path}: {weight.name} has shape {list(shape)}; config.json asks for {list(weight.shape)}"
            )
        if dtype not in _FLOATS:
            raise ConfigError(f"{path}: {weight.name} has dtype {dtype}; expected one of {', '.join(_FLOATS)}")
        target = weight.target
        row_bytes = math.prod(shape[1:]) * _LARGEST_ELEMENT  # all of it is mapped, even where a part is read
        step = max(1, PIECE_BYTES // row_bytes)
        for row in range(0, target.shape[0], step):
            if touched >= PIECE_BYTES:
                file, touched = safe_open(path, framework="pt"), 0
                source = file.get_slice(weight.name)
            piece = target[row : row + step]
            piece.copy_(_read(source, weight, row, piece.shape[0]))
            touched += piece.shape[0] * row_bytes


def _read(source: Any, weight: WeightSlice, row: int, rows: int) -> torch.Tensor:
    """Rows ``row : row + rows`` of the slice, as they are in the file."""
    if weight.dim == 0:
        start = weight.start + row
        part = source[start : start + rows]
    else:
        part = source[row : row + rows, weight.start : weight.start + weight.target.shape[1]]
    assert isinstance(part, torch.Tensor)
    return part


def _generate(weight: WeightSlice) -> None:
    """Weights that depend on the tensor's name and each element's place in the whole tensor alone, so that every
    layout has the same model: norms near 1, everything else uniform with standard deviation 0.02."""
    target = weight.target
    key = np.uint64(int.from_bytes(hashlib.blake2b(weight.name.encode(), digest_size=8).digest(), "little"))
    columns = weight.shape[1] if len(weight.shape) > 1 else 1
    centre = 1.0 if weight.name.endswith("norm.weight") else 0.0
    first_row = weight.start if weight.dim == 0 else 0
    step = max(1, (4 << 20) // columns)
    for row in range(0, target.shape[0], step):
        rows = min(step, target.shape[0] - row)
        begin = (first_row + row) * columns
        index = np.arange(begin, begin + rows * columns, dtype=np.uint64)
        values = torch.from_numpy(_hash_uniform(key, index) * (0.02 * 12**0.5) + centre).view(rows, columns)
        if weight.dim == 1:
            values = values[:, weight.start : weight.start + target.shape[1]]
        target[row : row + rows].copy_(values.view(target[row : row + rows].shape))


def _hash_uniform(
    key: np.uint64, index: np.ndarray[tuple[int], np.dtype[np.uint64]]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Numbers in [-0.5, 0.5), each a hash of the key and its index. (splitmix64: Steele et al., OOPSLA 2014)"""
    z = index * np.uint64(0x9E3779B97F4A7C15)
    z += key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 0.5


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"

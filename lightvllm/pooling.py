"""How a folder says that its model makes embeddings: sentence-transformers' ``modules.json`` and what it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from lightvllm.errors import ConfigError

Pooling = Literal["last", "mean", "cls"]
"""Which final hidden states make an embedding: the last token's, the mean of all, or the first token's."""

_MODES: dict[str, Pooling] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_SHORT_MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}  # since release 5.4


def read_pooling(folder: Path, default: tuple[Pooling | None, bool]) -> tuple[Pooling | None, bool]:
    """The pooling, and whether embeddings are normalised; ``default`` where there is no ``modules.json``.

    Raises ConfigError for modules and modes other than those above, and for files that cannot be read.
    """
    file = folder / "modules.json"
    if not file.exists():
        return default
    modules = _read(file, list)
    pooling: Pooling | None = None
    normalize = False
    for module in modules:
        if not isinstance(module, dict):
            raise ConfigError(f"{file}: expected a list of modules, got {module!r:.80}")
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _mode(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ConfigError(
                f"{file}: module {kind or module!r} is not supported; supported: Transformer, Pooling, Normalize"
            )
    if pooling is None:
        raise ConfigError(f"{file} names no Pooling; expected Transformer, Pooling and, at will, Normalize")
    return pooling, normalize


def _mode(file: Path) -> Pooling:
    raw = _read(file, dict)
    short = raw.get("pooling_mode")
    if isinstance(short, str) and short in _SHORT_MODES:
        return _SHORT_MODES[short]
    modes = [name for name, on in raw.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ConfigError(
            f"{file}: {short or ' and '.join(modes) or 'no pooling mode'} is not supported; "
            f"use one of {', '.join(_MODES)}"
        )
    return _MODES[modes[0]]


def _read(file: Path, kind: type) -> Any:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    if not isinstance(raw, kind):
        raise ConfigError(f"{file}: expected a JSON {'list' if kind is list else 'object'}, got {type(raw).__name__}")
    return raw

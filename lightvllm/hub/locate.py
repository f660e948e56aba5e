"""From what the user wrote to a model folder: a local folder, a known model's name, or a Hugging Face id."""

from __future__ import annotations

import re
from pathlib import Path

from lightvllm.errors import ConfigError, MissingExtra
from lightvllm.hub.catalogue import KNOWN_MODELS
from lightvllm.hub.store import installed, model_dir

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt"]


def resolve(model: str) -> Path:
    """The folder of ``model``; a hub id is downloaded through huggingface_hub's own cache.

    Raises ConfigError when there is no such model here and says how to get it; MissingExtra when a hub id is given
    and huggingface_hub is not installed.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(f"{model}: is a file; expected a Hugging Face model folder")
    if model in KNOWN_MODELS:
        if not installed(model):
            raise ConfigError(f"model {model} is not there yet; run: lightvllm models get {model}")
        return model_dir(model)
    if not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"{model}: no such model folder; expected a folder, a known model ({', '.join(KNOWN_MODELS)}) "
            "or a Hugging Face id (org/name)"
        )
    return _from_hub(model)


def _from_hub(model: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra(
            "huggingface_hub", "hub", f"the model {model}: no such folder, and a Hugging Face id"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as failed:  # noqa: BLE001  its errors come from several libraries and none may cross our border
        reason = (str(failed).strip().splitlines() or [type(failed).__name__])[0]
        raise ConfigError(
            f"{model}: no such folder here, and the Hugging Face hub did not give it ({reason}); "
            "check the name and the connection, or give a local model folder"
        ) from None

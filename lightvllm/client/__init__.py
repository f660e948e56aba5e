"""A client of a served model from Python: one question, many, streams, pydantic answers. Speaks OpenAI's API, so that
the server may be ``lightvllm serve``, ``lightvllm router`` or another's.

``Client`` needs the extra ``client``. Imports neither the engine nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightvllm.errors import MissingExtra

if TYPE_CHECKING:
    from lightvllm.client.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name != "Client":
        raise AttributeError(f"module 'lightvllm.client' has no attribute {name!r}")
    try:
        return importlib.import_module("lightvllm.client.client").Client
    except ModuleNotFoundError as error:
        if error.name not in ("httpx2", "pydantic"):
            raise
        raise MissingExtra(error.name, "client", "lightvllm.client") from error

"""lightvllm: LLM workers under Ray or plain Kubernetes behind one executor, and a small LLaMA engine on top.

Importing it is cheap: torch, ray and grpc are imported by the parts that need them, when they are used.
"""

from typing import TYPE_CHECKING, Any

from lightvllm.version import __version__

if TYPE_CHECKING:
    from lightvllm.engine.async_llm import AsyncLLM
    from lightvllm.engine.llm import LLM
    from lightvllm.models.pretrained import LightvLLM
    from lightvllm.sampling_params import SamplingParams

__all__ = ["LLM", "AsyncLLM", "LightvLLM", "SamplingParams", "__version__"]

_HOMES = {
    "AsyncLLM": "lightvllm.engine.async_llm",
    "LLM": "lightvllm.engine.llm",
    "LightvLLM": "lightvllm.models.pretrained",
    "SamplingParams": "lightvllm.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lightvllm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

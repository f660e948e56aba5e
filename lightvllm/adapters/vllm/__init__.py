"""Executors of lightvllm for unmodified vLLM, and what their workers run.

    vllm serve MODEL --distributed-executor-backend lightvllm.adapters.vllm.KubernetesExecutor
    LLM(MODEL, distributed_executor_backend=lightvllm.adapters.vllm.RayExecutor)

``executor`` is the driver's side and imports vLLM; the classes here are found there when they are asked for. ``worker``
is the workers' side. ``settings``, ``environment`` and ``versions`` are pure. Only this package imports vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightvllm.errors import MissingExtra

if TYPE_CHECKING:
    from lightvllm.adapters.vllm.executor import KubernetesExecutor, RayExecutor

__all__ = ["KubernetesExecutor", "RayExecutor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lightvllm.adapters.vllm import executor
    except ModuleNotFoundError as missing:
        if missing.name != "vllm":
            raise
        raise MissingExtra("vllm", "vllm", f"{__name__}.{name}") from None
    return getattr(executor, name)

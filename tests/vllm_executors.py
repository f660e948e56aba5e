"""Executors and workers as a user of vLLM writes them, for the tests marked ``vllm``. Imports vLLM."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from lightvllm.adapters.vllm import KubernetesExecutor


class Counting(KubernetesExecutor):
    """Notes which calls went out."""

    calls: list[str]

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "calls"):
            self.calls = []
        self.calls.append(method if isinstance(method, str) else method.__name__)
        return super().collective_rpc(method, *args, **kwargs)


class NoExecutor:
    """Has nothing of an executor but its place in the arguments."""


class Unwilling(CPUWorker):  # type: ignore[misc]
    """Rank 1 has no model."""

    def load_model(self, **kwargs: Any) -> None:
        if self.rank == 1:
            raise ValueError("no weights for rank 1 today")
        super().load_model(**kwargs)

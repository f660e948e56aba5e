"""The device side of the engine: ``lightvllm.worker:Worker`` is what backends place and executors call.

Importing the package imports no torch; the class does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightvllm.worker.worker import Worker

__all__ = ["Worker"]


def __getattr__(name: str) -> Any:
    if name != "Worker":
        raise AttributeError(f"module 'lightvllm.worker' has no attribute {name!r}")
    from lightvllm.worker.worker import Worker

    return Worker

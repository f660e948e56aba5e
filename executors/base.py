"""The abstract ``Executor``: vLLM's method names and meaning (``vllm/v1/executor/abstract.py``, version 0.32).

``collective_rpc`` is the narrow waist; nearly every other method is one line over it. Knows nothing of models,
torch or orchestrators.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

FailureCallback = Callable[[], None]


class Executor(ABC):
    """Runs methods on a group of workers, rank 0 to world_size - 1."""

    supports_pp: bool = True
    uses_ray: bool = False

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of workers."""

    @property
    @abstractmethod
    def output_rank(self) -> int:
        """The rank whose reply holds a step's result."""

    @property
    @abstractmethod
    def max_concurrent_batches(self) -> int:
        """Steps that may be in flight at once: the number of pipeline stages."""

    @property
    @abstractmethod
    def step_timeout(self) -> float:
        """Seconds in which a step must have been answered."""

    @abstractmethod
    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """Run a method on every worker and gather what it returns. For control; tensors should not pass through here.

        Calls reach each worker in the order in which they were made, and it runs one at a time.

        Args:
            method: a method's name, or a callable that is sent along and gets the worker as its first argument.
            timeout: seconds until RpcTimeout; None takes the executor's own.
            args, kwargs: sent to every worker alike.
            non_block: return a Future at once instead of waiting.
            unique_reply_rank: return this rank's result alone instead of a list. Errors of every rank still count.

        Returns:
            The results in rank order, or the one result asked for; with ``non_block`` a Future of it.

        Raises:
            WorkerError: a worker's method raised; the first such error, with its rank and remote traceback.
            WorkerDied: a worker is gone, before or during the call. Not waited for: it is raised at once.
            RpcTimeout: not all answered in time; says which ranks did not.
            ConfigError: a worker refused what the user asked for.
            Shutdown: the executor has been shut down.
        """

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step on every worker; the output rank's result, or a Future of it."""
        return self.collective_rpc(
            "execute_model",
            self.step_timeout,
            args=(scheduler_output,),
            non_block=non_block,
            unique_reply_rank=self.output_rank,
        )

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The second half of a step, for workers whose ``execute_model`` leaves the logits, as vLLM's do."""
        return self.collective_rpc(
            "sample_tokens",
            self.step_timeout,
            args=(grammar_output,),
            non_block=non_block,
            unique_reply_rank=self.output_rank,
        )

    def get_kv_cache_specs(self) -> list[Any]:
        """What each worker's KV cache is made of, in rank order."""
        return list(self.collective_rpc("get_kv_cache_spec"))

    def determine_available_memory(self) -> list[int]:
        """Bytes that each worker can spend on its KV cache, in rank order."""
        return list(self.collective_rpc("determine_available_memory"))

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV caches, then compile or warm up."""
        self.collective_rpc("initialize_from_config", args=(kv_cache_config,))
        self.collective_rpc("compile_or_warm_up_model")

    @property
    @abstractmethod
    def is_failed(self) -> bool:
        """True once a worker is gone: every further call raises WorkerDied."""

    @abstractmethod
    def register_failure_callback(self, callback: FailureCallback) -> None:
        """Have ``callback`` called once when the executor fails; at once if it has failed already."""

    @abstractmethod
    def check_health(self) -> None:
        """Raise unless every worker answers."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the workers and leave nothing behind. Idempotent."""


RpcFuture = Future[Any]
"""What ``non_block=True`` returns. Its ``result()`` without a time-out uses the call's own, and raises RpcTimeout."""

"""The one distributed executor: vLLM's interface over any ``Backend``.

It deals the ranks, encodes a call once, sends it to every worker, and gathers the replies in rank order. It knows no
orchestrator (that is the backend's part) and no model (that is the workers' part); which engine's workers they are only
shows in ``Placement.worker_class``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from lightvllm.backends.base import Backend, BackendGraph, Graph, Placement, Progress, WorkerRef
from lightvllm.config import ParallelConfig
from lightvllm.errors import LightvllmError, RpcTimeout, Shutdown, WorkerDied
from lightvllm.executors.base import Executor, FailureCallback, RpcFuture
from lightvllm.executors.graph import WorkerHandle
from lightvllm.executors.ranks import deal_ranks
from lightvllm.messages import Buffer, decode_reply, encode_call

HEALTH_TIMEOUT = 10.0


class DistributedExecutor(Executor):
    """Places workers when made; raises PlacementError, leaving nothing behind, when it cannot.

    Args:
        backend: where the workers run; the executor owns it from now on and shuts it down.
        placement: what to place; its world size must be that of ``parallel``.
        parallel: the layout.
        start_timeout: seconds until every worker must have answered for the first time.
        rpc_timeout: seconds for a call that names no time-out of its own.
        step_timeout: seconds for ``execute_model`` and ``sample_tokens``.
        shutdown_timeout: seconds that workers get to end by themselves.
        progress: told what is being waited for.

    Attributes:
        workers: in rank order.
        handles: the workers as authors of compiled graphs use them, in rank order (``executors/graph.py``).
    """

    def __init__(
        self,
        backend: Backend,
        placement: Placement,
        parallel: ParallelConfig,
        *,
        start_timeout: float = 120.0,
        rpc_timeout: float = 600.0,
        step_timeout: float = 300.0,
        shutdown_timeout: float = 1.0,
        progress: Progress | None = None,
    ) -> None:
        self.backend = backend
        self.parallel = parallel
        self.uses_ray = backend.name == "ray"
        self._rpc_timeout = rpc_timeout
        self._step_timeout = step_timeout
        self._shutdown_timeout = shutdown_timeout
        self._send_lock = threading.Lock()
        self._lock = threading.Lock()  # guards the four below
        self._failure: LightvllmError | None = None
        self._callbacks: list[FailureCallback] = []
        self._pending: set[_Gathering] = set()
        self._ranks: dict[str, int] = {}
        self.workers: list[WorkerRef] = []
        try:
            placed = backend.place(placement, self._on_failure, start_timeout, progress)
            self.workers = deal_ranks(
                placed, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, backend.driver_node
            )
        except BaseException:
            self.shutdown()
            raise
        self._ranks = {worker.id: rank for rank, worker in enumerate(self.workers)}
        self.handles = [WorkerHandle(self, worker, rank) for rank, worker in enumerate(self.workers)]

    @property
    def world_size(self) -> int:
        return self.parallel.world_size

    @property
    def output_rank(self) -> int:
        return self.parallel.output_rank

    @property
    def max_concurrent_batches(self) -> int:
        return self.parallel.pipeline_parallel_size

    @property
    def step_timeout(self) -> float:
        return self._step_timeout

    @property
    def rpc_timeout(self) -> float:
        """Seconds for a call that names no time-out of its own."""
        return self._rpc_timeout

    # ------------------------------------------------------------------------------------------------- calls

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
    ) -> Any:
        name, payload = encode_call(method, args, dict(kwargs or {}))
        future = self._send(name, enumerate([payload] * len(self.workers)), timeout, unique_reply_rank)
        return future if non_block else future.result()

    def scatter_rpc(
        self,
        method: str,
        args_by_rank: Mapping[int, Sequence[Any]],
        timeout: float | None = None,
        on_reply: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """Like ``collective_rpc``, but with each rank's own arguments, and only for the ranks named.

        ``on_reply(answered, asked)`` is called as replies come in. The results are in the order of ``args_by_rank``.
        """
        calls = [(rank, encode_call(method, args, None)[1]) for rank, args in args_by_rank.items()]
        results: list[Any] = self._send(method, calls, timeout, None, on_reply).result()
        return results

    def _send(
        self,
        name: str,
        calls: Iterable[tuple[int, bytes]],
        timeout: float | None,
        reply_rank: int | None,
        on_reply: Callable[[int, int], None] | None = None,
        told_as: str = "",
    ) -> _Gathering:
        limit = self._rpc_timeout if timeout is None else timeout
        asked = tuple(calls)
        gathering = _Gathering(
            self.backend, told_as or name, [rank for rank, _ in asked], reply_rank, limit, on_reply, self._forget
        )
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._pending.add(gathering)
        with self._send_lock:  # two threads' calls must reach every worker in the same order, or collectives deadlock
            for rank, payload in asked:
                self.backend.send(self.workers[rank], name, payload, functools.partial(gathering.replied, rank))
        return gathering

    def begin_rpc(
        self,
        method: str,
        args: Sequence[Any],
        timeout: float | None = None,
        unique_reply_rank: int | None = None,
        told_as: str = "",
    ) -> RpcFuture:
        """``collective_rpc`` with ``non_block``; errors name ``told_as``, which is what ``method`` is to run."""
        payload = encode_call(method, args, None)[1]
        calls = enumerate([payload] * len(self.workers))
        return self._send(method, calls, timeout, unique_reply_rank, told_as=told_as)

    def abandon(self, future: RpcFuture, error: BaseException) -> None:
        """Have a call's future fail with ``error`` now, unless it is done. The workers execute the call still."""
        if isinstance(future, _Gathering):
            future.fail(error)

    # ---------------------------------------------------------------------------------------------- graphs

    def compile_graph(self, graph: Graph) -> BackendGraph:
        """See ``executors/graph.py``, by which graphs are written."""
        if (failure := self._failed_with()) is not None:
            raise failure
        try:
            return self.backend.compile(graph, self._rpc_timeout)
        except LightvllmError as error:
            raise self.ranked(error) from None

    def execute_graph(self, graph: BackendGraph, inputs: Mapping[int | str | None, bytes]) -> Future[list[Buffer]]:
        """Begin an execution of a compiled graph."""
        if (failure := self._failed_with()) is not None:
            raise failure
        with self._send_lock:
            future = graph.execute(inputs)
        if future.done() and isinstance(error := future.exception(), LightvllmError):
            raise self.ranked(error)  # of a death that has not been reported to this executor yet
        return future

    def wait(self, future: Future[Any], timeout: float) -> None:
        """``Backend.wait``."""
        self.backend.wait(future, timeout)

    def ranked(self, error: LightvllmError) -> LightvllmError:
        """``error``; a WorkerDied with the rank of its worker."""
        if isinstance(error, WorkerDied) and error.rank is None:
            return WorkerDied(error.worker, error.reason, self._ranks.get(error.worker))
        return error

    def _forget(self, gathering: _Gathering) -> None:
        with self._lock:
            self._pending.discard(gathering)

    def _failed_with(self) -> LightvllmError | None:
        with self._lock:
            return self._failure

    # ---------------------------------------------------------------------------------------------- failure

    def _on_failure(self, worker: WorkerRef, died: WorkerDied) -> None:
        self._fail(self.ranked(died))

    def _fail(self, failure: LightvllmError) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
            callbacks, self._callbacks = self._callbacks, []
            pending = list(self._pending)
        for gathering in pending:
            gathering.fail(failure)
        if isinstance(failure, WorkerDied):
            for callback in callbacks:
                callback()

    @property
    def failure(self) -> LightvllmError | None:
        """What every further call raises: WorkerDied, or Shutdown; None while calls can be made."""
        return self._failed_with()

    @property
    def is_failed(self) -> bool:
        return isinstance(self._failure, WorkerDied)

    def register_failure_callback(self, callback: FailureCallback) -> None:
        with self._lock:
            if self._failure is None:
                self._callbacks.append(callback)
                return
        if self.is_failed:
            callback()

    def check_health(self) -> None:
        self.collective_rpc("check_health", HEALTH_TIMEOUT)

    def shutdown(self) -> None:
        """End the workers. What is pending fails with Shutdown; later calls raise it."""
        self._fail(Shutdown("the executor has been shut down"))
        self.backend.shutdown(self._shutdown_timeout)


class _Gathering(Future[Any]):
    """The future of a collective call: done when every rank has replied, failed when the first one fails.

    Replies of ranks whose result is not asked for are still looked at, so that no rank's error is lost.
    """

    def __init__(
        self,
        backend: Backend,
        method: str,
        ranks: list[int],
        reply_rank: int | None,
        timeout: float,
        on_reply: Callable[[int, int], None] | None,
        on_done: Callable[[_Gathering], None],
    ) -> None:
        super().__init__()
        self._backend = backend
        self._method = method
        self._ranks = ranks
        self._reply_rank = reply_rank
        self._timeout = timeout
        self._on_reply = on_reply
        self._on_done = on_done
        self._results: dict[int, Any] = {}
        self._guard = threading.Lock()
        self._decided = False
        self.set_running_or_notify_cancel()  # a call that has been sent cannot be cancelled

    def fail(self, error: BaseException) -> None:
        with self._guard:
            first, self._decided = not self._decided, True
        if first:
            self._on_done(self)
            self.set_exception(error)

    def replied(self, rank: int, reply: Buffer | BaseException) -> None:
        """The reply of ``rank``, or why there is none."""
        try:
            if isinstance(reply, BaseException):
                raise reply
            result = decode_reply(self._method, reply, rank)
        except WorkerDied as died:
            return self.fail(WorkerDied(died.worker, died.reason, rank))
        except (LightvllmError, CancelledError) as error:
            return self.fail(error)
        except Exception as error:  # noqa: BLE001  a reply that cannot be decoded must not leave the caller waiting
            return self.fail(LightvllmError(f"rank {rank}: the reply to {self._method} cannot be read: {error!r}"))
        with self._guard:
            if self._decided:
                return None
            self._results[rank] = result
            if self._on_reply is not None:
                self._on_reply(len(self._results), len(self._ranks))
            if len(self._results) < len(self._ranks):
                return None
            self._decided = True
        self._on_done(self)
        if self._reply_rank is not None:
            self.set_result(self._results[self._reply_rank])
        else:
            self.set_result([self._results[rank] for rank in self._ranks])
        return None

    def result(self, timeout: float | None = None) -> Any:
        limit = self._timeout if timeout is None else timeout
        self._backend.wait(self, limit)
        try:
            return super().result(0)
        except TimeoutError:
            if self.done():
                raise  # the call's own error
            missing = ", ".join(str(rank) for rank in sorted(self._ranks) if rank not in self._results)
            raise RpcTimeout(f"{self._method}: no reply from rank {missing} within {limit:g} s") from None

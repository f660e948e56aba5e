"""The in-process backend: each worker is an object with a thread of its own in this process.

The default for a single worker, and the tests' fake for many: the same contract as the others, without processes. A
thread cannot be killed, so ``shutdown`` waits for a call that is running only as long as it is told to, and then leaves
the (daemon) thread to end with it. What a method has left to be finished later has another thread, one per worker.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from lightvllm.backends.base import (
    BackendGraph,
    Graph,
    GraphInput,
    OnFailure,
    OnReply,
    Placement,
    Progress,
    WorkerRef,
    load_worker_class,
    set_environment,
    tell,
    wait_for,
)
from lightvllm.backends.late import LateThread
from lightvllm.backends.program import Source, Step, dump, load, steps
from lightvllm.errors import ConfigError, PlacementError, RpcTimeout, Shutdown, WorkerDied
from lightvllm.messages import Buffer, begin, encode_failure

T = TypeVar("T")
_End = WorkerDied | Shutdown


class _Task(NamedTuple):
    """Something that a worker is to do: ``run(worker)``, or ``fail(why)`` if the worker's end comes first.

    What ``run`` returns, if anything, is called on the worker's late thread; until then the task is not done.
    """

    run: Callable[[object], Callable[[], None] | None]
    fail: Callable[[_End], None]


class _Worker:
    """A worker's thread, which makes the object and then does its tasks one by one."""

    def __init__(self, ref: WorkerRef, worker_class: str, on_death: OnFailure) -> None:
        self.ref = ref
        self.ready: Future[None] = Future()
        self.death: _End | None = None
        self._worker_class = worker_class
        self._on_death = on_death
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._guard = threading.Lock()  # orders "put a task" against "the worker is gone"
        self._current: _Task | None = None
        self._late = LateThread(f"lightvllm-{ref.id}-late")
        self._unfinished: dict[int, _Task] = {}  # by id
        self.thread = threading.Thread(target=self._run, name=f"lightvllm-{ref.id}", daemon=True)
        self.thread.start()

    def submit(self, task: _Task) -> None:
        with self._guard:
            if self.death is None:
                self._tasks.put(task)
                return
        task.fail(self.death)

    def end(self, error: _End) -> bool:
        """Fail what is pending and refuse what comes; False if that has happened before."""
        with self._guard:
            if self.death is not None:
                return False
            self.death = error
            pending = [self._current, *self._unfinished.values()]
        self._late.end()
        with contextlib.suppress(queue.Empty):  # the worker's thread may be taking from it, too
            while True:
                pending.append(self._tasks.get_nowait())
        self._tasks.put(None)
        for task in pending:
            if task is not None:
                task.fail(error)
        return True

    def _run(self) -> None:
        try:
            worker = load_worker_class(self._worker_class)()
        except BaseException as error:  # noqa: BLE001  handed to place()
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        while (task := self._tasks.get()) is not None:
            self._current = task
            try:
                finish = task.run(worker)
            except BaseException as error:  # noqa: BLE001  SystemExit and the like: the worker's end
                self._die(error)
                return
            if finish is not None:
                self._put_off(task, finish)
            self._current = None

    def _put_off(self, task: _Task, finish: Callable[[], None]) -> None:
        with self._guard:
            if self.death is None:
                self._unfinished[id(task)] = task
                self._late.put(functools.partial(self._finish, task, finish))
                return
        task.fail(self.death)

    def _finish(self, task: _Task, finish: Callable[[], None]) -> None:
        if self.death is not None:
            return  # the task has failed already
        try:
            finish()
        except BaseException as error:  # noqa: BLE001  as in _run
            self._die(error)
            return
        with self._guard:
            del self._unfinished[id(task)]

    def _die(self, error: BaseException) -> None:
        died = WorkerDied(self.ref.id, f"its thread ended with {error!r}")
        if self.end(died):
            self._on_death(self.ref, died)

    def join(self, deadline: float) -> None:
        """After ``end``: return when its threads have ended, or at ``deadline`` (``time.monotonic()``)."""
        if self.thread is not threading.current_thread():
            self.thread.join(max(0.0, deadline - time.monotonic()))
        self._late.join(max(0.0, deadline - time.monotonic()))


class InProcessBackend:
    """See ``backends/base.py`` for the contract."""

    name = "uniproc"

    def __init__(self) -> None:
        self.driver_node = socket.gethostname()
        self._workers: dict[str, _Worker] = {}
        self._on_failure: OnFailure | None = None
        self._lock = threading.Lock()
        self._closed = False

    def place(
        self, request: Placement, on_failure: OnFailure, timeout: float, progress: Progress | None = None
    ) -> Sequence[WorkerRef]:
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._closed:
                raise Shutdown("the backend has been shut down")
            self._on_failure = on_failure
            set_environment(request.env, request.env_overrides)
            for index in range(request.world_size):
                ref = WorkerRef(f"inprocess-{index}", self.driver_node, index=index, pid=os.getpid())
                self._workers[ref.id] = _Worker(ref, request.worker_class, self._died)
            workers = list(self._workers.values())
        try:
            for ready, worker in enumerate(workers):
                worker.ready.result(max(0.0, deadline - time.monotonic()))
                if progress:
                    progress(f"workers {ready + 1}/{len(workers)} ready")
        except TimeoutError:
            self.shutdown(0)
            raise PlacementError(
                f"{ready} of {len(workers)} workers ready within {timeout:g} s; "
                f"still constructing {request.worker_class}"
            ) from None
        except ConfigError:
            self.shutdown(0)
            raise
        except BaseException as error:
            self.shutdown(0)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise PlacementError(f"{ready} of {len(workers)} workers; {worker.ref.id}: {error!r}") from error
        return [worker.ref for worker in workers]

    def send(self, worker: WorkerRef, method: str, payload: Buffer, on_reply: OnReply) -> None:
        self.call(worker, method, payload).add_done_callback(functools.partial(tell, on_reply))

    def call(self, worker: WorkerRef, method: str, payload: Buffer) -> Future[Buffer]:
        answer: _Answer[Buffer] = _Answer()

        def run(instance: object) -> Callable[[], None] | None:
            reply = begin(instance, method, payload)
            if isinstance(reply, bytes):
                answer.give(reply)
                return None
            return lambda: answer.give(reply())

        self._workers[worker.id].submit(_Task(run, answer.fail))
        return answer

    def wait(self, future: Future[Any], timeout: float) -> None:
        wait_for(future, timeout)

    def compile(self, graph: Graph, timeout: float) -> BackendGraph:
        """Nothing is waited for: the workers' threads are given their steps with each execution."""
        _check(graph)
        compiled = _InProcessGraph(graph, self._workers)
        if (end := compiled.ended) is not None:
            raise end
        return compiled

    def _died(self, ref: WorkerRef, died: WorkerDied) -> None:
        with self._lock:
            report = None if self._closed else self._on_failure
        if report is not None:
            report(ref, died)

    def shutdown(self, timeout: float = 5.0) -> None:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.end(Shutdown("the backend has been shut down"))
        for worker in workers:
            worker.join(deadline)


class _Answer(Future[T]):
    """A future whose first result or error counts: an answer and its worker's end may come at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._first = threading.Lock()
        self.set_running_or_notify_cancel()

    def give(self, result: T) -> None:
        if self._first.acquire(blocking=False):
            self.set_result(result)

    def fail(self, error: _End) -> None:
        if self._first.acquire(blocking=False):
            self.set_exception(error)


def _check(graph: Graph) -> None:
    for node in graph.nodes:
        if node.transport != "auto":
            raise ConfigError(
                f"tensor transport {node.transport!r} of {node.method}: workers in one process hand values on in "
                "memory; use 'auto'"
            )
    if graph.buffer_size_bytes is not None:
        raise ConfigError("_buffer_size_bytes: workers in one process hand values on without buffers; leave it out")
    if graph.overlap_gpu_communication:
        raise ConfigError("_overlap_gpu_communication: workers in one process do not send; leave it out")


class _InProcessGraph:
    """See ``BackendGraph``."""

    def __init__(self, graph: Graph, workers: Mapping[str, _Worker]) -> None:
        self._graph = graph
        self._steps = {node.worker: list(steps(graph, node.worker)) for node in graph.nodes}
        self._workers = {name: workers[name] for name in self._steps}
        self._lock = threading.Lock()  # executions reach every worker in the same order
        self._pending: set[Future[list[Buffer]]] = set()

    @property
    def ended(self) -> _End | None:
        """Why it cannot be executed any more."""
        return next((worker.death for worker in self._workers.values() if worker.death is not None), None)

    def execute(self, inputs: Mapping[int | str | None, bytes]) -> Future[list[Buffer]]:
        execution = _Execution(self._graph, inputs)
        with self._lock:
            if (end := self.ended) is not None:
                execution.fail(end)
                return execution.future
            self._pending.add(execution.future)
            for name, mine in self._steps.items():
                self._workers[name].submit(
                    _Task(lambda instance, mine=mine: execution.run(mine, instance), execution.fail)  # type: ignore[misc]
                )
        execution.future.add_done_callback(self._pending.discard)
        return execution.future

    def teardown(self, timeout: float) -> None:
        waiting = concurrent.futures.wait(list(self._pending), timeout).not_done
        if waiting:
            raise RpcTimeout(f"tear-down: {len(waiting)} executions of the graph still running after {timeout:g} s")


class _Execution:
    """One run of a graph. Its workers meet here, each in its own thread."""

    def __init__(self, graph: Graph, inputs: Mapping[int | str | None, bytes]) -> None:
        self.future: _Answer[list[Buffer]] = _Answer()
        self._graph = graph
        self._outputs = graph.outputs
        self._inputs = inputs
        self._results: dict[int, bytes] = {}
        self._changed = threading.Condition()
        self._failed = False

    def fail(self, error: _End) -> None:
        self.future.fail(error)
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def run(self, mine: Sequence[Step], worker: object) -> None:
        """Run one worker's steps; gives up when the execution has failed."""
        kept: dict[int, Any] = {}
        for step in mine:
            values = []
            for source in step.sources:
                if isinstance(source, GraphInput) or source.node not in kept:
                    payload = self._await(source, step)
                    if payload is None:
                        return
                    values.append(load(payload, step.index))
                else:
                    values.append(kept[source.node])
            result = step.run(worker, values)
            if step.kept:
                kept[step.index] = result
            if step.sent:
                self._publish(step.index, dump(result, step.index))

    def _await(self, source: Source, step: Step) -> bytes | None:
        if isinstance(source, GraphInput):
            return None if self._failed else self._inputs[source.key]
        with self._changed:
            limit = self._graph.step_timeout
            come = self._changed.wait_for(lambda: self._failed or source.node in self._results, limit)
            if self._failed:
                return None
            if not come:
                late = f"{self._graph.nodes[source.node].method} of another worker gave no result within {limit:g} s"
                return encode_failure(RpcTimeout(late), step.index)
            return self._results[source.node]

    def _publish(self, node: int, payload: bytes) -> None:
        with self._changed:
            self._results[node] = payload
            self._changed.notify_all()
            done = all(output in self._results for output in self._outputs)
        if done and not self.future.done():
            self.future.give([self._results[output] for output in self._outputs])

"""The in-process backend: each worker is an object with a thread of its own in this process.

The default for a single worker, and the tests' fake for many: the same contract as the others, without processes. A
thread cannot be killed, so ``shutdown`` waits for a call that is running only as long as it is told to, and then leaves
the (daemon) thread to end with it.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from lightvllm.backends.base import OnFailure, Placement, Progress, WorkerRef, load_worker_class
from lightvllm.errors import ConfigError, PlacementError, Shutdown, WorkerDied
from lightvllm.messages import Buffer, invoke


class _Worker:
    """A worker's thread, which makes the object and then runs its calls one by one."""

    def __init__(self, ref: WorkerRef, worker_class: str, on_death: OnFailure) -> None:
        self.ref = ref
        self.ready: Future[None] = Future()
        self.death: WorkerDied | Shutdown | None = None
        self._worker_class = worker_class
        self._on_death = on_death
        self._calls: queue.SimpleQueue[tuple[Future[Buffer], str, Buffer] | None] = queue.SimpleQueue()
        self._guard = threading.Lock()  # orders "put a call" against "the worker is gone"
        self._current: Future[Buffer] | None = None
        self.thread = threading.Thread(target=self._run, name=f"lightvllm-{ref.id}", daemon=True)
        self.thread.start()

    def submit(self, method: str, payload: Buffer) -> Future[Buffer]:
        future: Future[Buffer] = Future()
        future.set_running_or_notify_cancel()
        with self._guard:
            if self.death is None:
                self._calls.put((future, method, payload))
                return future
        future.set_exception(self.death)
        return future

    def end(self, error: WorkerDied | Shutdown) -> bool:
        """Fail what is pending and refuse what comes; False if that has happened before."""
        with self._guard:
            if self.death is not None:
                return False
            self.death = error
        pending = [self._current]
        while not self._calls.empty():
            call = self._calls.get_nowait()
            pending.append(call[0] if call else None)
        self._calls.put(None)
        for future in pending:
            if future is not None and not future.done():
                future.set_exception(error)
        return True

    def _run(self) -> None:
        try:
            worker = load_worker_class(self._worker_class)()
        except BaseException as error:  # noqa: BLE001  handed to place()
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        while (call := self._calls.get()) is not None:
            future, method, payload = call
            self._current = future
            try:
                reply = invoke(worker, method, payload)
            except BaseException as error:  # noqa: BLE001  SystemExit and the like: the worker's end
                died = WorkerDied(self.ref.id, f"its thread ended with {error!r}")
                if self.end(died):
                    self._on_death(self.ref, died)
                return
            with self._guard:
                self._current = None
                if not future.done():
                    future.set_result(reply)


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
            for key, value in request.env.items():
                os.environ.setdefault(key, value)
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

    def call(self, worker: WorkerRef, method: str, payload: Buffer) -> Future[Buffer]:
        return self._workers[worker.id].submit(method, payload)

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
            if worker.thread is not threading.current_thread():
                worker.thread.join(max(0.0, deadline - time.monotonic()))

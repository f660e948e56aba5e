"""A compiled graph on Ray: ``ray.dag`` compiles it and runs its loops; the driver's end of its channels is here.

Ray's own driver end is not used: it may lose what it has read of several outputs when a time-out comes between, lets a
reference be got no more after one, bounds a get by its own setting, and hears of a death only through it. Here
channels are written and read directly, one thread at a time reads, in order, and whoever waits for a result is the
thread that reads (``RayGraph.wait``). A thread of its own reads where nobody waits and a callback is to be called.

Every value begins with a header (``host.Program``): the workers take their turns by it, and the driver sees by it that
a result is that of the execution which it belongs to.
"""

from __future__ import annotations

import collections
import logging
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from lightvllm.backends.base import Graph, GraphInput
from lightvllm.backends.program import sources
from lightvllm.backends.ray import cluster
from lightvllm.backends.ray.cluster import one_line
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout, Shutdown, WorkerDied
from lightvllm.messages import Buffer

logger = logging.getLogger(__name__)

MAX_GRAPHS = 16
"""Graphs that a worker can be part of at once: each has a thread there."""

BUFFER_SIZE_BYTES = 128 * 2**10
"""Initial size of a buffer; a channel has ``max_inflight_executions`` of them, and Ray makes one larger when needed."""

_SLICE = 0.05  # seconds of reading between two looks at whether the graph has been ended
_REASON_SECONDS = 1.0  # between a channel's closing and the reason's being known
_PARKED_SECONDS = 1.0  # how long the background reader stays without work
_building = threading.Lock()  # Ray's compiler is not made for several threads


class GraphFuture(Future[list[Buffer]]):
    """The future of an execution. Its results are read when somebody shows interest."""

    def __init__(self, graph: RayGraph) -> None:
        super().__init__()
        self._graph = graph
        self._first = threading.Lock()
        self.set_running_or_notify_cancel()

    def wait(self, timeout: float) -> None:
        self._graph.wait(self, timeout)

    def settle(self, outcome: list[Buffer] | LightvllmError) -> None:
        """The first one counts."""
        if not self._first.acquire(blocking=False):
            return
        if isinstance(outcome, LightvllmError):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)

    def result(self, timeout: float | None = None) -> list[Buffer]:
        self.wait(threading.TIMEOUT_MAX if timeout is None else timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.wait(threading.TIMEOUT_MAX if timeout is None else timeout)
        return super().exception(0)

    def add_done_callback(self, fn: Callable[[Future[list[Buffer]]], object]) -> None:
        super().add_done_callback(fn)
        if not self.done():
            self._graph.read_in_background()


class _Execution:
    def __init__(self, future: GraphFuture, header: bytes, numbers: Sequence[range]) -> None:
        self.future = future
        self.header = header
        self.numbers = numbers  # the turns of its steps, for each worker of the graph
        self.results: list[Buffer] = []  # of the channels that have been read


class Part:
    """A worker of the graph, as the backend sees it. ``take_numbers(count)`` gives the turns of the next ``count``
    calls, and raises what the worker has ended with."""

    def __init__(self, worker: str, handle: Any, steps: int, take_numbers: Callable[[int], range]) -> None:
        self.worker = worker
        self.handle = handle
        self.steps = steps
        self.take_numbers = take_numbers


class RayGraph:
    """See ``BackendGraph``.

    Args:
        order: held while turns are taken at several workers, so that all graphs' executions meet in one order.
        on_disposed: called when nothing is left of it in Ray.

    Attributes:
        ended: gets done when it cannot be executed any more, with the reason.
    """

    def __init__(
        self,
        graph: Graph,
        parts: Sequence[Part],
        order: threading.Lock,
        on_disposed: Callable[[RayGraph], None],
    ) -> None:
        self.ended: Future[LightvllmError] = Future()
        self.ended.set_running_or_notify_cancel()
        self._on_disposed = on_disposed
        self._graph = graph
        self._parts = parts
        self._order = order
        self._name = uuid.uuid4().hex
        self._pack_header = struct.Struct(f"<{len(parts)}Q").pack
        self._header_bytes = 8 * len(parts)
        self._outputs = list(dict.fromkeys(graph.outputs))
        self._dag: Any = None
        self._writers: list[tuple[int | str | None, Any]] = []
        self._readers: list[Any] = []
        self._state = threading.Condition()  # guards what follows
        self._pending: collections.deque[_Execution] = collections.deque()
        self._reading = False  # a thread reads
        self._background: threading.Thread | None = None
        self._end: LightvllmError | None = None
        self._disposing: Future[None] | None = None

    @property
    def end(self) -> LightvllmError | None:
        """Why it cannot be executed any more."""
        return self._end

    # ------------------------------------------------------------------------------------------------ building

    def build(self) -> None:
        """Have the workers learn it, and start Ray's loops. Blocks as long as they are busy; raises Ray's errors."""
        ray = cluster.import_ray()
        from ray.dag import InputNode, MultiOutputNode

        from lightvllm.backends.ray.channel import PatientMemory

        # It tells what it does at a death, and that it failed to ask the dead; whoever needs to know is told by us.
        logging.getLogger("ray.dag.compiled_dag_node").setLevel(logging.CRITICAL)
        ray.get(
            [
                part.handle.learn.remote(self._name, self._graph, part.worker, position, self._header_bytes)
                for position, part in enumerate(self._parts)
            ]
        )
        graph = self._graph
        handles = {part.worker: part.handle for part in self._parts}
        keys = list(dict.fromkeys(s.key for node in graph.nodes for s in sources(node) if isinstance(s, GraphInput)))
        memory = PatientMemory(
            buffer_size_bytes=graph.buffer_size_bytes or BUFFER_SIZE_BYTES,
            num_shm_buffers=graph.max_inflight_executions,
        )
        with _building:
            nodes: list[Any] = []
            with InputNode() as given:
                inputs = {key: given[f"input{number}"] for number, key in enumerate(keys)}
                for index, node in enumerate(graph.nodes):
                    arguments = [inputs[s.key] if isinstance(s, GraphInput) else nodes[s.node] for s in sources(node)]
                    nodes.append(handles[node.worker].step.bind(self._name, index, *arguments))
            for made in (*inputs.values(), *nodes):
                made.type_hint = memory
            dag = MultiOutputNode([nodes[index] for index in self._outputs]).experimental_compile(
                _max_inflight_executions=graph.max_inflight_executions
            )
        task = dag.idx_to_task[dag.input_task_idx]
        by_name = dict(zip(task.output_idxs, task.output_channels, strict=True))
        with self._state:
            self._writers = [(key, by_name[f"input{number}"]) for number, key in enumerate(keys)]
            self._readers = list(dag.dag_output_channels)
            self._dag = dag
            ended = self._end is not None
        if ended:
            self.dispose()

    # ----------------------------------------------------------------------------------------------- executing

    def execute(self, inputs: Mapping[int | str | None, bytes]) -> Future[list[Buffer]]:
        future = GraphFuture(self)
        with self._order:
            numbers: list[range] = []
            try:
                for part in self._parts:
                    numbers += [part.take_numbers(part.steps)]  # those taken are to be skipped if the next one fails
                header = self._pack_header(*(some.start for some in numbers))
                with self._state:
                    if self._end is not None:
                        raise self._end
                    self._pending.append(_Execution(future, header, numbers))
            except LightvllmError as end:
                self._skip([numbers], end)
                future.settle(end)
                return future
            for key, channel in self._writers:
                if not self._write(channel, header + inputs[key]):
                    break  # it has been ended, and the future with it
        return future

    def _write(self, channel: Any, value: bytes) -> bool:
        from ray.exceptions import RayChannelTimeoutError

        while self._end is None:
            try:
                channel.write(value, 1.0)  # only readers on other nodes have no free buffer at times
                return True
            except RayChannelTimeoutError:
                pass
            except Exception as error:  # noqa: BLE001  Ray's, which may not come out
                self._broken(error)
        return False

    # ------------------------------------------------------------------------------------------------- reading

    def wait(self, future: Future[Any], timeout: float) -> None:
        """Return when ``future``, of this graph, is done, or after ``timeout`` seconds; reads, unless another does."""
        deadline = time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        while not future.done():
            with self._state:
                if self._reading:
                    left = max(0.0, deadline - time.monotonic())
                    if not self._state.wait_for(lambda: future.done() or not self._reading, left):
                        return
                    continue
                self._reading = True
            try:
                self._read(future, deadline)
            finally:
                with self._state:
                    self._reading = False
                    self._state.notify_all()
            if time.monotonic() >= deadline:
                return

    def _read(self, future: Future[Any], deadline: float) -> None:
        """Read results in order until ``future`` is done or time is up."""
        from ray.exceptions import RayChannelTimeoutError

        while not future.done():
            with self._state:
                if not self._pending:
                    return None
                execution = self._pending[0]
            while len(execution.results) < len(self._readers):
                left = max(0.0, deadline - time.monotonic())
                try:
                    value = self._readers[len(execution.results)].read(min(left, _SLICE))
                except RayChannelTimeoutError:
                    if self._end is not None or left == 0.0:
                        return None
                    continue
                except Exception as error:  # noqa: BLE001  Ray's, which may not come out
                    return self._broken(error)
                if value[: self._header_bytes] != execution.header:
                    return self.fail(LightvllmError("a result came that belongs to another execution; compile it anew"))
                execution.results.append(memoryview(value)[self._header_bytes :])
            by_node = dict(zip(self._outputs, execution.results, strict=True))
            with self._state:
                if self._end is None:
                    self._pending.popleft()
            execution.future.settle([by_node[node] for node in self._graph.outputs])
            with self._state:
                self._state.notify_all()
        return None

    def read_in_background(self) -> None:
        """Have what is pending read by a thread of its own."""
        with self._state:
            if self._background is not None:
                self._state.notify_all()
                return
            self._background = threading.Thread(target=self._read_all, name="lightvllm-ray-graph", daemon=True)
            self._background.start()

    def _read_all(self) -> None:
        while True:
            with self._state:
                if not self._state.wait_for(lambda: self._pending or self._end is not None, _PARKED_SECONDS):
                    self._background = None
                    return
                if self._end is not None:
                    return
                last = self._pending[-1].future
            self.wait(last, threading.TIMEOUT_MAX)

    # --------------------------------------------------------------------------------------------------- ends

    def _broken(self, error: BaseException) -> None:
        """A channel failed: a worker's death, which is told in a moment, or something else of Ray's."""
        with self._state:
            if self._state.wait_for(lambda: self._end is not None, _REASON_SECONDS):
                return
        self.fail(LightvllmError(f"Ray's channel of the graph failed: {one_line(error)}; compile it anew"))

    def fail(self, end: LightvllmError) -> None:
        """End it: fail what is pending, and have the workers that are left go on without it. The first end counts."""
        with self._state:
            if self._end is not None:
                return
            self._end = end
            self.ended.set_result(end)
            pending, self._pending = list(self._pending), collections.deque()
            self._state.notify_all()
        for execution in pending:
            execution.future.settle(end)
        with self._state:
            self._state.notify_all()
        self._skip([execution.numbers for execution in pending], end)
        self.dispose()

    def _skip(self, executions: Sequence[Sequence[range]], end: LightvllmError) -> None:
        """Tell the workers which numbers will not come; after a shutdown there is nobody to tell."""
        if isinstance(end, Shutdown) or not executions:
            return
        for part, *numbers in zip(self._parts, *executions, strict=False):
            try:
                part.handle.skip.options(concurrency_group="control").remote(numbers)
            except Exception as error:  # noqa: BLE001  it is dead, or Ray is
                logger.debug("%s was not told to go on: %s", part.worker, one_line(error))

    def dispose(self) -> Future[None]:
        """Begin to undo what ``build`` has done."""
        with self._state:
            if self._disposing is None or self._dag is not None:
                dag, self._dag = self._dag, None
                self._disposing = cluster.in_thread(lambda: self._dispose(dag))
            return self._disposing

    def _dispose(self, dag: Any) -> None:
        if dag is None:  # ``build`` will see that it has been ended
            return
        try:
            dag.teardown()
            cluster.import_ray().kill(dag._proxy_actor)  # Ray leaves it to the garbage collector
            if not isinstance(self._end, Shutdown):
                for part in self._parts:
                    part.handle.forget.options(concurrency_group="control").remote(self._name)
        except Exception as error:  # noqa: BLE001
            logger.warning("Ray did not tear a compiled graph down: %s", one_line(error))
        self._on_disposed(self)

    def teardown(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._state:
            pending = list(self._pending)
        if pending:
            self.wait(pending[-1].future, timeout)
            if not pending[-1].future.done():
                raise RpcTimeout(f"tear-down: executions of the graph still running after {timeout:g} s")
        if isinstance(self._end, WorkerDied | Shutdown):
            return
        with self._state:
            if self._end is None:
                self._end = ConfigError("the graph has been torn down")
                self.ended.set_result(self._end)
            self._state.notify_all()
        try:
            self.dispose().result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise RpcTimeout(f"tear-down: Ray's loops still running after {timeout:g} s") from None

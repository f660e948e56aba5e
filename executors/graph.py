"""Compiled graphs: a static graph of worker calls, written once, executed many times. Ray's names and meaning.

    with InputNode() as inp:
        hidden = executor.handles[0].forward.bind(inp)
        output = executor.handles[1].forward.bind(hidden)
    graph = output.experimental_compile()
    refs = [graph.execute(batch) for batch in batches]
    results = [ref.get() for ref in refs]
    graph.teardown()

Here is what the author of a graph and its caller see: building, checks, bounds, references to results. How the workers
learn the graph and hand values on is the backend's business (``Backend.compile``). docs/graphs.md says what differs
from Ray's (``ray.dag`` of 2.60), and between backends. Imported as ``lightvllm.executors.graph``.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn, Protocol, Self, get_args

from lightvllm.backends.base import (
    BackendGraph,
    Graph,
    GraphArgument,
    GraphConstant,
    GraphInput,
    GraphNode,
    GraphResult,
    TensorTransport,
    WorkerRef,
)
from lightvllm.errors import ConfigError, GraphCapacityExceeded, LightvllmError, RpcTimeout
from lightvllm.messages import Buffer, decode_value, encode_value

SUBMIT_TIMEOUT = 10.0
MAX_INFLIGHT_EXECUTIONS = 10
MAX_BUFFERED_RESULTS = 1000


class GraphExecutor(Protocol):
    """What a graph needs of the executor whose workers it uses; ``DistributedExecutor`` has it."""

    @property
    def step_timeout(self) -> float: ...

    @property
    def rpc_timeout(self) -> float: ...

    def compile_graph(self, graph: Graph) -> BackendGraph:
        """Raises what ``Backend.compile`` does, or what the executor has failed with."""

    def execute_graph(self, graph: BackendGraph, inputs: Mapping[int | str | None, bytes]) -> Future[list[Buffer]]:
        """Raises what the executor has failed with. The future's WorkerDied carries no rank."""

    def wait(self, future: Future[Any], timeout: float) -> None: ...

    def ranked(self, error: LightvllmError) -> LightvllmError:
        """``error``; a WorkerDied with the rank of its worker."""


# ---------------------------------------------------------------------------------------------------- authoring


class DAGNode:
    """Something that stands for a value in a graph. It is used as an argument of ``bind``, on its own or as a keyword
    argument, but not inside a list or another object."""

    def __init__(self) -> None:
        self._order = next(_order)
        self._users: list[DAGNode] = []

    def _uses(self) -> Sequence[DAGNode]:
        return ()

    def __repr__(self) -> str:
        return f"<{self._describe()}>"

    def _describe(self) -> str:
        return type(self).__name__

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            f"{self!r} stands for a value of the graph and cannot be pickled or copied; pass it to bind() as an "
            "argument of its own, not inside another object"
        )


_order = itertools.count()


class InputNode(DAGNode):
    """What ``execute`` is given. Either all of it, one positional argument, or its arguments one by one: ``inp[0]`` is
    the first positional argument, ``inp.name`` and ``inp["name"]`` are keyword arguments; not both in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self._attributes: dict[int | str, InputAttributeNode] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The block only shows where the graph is written."""

    def __getitem__(self, key: int | str) -> InputAttributeNode:
        if not isinstance(key, str) and (type(key) is not int or key < 0):
            raise ConfigError(
                f"InputNode()[{key!r}]: give the position (0, 1, …) or the name of an argument of execute"
            )
        if key not in self._attributes:
            self._attributes[key] = InputAttributeNode(self, key)
        return self._attributes[key]

    def __iter__(self) -> Iterator[Any]:
        raise ConfigError("InputNode() cannot be unpacked; take its arguments one by one: inp[0], inp.name")

    def __getattr__(self, name: str) -> InputAttributeNode:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]


class InputAttributeNode(DAGNode):
    """One argument of ``execute``."""

    def __init__(self, input_node: InputNode, key: int | str) -> None:
        super().__init__()
        self._input_node = input_node
        self._key = key

    def _uses(self) -> Sequence[DAGNode]:
        return (self._input_node,)

    def _describe(self) -> str:
        return f"InputNode()[{self._key!r}]"


class _OutputNode(DAGNode):
    """A node that can be the whole graph's result."""

    _compiled = False

    def experimental_compile(
        self,
        _submit_timeout: float | None = None,
        _buffer_size_bytes: int | None = None,
        enable_asyncio: bool = False,
        _max_inflight_executions: int = MAX_INFLIGHT_EXECUTIONS,
        _max_buffered_results: int = MAX_BUFFERED_RESULTS,
        _overlap_gpu_communication: bool = False,
    ) -> CompiledDAG:
        """Have the workers learn the graph that this node is the result of.

        Args:
            _submit_timeout: seconds that ``execute`` waits, where all executions in flight are of dropped refs and only
                have to come to their end; None for 10, -1 for ever.
            _buffer_size_bytes: initial size of a channel's buffers, on Ray; they grow by themselves. Elsewhere there
                are none, and it is refused.
            enable_asyncio: use ``execute_async`` in place of ``execute``.
            _max_inflight_executions: executions that may have been begun and neither been got nor come before one that
                was got; one more raises GraphCapacityExceeded.
            _max_buffered_results: results that may be left behind by getting a later one first; getting that raises
                GraphCapacityExceeded if there would be more.
            _overlap_gpu_communication: on Ray with NCCL: overlap communication with computing.

        Raises:
            ConfigError: the graph is malformed (says where), has been compiled already, or asks for what its backend
                cannot do.
            WorkerDied, RpcTimeout, Shutdown: the workers could not learn it.
        """
        if self._compiled:
            raise ConfigError(
                "experimental_compile was called on this node before; use that compiled graph, or build another one"
            )
        _check_option("_submit_timeout", _submit_timeout, lambda v: v is None or v >= 0 or v == -1, "seconds or -1")
        _check_option("_buffer_size_bytes", _buffer_size_bytes, lambda v: v is None or _positive(v), "a positive int")
        _check_option("_max_inflight_executions", _max_inflight_executions, _positive, "a positive int")
        _check_option("_max_buffered_results", _max_buffered_results, _positive, "a positive int")
        program = _Program(self)
        made = CompiledDAG(
            program,
            program.executor.compile_graph(
                Graph(
                    nodes=tuple(program.nodes),
                    outputs=tuple(program.outputs),
                    max_inflight_executions=_max_inflight_executions,
                    buffer_size_bytes=_buffer_size_bytes,
                    overlap_gpu_communication=_overlap_gpu_communication,
                    step_timeout=program.executor.step_timeout,
                )
            ),
            submit_timeout=SUBMIT_TIMEOUT if _submit_timeout is None else _submit_timeout,
            enable_asyncio=enable_asyncio,
            max_inflight_executions=_max_inflight_executions,
            max_buffered_results=_max_buffered_results,
        )
        self._compiled = True
        return made


class ClassMethodNode(_OutputNode):
    """A call of a worker's method: ``handle.method.bind(...)``. It stands for the method's result."""

    def __init__(self, handle: WorkerHandle, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self._handle = handle
        self._method = method
        self._args = [self._fixed(value) for value in args]
        self._kwargs = {name: self._fixed(value) for name, value in kwargs.items()}
        self._transport: TensorTransport = "auto"
        for value in self._uses():
            value._users.append(self)

    def with_tensor_transport(self, transport: TensorTransport = "auto") -> Self:
        """How the result travels to other workers. A backend that does not have it refuses it at compilation."""
        if transport not in get_args(TensorTransport):
            raise ConfigError(f"transport={transport!r}; use one of {', '.join(map(repr, get_args(TensorTransport)))}")
        self._transport = transport
        return self

    def _fixed(self, value: Any) -> DAGNode | GraphConstant:
        if isinstance(value, DAGNode):
            return value
        try:
            return GraphConstant(encode_value(value))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{self!r}: a constant {type(value).__name__} cannot be pickled: {error}") from error

    def _uses(self) -> Sequence[DAGNode]:
        return [value for value in (*self._args, *self._kwargs.values()) if isinstance(value, DAGNode)]

    def _describe(self) -> str:
        return f"{self._method} of rank {self._handle.rank}"


class MultiOutputNode(_OutputNode):
    """Several results: ``execute`` gives a list of refs, one for each of ``nodes``."""

    def __init__(self, nodes: Sequence[DAGNode]) -> None:
        super().__init__()
        self._nodes = list(nodes)
        for node in self._nodes:
            if not isinstance(node, ClassMethodNode):
                raise ConfigError(f"MultiOutputNode holds {node!r}; expected what bind() returned")
            node._users.append(self)

    def _uses(self) -> Sequence[DAGNode]:
        return self._nodes


class WorkerHandle:
    """A worker of an executor (``executor.handles``); ``handle.method.bind(...)`` makes a node of a method of it."""

    def __init__(self, executor: GraphExecutor, worker: WorkerRef, rank: int) -> None:
        self._executor = executor
        self._worker = worker
        self.rank = rank

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self, name)

    def __repr__(self) -> str:
        return f"<worker of rank {self.rank}>"


class _Method:
    def __init__(self, handle: WorkerHandle, name: str) -> None:
        self._handle = handle
        self._name = name

    def bind(self, *args: Any, **kwargs: Any) -> ClassMethodNode:
        """A node that calls the method with these arguments, each a DAGNode or a constant, which is pickled here.

        Raises ConfigError for a constant that cannot be pickled or has a DAGNode in it.
        """
        return ClassMethodNode(self._handle, self._name, args, kwargs)


class _Program:
    """A graph as written, checked and turned into a ``Graph``.

    Attributes:
        executor: whose workers it uses.
        nodes, outputs: as in ``Graph``.
        ranks: of the workers of ``nodes``.
        num_args: positional arguments of ``execute``.
        names: keyword arguments of ``execute``.
        keys: what the workers are to be given, of ``GraphInput.key``.
        returns_list: it was a MultiOutputNode.
    """

    def __init__(self, output: _OutputNode) -> None:
        connected = _connected(output)
        calls = [node for node in connected if isinstance(node, ClassMethodNode)]
        self._check_shape(output, connected, calls)
        self._check_input(connected)
        self.executor = calls[0]._handle._executor
        self._position = {id(call): index for index, call in enumerate(calls)}
        self.nodes = [
            GraphNode(
                worker=call._handle._worker.id,
                method=call._method,
                args=tuple(self._argument(value, call) for value in call._args),
                kwargs={name: self._argument(value, call) for name, value in call._kwargs.items()},
                transport=call._transport,
            )
            for call in calls
        ]
        self.ranks = [call._handle.rank for call in calls]
        self.returns_list = isinstance(output, MultiOutputNode)
        results = output._uses() if isinstance(output, MultiOutputNode) else [output]
        self.outputs = [self._position[id(node)] for node in results]

    @staticmethod
    def _check_shape(output: DAGNode, connected: list[DAGNode], calls: list[ClassMethodNode]) -> None:
        if not calls:
            raise ConfigError(f"{output!r} has no outputs; a graph needs a call: handle.method.bind(...)")
        if others := [node for node in connected if isinstance(node, MultiOutputNode) and node is not output]:
            raise ConfigError(f"the graph has another {others[0]!r} than the node that is compiled; compile that one")
        for call in calls:
            if not call._uses():
                raise ConfigError(
                    f"{call!r} takes neither the input nor the result of another node, so nothing says when to run it; "
                    "bind it to one"
                )
            if not call._users and call is not output:
                raise ConfigError(
                    f"nobody would see whether {call!r} failed: its result is neither used nor an output; "
                    "put it into the MultiOutputNode"
                )
        executors = {id(call._handle._executor) for call in calls}
        if len(executors) > 1:
            raise ConfigError("the graph uses workers of several executors; it must be of one")

    def _check_input(self, connected: list[DAGNode]) -> None:
        inputs = [node for node in connected if isinstance(node, InputNode)]
        if len(inputs) != 1:
            raise ConfigError(f"the graph has {len(inputs)} InputNodes; it needs exactly one")
        (given,) = inputs
        direct = bool(given._users)
        if direct and given._attributes:
            raise ConfigError(
                "the graph uses InputNode() both as a whole and by its arguments; use only inp, or only inp[0], inp.x"
            )
        for attribute in given._attributes.values():
            if not attribute._users:
                raise ConfigError(f"{attribute!r} is not used by any node; use it or do not ask for it")
        positions = {key for key in given._attributes if isinstance(key, int)}
        self.num_args = 1 if direct else max(positions, default=-1) + 1
        self.names = {key for key in given._attributes if isinstance(key, str)}
        self.keys: list[int | str | None] = [None] if direct else list(given._attributes)

    def _argument(self, value: DAGNode | GraphConstant, call: ClassMethodNode) -> GraphArgument:
        if isinstance(value, GraphConstant):
            return value
        if isinstance(value, InputNode):
            return GraphInput()
        if isinstance(value, InputAttributeNode):
            return GraphInput(value._key)
        if isinstance(value, MultiOutputNode):
            raise ConfigError(f"{call!r} uses a {value!r}; it can only be the graph's result")
        return GraphResult(self._position[id(value)])


def _connected(output: DAGNode) -> list[DAGNode]:
    """All nodes of the graph that ``output`` is in, in the order in which they were written."""
    found: dict[int, DAGNode] = {}
    frontier = [output]
    while frontier:
        node = frontier.pop()
        if id(node) in found:
            continue
        found[id(node)] = node
        frontier += [*node._uses(), *node._users]
        if isinstance(node, InputNode):
            frontier += node._attributes.values()
    return sorted(found.values(), key=lambda node: node._order)


def _check_option(name: str, value: Any, good: Callable[[Any], bool], expected: str) -> None:
    if not good(value):
        raise ConfigError(f"{name}={value!r}; expected {expected}")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# ----------------------------------------------------------------------------------------------------- execution


class _Run:
    """One execution: its future, and which of its outputs somebody may still want."""

    def __init__(self, future: Future[list[Buffer]], outputs: int) -> None:
        self.future = future
        self.wanted = set(range(outputs))


class CompiledDAG:
    """A graph that its workers know. Made by ``experimental_compile``; may be used from any thread."""

    def __init__(
        self,
        program: _Program,
        graph: BackendGraph,
        *,
        submit_timeout: float,
        enable_asyncio: bool,
        max_inflight_executions: int,
        max_buffered_results: int,
    ) -> None:
        self._program = program
        self._executor = program.executor
        self._graph = graph
        self._submit_timeout = threading.TIMEOUT_MAX if submit_timeout == -1 else submit_timeout
        self._enable_asyncio = enable_asyncio
        self._max_inflight = max_inflight_executions
        self._max_buffered = max_buffered_results
        self._lock = threading.Lock()  # guards what follows
        self._runs: dict[int, _Run] = {}  # those of which somebody may still want something, by index
        self._next = 0  # index of the next execution
        self._finished = 0  # executions below this index have been got, or come before one that was
        self._is_teardown = False
        # Written by destructors, which may run anywhere, even in this thread while it holds the lock.
        self._dropped: collections.deque[tuple[int, int]] = collections.deque()

    @property
    def is_teardown(self) -> bool:
        """Whether ``teardown`` was called."""
        return self._is_teardown

    def execute(self, *args: Any, **kwargs: Any) -> CompiledDAGRef | list[CompiledDAGRef]:
        """Begin an execution; returns at once. A ref to its result, or a list of refs for a MultiOutputNode.

        Raises:
            ConfigError: not what the graph's InputNode asks for, or it cannot be pickled; the graph was torn down.
            GraphCapacityExceeded: ``_max_inflight_executions`` have been begun and not been got.
            RpcTimeout: those in flight are of dropped refs and did not end within ``_submit_timeout``.
            WorkerDied, Shutdown: as for every call of the executor.
        """
        if self._enable_asyncio:
            raise ConfigError("the graph was compiled with enable_asyncio=True; use execute_async")
        inputs = self._inputs(args, kwargs)
        deadline = time.monotonic() + self._submit_timeout
        while (index := self._submit(inputs)) is None:
            oldest = self._oldest()
            if oldest is not None:
                self._executor.wait(oldest, self._remaining(deadline))
        refs = [CompiledDAGRef(self, index, output) for output in range(len(self._program.outputs))]
        return refs if self._program.returns_list else refs[0]

    async def execute_async(self, *args: Any, **kwargs: Any) -> CompiledDAGFuture | list[CompiledDAGFuture]:
        """``execute`` for asyncio: what it gives is awaited. Raises as ``execute`` does."""
        if not self._enable_asyncio:
            raise ConfigError("the graph was compiled without enable_asyncio=True; use execute")
        inputs = self._inputs(args, kwargs)
        deadline = time.monotonic() + self._submit_timeout
        while (index := self._submit(inputs)) is None:
            oldest = self._oldest()
            if oldest is not None:
                await asyncio.wait([asyncio.wrap_future(oldest)], timeout=self._remaining(deadline))
        futures = [CompiledDAGFuture(self, index, output) for output in range(len(self._program.outputs))]
        return futures if self._program.returns_list else futures[0]

    def teardown(self) -> None:
        """Have the workers forget the graph when they have done what is in flight; they can be used as before.

        Refs that have not been got can still be. Idempotent. Raises RpcTimeout if it takes longer than the executor's
        ``rpc_timeout``; it may be called again then.
        """
        with self._lock:
            self._is_teardown = True
        self._graph.teardown(self._executor.rpc_timeout)

    # ------------------------------------------------------------------------------------------------------ inside

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str | None, bytes]:
        program = self._program
        if len(args) != program.num_args or kwargs.keys() != program.names:
            expected = [f"{program.num_args} positional argument{'s' * (program.num_args != 1)}"]
            expected += [f"{name}=" for name in sorted(program.names)]
            got = [f"{len(args)} positional", *(f"{name}=" for name in sorted(kwargs))]
            raise ConfigError(
                f"execute was given {', '.join(got)}; the graph's InputNode asks for {', '.join(expected)}"
            )
        given: dict[int | str | None, Any] = {None: args[0] if args else None}
        given.update(enumerate(args))
        given.update(kwargs)
        try:
            return {key: encode_value(given[key]) for key in program.keys}
        except LightvllmError:
            raise
        except Exception as error:
            raise ConfigError(f"an argument of execute cannot be pickled: {error}") from error

    def _submit(self, inputs: Mapping[int | str | None, bytes]) -> int | None:
        """The index of the new execution, or None where one of dropped refs must end first."""
        with self._lock:
            if self._is_teardown:
                raise ConfigError("the graph has been torn down; build and compile another one")
            self._sweep()
            if self._next - self._finished >= self._max_inflight:
                if not self._runs[self._finished].wanted:
                    return None
                raise GraphCapacityExceeded(
                    f"{self._next - self._finished} executions are in flight, as many as _max_inflight_executions "
                    "allows; get a result first, or compile with a larger _max_inflight_executions"
                )
            index = self._next
            future = self._executor.execute_graph(self._graph, inputs)
            self._runs[index] = _Run(future, len(self._program.outputs))
            self._next += 1
            return index

    def _oldest(self) -> Future[list[Buffer]] | None:
        with self._lock:
            run = self._runs.get(self._finished)
            return run.future if run is not None else None

    def _remaining(self, deadline: float) -> float:
        remaining = deadline - time.monotonic()
        if remaining < 0:
            raise RpcTimeout(
                "execute: the executions in flight, of refs that were dropped, did not end within "
                f"{self._submit_timeout:g} s"
            )
        return min(remaining, threading.TIMEOUT_MAX)

    def _sweep(self) -> None:
        """Forget what nobody wants any more. With the lock held."""
        while self._dropped:
            index, output = self._dropped.popleft()
            if index in self._runs:
                self._runs[index].wanted.discard(output)
                self._forget(index)
        while (run := self._runs.get(self._finished)) is not None and not run.wanted and run.future.done():
            self._finished += 1
            self._forget(self._finished - 1)

    def _forget(self, index: int) -> None:
        run = self._runs[index]
        if not run.wanted and index < self._finished:
            del self._runs[index]

    def _future(self, index: int) -> Future[list[Buffer]]:
        with self._lock:
            return self._runs[index].future

    def _take(self, index: int, output: int) -> Any:
        """An output of an execution that is done, or its error. GraphCapacityExceeded leaves it as it was."""
        with self._lock:
            run = self._runs[index]
            self._sweep()
            left = sum(bool(other.wanted) for number, other in self._runs.items() if number < index)
            if index >= self._finished and left >= self._max_buffered:
                raise GraphCapacityExceeded(
                    f"{left} earlier results have not been got, as many as _max_buffered_results allows; get them "
                    "first, drop their refs, or compile with a larger _max_buffered_results"
                )
            run.wanted.discard(output)
            self._finished = max(self._finished, index + 1)
            for number in [number for number in self._runs if number <= index]:
                self._forget(number)
        try:
            payload = run.future.result(0)[output]
        except LightvllmError as error:
            raise self._executor.ranked(error) from None
        node = self._program.outputs[output]
        try:
            return decode_value(payload, self._origin)
        except LightvllmError:
            raise
        except Exception as error:
            raise LightvllmError(
                f"the result of {self._program.nodes[node].method} of rank {self._program.ranks[node]} cannot be read: "
                f"{error!r}"
            ) from error

    def _origin(self, node: int | None) -> tuple[int | None, str]:
        if node is None:
            return None, "a node of the graph"
        return self._program.ranks[node], self._program.nodes[node].method


class _Reference:
    """An output of an execution, which can be had once."""

    def __init__(self, graph: CompiledDAG, index: int, output: int) -> None:
        self._graph = graph
        self._index = index
        self._output = output
        self._taken = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of execution {self._index}, output {self._output}>"

    def __copy__(self) -> NoReturn:
        raise ConfigError(f"a {type(self).__name__} cannot be copied; get its result, and copy that")

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise ConfigError(f"a {type(self).__name__} cannot be deep copied; get its result, and copy that")

    def __reduce__(self) -> NoReturn:
        raise ConfigError(f"a {type(self).__name__} cannot be pickled; get its result, and send that")

    def __del__(self) -> None:
        if not self._taken:
            self._graph._dropped.append((self._index, self._output))

    def _check_not_taken(self, how: str) -> None:
        if self._taken:
            raise ConfigError(f"{self!r} has been {how} already, which can be done once; keep the result")

    def _take(self) -> Any:
        try:
            value = self._graph._take(self._index, self._output)
        except GraphCapacityExceeded:
            raise
        except BaseException:
            self._taken = True
            raise
        self._taken = True
        return value

    def _timed_out(self, limit: float) -> RpcTimeout:
        methods = sorted({self._graph._program.nodes[self._graph._program.outputs[self._output]].method})
        return RpcTimeout(f"no result of {methods[0]} within {limit:g} s; the graph may still be executing, try again")


class CompiledDAGRef(_Reference):
    """A reference to one result of an execution. It can be got once, and be neither copied nor pickled."""

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the result.

        Args:
            timeout: seconds; None for the executor's ``step_timeout``, 0 to look only, -1 for ever.

        Raises:
            RpcTimeout: no result in that time. The ref can be got again.
            ConfigError: it has been got already.
            GraphCapacityExceeded: too many earlier results would be left behind. The ref can be got again.
            WorkerError: a node that this result depends on raised.
            WorkerDied, Shutdown: the execution came to no end.
        """
        self._check_not_taken("got")
        limit = self._graph._executor.step_timeout if timeout is None else timeout
        if limit < 0 and limit != -1:
            raise ConfigError(f"timeout={timeout!r}; expected seconds, or -1 to wait for ever")
        future = self._graph._future(self._index)
        self._graph._executor.wait(future, threading.TIMEOUT_MAX if limit == -1 else limit)
        if not future.done():
            raise self._timed_out(limit)
        return self._take()


class CompiledDAGFuture(_Reference):
    """As CompiledDAGRef, for ``await``, which waits for at most the executor's ``step_timeout``."""

    def __await__(self) -> Generator[Any, None, Any]:
        self._check_not_taken("awaited")
        limit = self._graph._executor.step_timeout
        future = self._graph._future(self._index)
        yield from asyncio.wait([asyncio.wrap_future(future)], timeout=limit).__await__()
        if not future.done():
            raise self._timed_out(limit)
        return self._take()

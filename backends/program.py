"""A worker's part of a compiled graph, the same on every backend: what its nodes take, and running one.

Values are Python objects inside a worker and bytes between workers. A failure is a value like any other: it spreads to
every node that uses it, and tells which node it came from. Used by the backends, on the worker's side; it knows no
orchestrator and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pickle import PickleBuffer
from typing import Any

from lightvllm.backends.base import Graph, GraphArgument, GraphConstant, GraphInput, GraphNode, GraphResult
from lightvllm.messages import Buffer, Deferred, decode_value, encode_failure, encode_value, is_failure

Source = GraphInput | GraphResult
"""Where a value that a node takes comes from."""


class Failure:
    """In place of a value: what its node raised, as ``messages.encode_failure`` encoded it."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload


def sources(node: GraphNode) -> tuple[Source, ...]:
    """What ``node`` takes that is no constant, each once, in the order of first use."""
    arguments = (*node.args, *node.kwargs.values())
    return tuple(dict.fromkeys(argument for argument in arguments if not isinstance(argument, GraphConstant)))


class Step:
    """One node, as its worker runs it.

    Attributes:
        index: of the node in the graph.
        sources: what it takes; ``run`` is given one value for each, in this order.
        kept: nodes of the same worker use its result.
        sent: other workers or the driver use its result.
    """

    def __init__(self, graph: Graph, index: int) -> None:
        node = graph.nodes[index]
        self.index = index
        self.method = node.method
        self.sources = sources(node)
        users = [other.worker for other in graph.nodes if GraphResult(index) in sources(other)]
        self.kept = node.worker in users
        self.sent = index in graph.outputs or any(worker != node.worker for worker in users)
        self._args = [self._argument(argument) for argument in node.args]
        self._kwargs = {name: self._argument(argument) for name, argument in node.kwargs.items()}

    def _argument(self, argument: GraphArgument) -> tuple[int, Any]:
        """``(position in sources, None)`` or ``(-1, constant)``. Constants are decoded once, and shared by all runs."""
        if isinstance(argument, GraphConstant):
            return -1, load(argument.payload, self.index)
        return self.sources.index(argument), None

    def run(self, worker: object, values: Sequence[Any]) -> Any:
        """Call the method; its result, or a Failure if it raised an Exception or was given a Failure. A Deferred is
        finished here: the nodes that use its result could not begin before."""
        try:
            args = [_pick(argument, values) for argument in self._args]
            kwargs = {name: _pick(argument, values) for name, argument in self._kwargs.items()}
            for value in (*args, *kwargs.values()):
                if isinstance(value, Failure):
                    return value
            result = getattr(worker, self.method)(*args, **kwargs)
            return result.finish() if isinstance(result, Deferred) else result
        except Exception as error:  # noqa: BLE001  whatever it is, whoever uses the result gets it
            return Failure(encode_failure(error, self.index))


def steps(graph: Graph, worker: str) -> Iterator[Step]:
    """The steps of one worker (``WorkerRef.id``), in their order. On that worker's side: it decodes constants."""
    return (Step(graph, index) for index, node in enumerate(graph.nodes) if node.worker == worker)


def load(payload: Buffer, node: int, buffers: Sequence[Buffer] | None = None) -> Any:
    """A value or Failure from what ``dump`` or ``messages.encode_value`` encoded, to be used by ``node``."""
    if is_failure(payload):
        return Failure(bytes(payload))
    try:
        return decode_value(payload, buffers=buffers)
    except Exception as error:  # noqa: BLE001  a class that cannot be imported here, for instance
        return Failure(encode_failure(error, node))


def dump(value: Any, node: int, take: Callable[[PickleBuffer], object] | None = None) -> bytes:
    """A result of ``node``, for others. One that cannot be pickled becomes a failure. ``take``: of ``encode_value``."""
    if isinstance(value, Failure):
        return value.payload
    try:
        return encode_value(value, take)
    except Exception as error:  # noqa: BLE001
        return encode_failure(error, node)


def _pick(argument: tuple[int, Any], values: Sequence[Any]) -> Any:
    position, constant = argument
    return constant if position < 0 else values[position]

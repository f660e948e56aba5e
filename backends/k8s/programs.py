"""A worker's programs: its parts of the compiled graphs, installed once and run by one frame per execution.

They come by the worker's ordinary session, as calls of the methods below (``server.py`` brings them here), so that the
executions of graphs and plain calls share one order, and run in one thread. No worker has a method of such a name.

The life of a graph, at each of its workers: ``INSTALL`` brings the program and offers links to the workers that are to
connect to this one; ``CONNECT`` takes up what the others offered; ``ACCEPT`` has the links complete (none of the three
waits for another worker's session, so that no order of calls can lock two workers); then ``step_method``, again and
again; then ``FORGET``.

Executions carry no number: sessions keep the order, and every worker of a graph gets every execution of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from lightvllm.backends.base import Graph, GraphInput, GraphResult
from lightvllm.backends.k8s.channels import Channels
from lightvllm.backends.k8s.edges import Edges, Offer, Parts
from lightvllm.backends.k8s.security import check_address, split_address
from lightvllm.backends.program import Step, dump, load, sources, steps
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.messages import Buffer, StageCredentials, encode_failure, is_failure

PREFIX = "<graph"
"""Of the methods that are for ``Programs``."""
INSTALL, CONNECT, ACCEPT, FORGET = "<graph install>", "<graph connect>", "<graph accept>", "<graph forget>"

_LARGE_BYTES = 32 * 2**10  # a tensor of this size travels by itself, a smaller one among what is pickled
_PACKED = b"m"  # in front of several payloads in one; no encoding of messages.py begins with it


def step_method(graph_id: int) -> str:
    return f"<graph {graph_id}>"


class Install(msgspec.Struct, frozen=True, kw_only=True):
    """The program.

    Attributes:
        worker: whose part this is, of ``GraphNode.worker``.
        graph: without the constants of other workers.
        offers_to: the workers that are to connect to this one; for each "unix:/path", or "" for this server's own host.
        credentials: what to show to the others; without a certificate where all are on one host.
        timeout: seconds for them to connect.
    """

    graph_id: int
    worker: str
    graph: Graph
    offers_to: dict[str, str] = {}
    credentials: StageCredentials
    timeout: float


class Installed(msgspec.Struct, frozen=True):
    """The answer to ``INSTALL``: offers of links, by the worker that is to connect; and where this worker waits for the
    results of nodes that have another transport, by node."""

    offers: dict[str, Offer]
    inlets: dict[int, str]


class Connect(msgspec.Struct, frozen=True, kw_only=True):
    """What others wait with: ``offers`` by the worker that made it, ``outlets`` by this worker's node and the other
    worker."""

    graph_id: int
    offers: dict[str, Offer]
    outlets: dict[int, dict[str, str]]
    timeout: float


class Accept(msgspec.Struct, frozen=True, kw_only=True):
    graph_id: int
    timeout: float


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """May come again, and for a graph that is not known."""

    graph_id: int


def numbers_of(graph: Graph) -> dict[str, int]:
    """The workers' numbers, by which their certificates name them (``transfer.credentials.host_name``)."""
    return {worker: number for number, worker in enumerate(dict.fromkeys(node.worker for node in graph.nodes))}


def peers_of(graph: Graph, node: int) -> list[str]:
    """The other workers that use the result of ``node``."""
    users = (other.worker for other in graph.nodes if GraphResult(node) in sources(other))
    return [worker for worker in dict.fromkeys(users) if worker != graph.nodes[node].worker]


def inputs_of(graph: Graph, worker: str) -> list[GraphInput]:
    """What ``worker`` is to be given for an execution, in the order in which its payload holds it."""
    mine = (source for node in graph.nodes if node.worker == worker for source in sources(node))
    return [source for source in dict.fromkeys(mine) if isinstance(source, GraphInput)]


def outputs_of(graph: Graph, worker: str) -> list[int]:
    """The nodes of ``worker`` whose results its reply holds, in this order."""
    return [node for node in dict.fromkeys(graph.outputs) if graph.nodes[node].worker == worker]


def pack(payloads: Sequence[Buffer]) -> Buffer:
    """Several payloads as one; a single one as it is."""
    if len(payloads) == 1:
        return payloads[0]
    return b"".join((_PACKED, struct.pack(f"<{len(payloads)}Q", *map(len, payloads)), *payloads)) if payloads else b""


def unpack(packed: Buffer, count: int) -> list[Buffer]:
    """The ``count`` payloads; no copies. Raises LightvllmError for what ``pack`` did not make of as many."""
    if count == 1:
        return [packed]
    if not count and not packed:
        return []
    sizes = struct.Struct(f"<{count}Q")
    at = len(_PACKED) + sizes.size
    if len(packed) < at or bytes(packed[: len(_PACKED)]) != _PACKED:
        raise LightvllmError(f"{len(packed)} bytes came that do not hold {count} values of a graph")
    view = memoryview(packed)
    payloads: list[Buffer] = []
    for size in sizes.unpack_from(packed, len(_PACKED)):
        payloads.append(view[at : at + size])
        at += size
    if at != len(packed):
        raise LightvllmError(f"{len(packed)} bytes came for {count} values of a graph that have {at}")
    return payloads


class Programs:
    """All programs of one worker. For the session's thread alone."""

    def __init__(self, worker: object, listen: str, max_message_bytes: int) -> None:
        """``listen``: the address of the worker's server."""
        self._worker = worker
        self._listen = listen
        self._limit = max_message_bytes
        self._programs: dict[str, _Program] = {}

    def call(self, method: str, payload: Buffer) -> bytes:
        """The encoded reply, or an encoded failure."""
        try:
            program = self._programs.get(method)
            if program is not None:
                return bytes(program.run(self._worker, payload))
            if method == INSTALL:
                return msgspec.msgpack.encode(self._install(msgspec.msgpack.decode(payload, type=Install)))
            if method == CONNECT:
                connecting = msgspec.msgpack.decode(payload, type=Connect)
                self._programs[step_method(connecting.graph_id)].connect(connecting)
            elif method == ACCEPT:
                accepting = msgspec.msgpack.decode(payload, type=Accept)
                self._programs[step_method(accepting.graph_id)].accept(accepting)
            elif method == FORGET:
                forgotten = self._programs.pop(step_method(msgspec.msgpack.decode(payload, type=Forget).graph_id), None)
                if forgotten is not None:
                    forgotten.close()
            else:
                raise LightvllmError(f"{method} is not known here: the graph was not installed, or was forgotten")
        except Exception as error:  # noqa: BLE001  whatever it is, the driver gets it
            return encode_failure(error)
        return b""

    def _install(self, asked: Install) -> Installed:
        program = _Program(asked, self._limit)
        try:
            installed = program.listen(asked, self._listen)
        except BaseException:
            program.close()
            raise
        self._programs[step_method(asked.graph_id)] = program
        return installed


class _Given:
    """Where a step takes a value from."""

    __slots__ = ("copy", "is_input", "is_kept", "key")

    def __init__(self, is_input: bool, is_kept: bool, key: int, copy: bool) -> None:
        self.is_input, self.is_kept = is_input, is_kept
        self.key = key  # position in the inputs, or node
        self.copy = copy  # a later step will use it, too, and must not see what this one does to it


class _Program:
    """One worker's part of one graph."""

    def __init__(self, asked: Install, limit: int) -> None:
        graph, worker = asked.graph, asked.worker
        self._limit = limit
        mine = list(steps(graph, worker))
        inputs = inputs_of(graph, worker)
        self._num_inputs = len(inputs)
        self._outputs = outputs_of(graph, worker)
        uses = [source.node for step in mine for source in step.sources if isinstance(source, GraphResult)]
        remote = {node: graph.nodes[node].worker for node in uses if graph.nodes[node].worker != worker}
        self._plan: list[tuple[Step, list[_Given], list[str], bool]] = []
        for step in mine:
            given = []
            for source in step.sources:
                if isinstance(source, GraphInput):
                    given.append(_Given(True, False, inputs.index(source), False))
                else:
                    uses.remove(source.node)
                    given.append(_Given(False, source.node not in remote, source.node, source.node in uses))
            self._plan.append((step, given, peers_of(graph, step.index), step.index in self._outputs))
        self._executions = 0
        self._sources = remote
        self._transports = [node.transport for node in graph.nodes]
        self._numbers = numbers_of(graph)
        self._worker = worker
        ways = {self._transports[node] for node in remote} | {
            self._transports[step.index] for step, _, peers, _ in self._plan if peers
        }
        setting = (limit, graph.max_inflight_executions, graph.step_timeout)
        linked = {node: peer for node, peer in remote.items() if self._transports[node] == "auto"}
        self._edges = Edges(linked, *setting, asked.credentials) if "auto" in ways else None
        self._channels = Channels(asked.credentials, *setting) if ways - {"auto"} else None

    @property
    def edges(self) -> Edges:
        assert self._edges is not None
        return self._edges

    @property
    def channels(self) -> Channels:
        assert self._channels is not None
        return self._channels

    def listen(self, asked: Install, server: str) -> Installed:
        """``server``: the address of this worker's server."""
        offers = {
            peer: self.edges.listen(peer, address or _host_of(server, asked.credentials), asked.timeout)
            for peer, address in asked.offers_to.items()
        }
        mine = self._numbers[self._worker]
        inlets = {
            node: self.channels.listen(
                node,
                self._transports[node],
                mine,
                self._numbers[producer],
                _host_of(server, asked.credentials) if asked.credentials.cert else "",
            )
            for node, producer in self._sources.items()
            if self._transports[node] != "auto"
        }
        return Installed(offers, inlets)

    def connect(self, asked: Connect) -> None:
        for peer, offer in asked.offers.items():
            self.edges.connect(peer, offer, asked.timeout)
        for node, addresses in asked.outlets.items():
            for peer, address in addresses.items():
                self.channels.connect(node, peer, self._transports[node], self._numbers[peer], address, asked.timeout)

    def accept(self, asked: Accept) -> None:
        self.edges.accept(asked.timeout)

    def run(self, worker: object, payload: Buffer) -> Buffer:
        """One execution: the results that the driver wants."""
        self._executions += 1
        inputs = (payload,) if self._num_inputs == 1 else unpack(payload, self._num_inputs)
        kept: dict[int, Any] = {}
        came: dict[int, Parts] = {}
        results: dict[int, bytes] = {}
        for step, given, peers, is_output in self._plan:
            values = [
                load(inputs[one.key], step.index)
                if one.is_input
                else kept[one.key]
                if one.is_kept
                else self._take(one, came, step.index)
                for one in given
            ]
            result = step.run(worker, values)
            if step.kept:
                kept[step.index] = result
            if peers:
                to = self.edges if self._transports[step.index] == "auto" else self.channels
                to.send(peers, self._executions, step.index, self._parts(result, step))
            if is_output:
                results[step.index] = dump(result, step.index)
        if self._edges is not None:
            self._edges.end_of(self._executions)
        return pack([results[node] for node in self._outputs])

    def _take(self, one: _Given, came: dict[int, Parts], user: int) -> Any:
        """The result of another worker's node, for the node ``user``."""
        parts = came.get(one.key)
        if parts is None:
            try:
                if self._transports[one.key] == "auto":
                    parts = self.edges.take(self._executions, one.key)
                else:
                    parts = self.channels.take(self._executions, one.key, self._sources[one.key])
            except LightvllmError as error:
                parts = [encode_failure(error, user)]
            if one.copy:
                came[one.key] = parts
        buffers = [bytearray(part) if one.copy or isinstance(part, bytes) else part for part in parts[1:]]
        return load(parts[0], user, buffers)

    def _parts(self, result: Any, step: Step) -> Parts:
        buffers: Parts = []

        def take(buffer: Any) -> bool:
            memory = buffer.raw()
            if len(memory) < _LARGE_BYTES:
                return True
            buffers.append(memory)
            return False

        pickled = dump(result, step.index, take)
        if is_failure(pickled):
            return [pickled]
        size = len(pickled) + sum(map(len, buffers))
        if size <= self._limit:
            return [pickled, *buffers]
        error = ConfigError(f"the result of {step.method} is {size} bytes, more than max_message_bytes={self._limit}")
        return [encode_failure(error, step.index)]

    def close(self) -> None:
        if self._edges is not None:
            self._edges.close()
        if self._channels is not None:
            self._channels.close()


def _host_of(server: str, credentials: StageCredentials) -> str:
    """The host of this worker's server, if what goes to it cannot be read on the way."""
    if not credentials.cert:
        check_address(server, None)
    return split_address(server)[0]

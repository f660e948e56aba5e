"""The driver's side of compiled graphs on this backend: programs to the workers, and their links; then one frame to
each worker for one execution, by the sessions that are open.

Every worker of a graph gets a frame for every execution, also one that takes results of other workers only: so that
each worker's calls and steps are in the order in which the driver made them, and each answers for itself. The frame
holds the inputs that the worker takes, and the reply the results that the driver wants from it.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from lightvllm.backends.base import Graph, GraphArgument, GraphConstant, GraphNode
from lightvllm.backends.k8s.channels import TRANSPORTS
from lightvllm.backends.k8s.discovery import private_directory
from lightvllm.backends.k8s.edges import Offer
from lightvllm.backends.k8s.programs import (
    ACCEPT,
    CONNECT,
    FORGET,
    INSTALL,
    Accept,
    Connect,
    Forget,
    Install,
    Installed,
    inputs_of,
    numbers_of,
    outputs_of,
    pack,
    peers_of,
    step_method,
    unpack,
)
from lightvllm.backends.k8s.security import is_loopback, split_address
from lightvllm.backends.k8s.session import WorkerSession
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout, WorkerDied
from lightvllm.messages import Buffer, StageCredentials, decode_reply, encode_failure, is_failure
from lightvllm.transfer.credentials import VALID_DAYS, host_name

T = TypeVar("T")
Wait = Callable[[Future[Any], float], None]
"""``Backend.wait``."""


class GraphWorker(NamedTuple):
    """``target``: where the driver reaches its server, ``"unix:/path"`` or ``"host:port"``; ``tls``: by TLS."""

    session: WorkerSession
    target: str
    tls: bool

    @property
    def is_local(self) -> bool:
        """Whether it is a child of the driver."""
        return self.target.startswith("unix:")

    @property
    def is_near(self) -> bool:
        """Whether it is on the driver's host. If it is not local, its address means another host elsewhere then."""
        return self.is_local or is_loopback(split_address(self.target)[0])


def compile_graph(
    graph: Graph, graph_id: int, workers: Mapping[str, GraphWorker], wait: Wait, timeout: float
) -> KubernetesGraph:
    """Have the workers of ``graph`` install their programs and link up. See ``Backend.compile``.

    ``graph_id``: a number that no other graph of these workers has.
    """
    _check(graph, workers)
    used = {node.worker: workers[node.worker] for node in graph.nodes}
    compiled = KubernetesGraph(graph, graph_id, used, wait)
    try:
        _Linking(graph, graph_id, used, wait, timeout).run()
    except BaseException:
        compiled.forget()
        raise
    return compiled


def _check(graph: Graph, workers: Mapping[str, GraphWorker]) -> None:
    for index, node in enumerate(graph.nodes):
        if node.transport != "auto" and node.transport not in TRANSPORTS:
            raise ConfigError(
                f"tensor transport {node.transport!r} of {node.method}: this backend has "
                f"{', '.join(map(repr, TRANSPORTS))} and its own direct connections; use one of them, or 'auto'"
            )
        far = [name for name in (node.worker, *peers_of(graph, index)) if not workers[name].is_near]
        if node.transport == "shared" and far:
            raise ConfigError(
                f"tensor transport 'shared' of {node.method}: it needs workers on this host, which {far[0]} need not "
                "be; use 'auto' or 'grpc'"
            )
    if graph.buffer_size_bytes is not None:
        raise ConfigError("_buffer_size_bytes: this backend's channels have no buffers of fixed size; leave it out")
    if graph.overlap_gpu_communication:
        raise ConfigError(
            "_overlap_gpu_communication: this backend always receives while it computes, and has no such choice; "
            "leave it out"
        )


class _Linking:
    """From a graph to workers that know it."""

    def __init__(
        self, graph: Graph, graph_id: int, workers: Mapping[str, GraphWorker], wait: Wait, timeout: float
    ) -> None:
        self._graph, self._graph_id, self._workers = graph, graph_id, workers
        self._wait, self._timeout = wait, timeout
        self._deadline = time.monotonic() + timeout
        self._links = self._choose_links()

    def _choose_links(self) -> list[tuple[str, str]]:
        """Who listens and who connects, for each two workers with an edge of transport 'auto' between them."""
        pairs = {
            frozenset((node.worker, peer))
            for index, node in enumerate(self._graph.nodes)
            for peer in peers_of(self._graph, index)
            if node.transport == "auto"
        }
        names = list(self._workers)
        ordered = (sorted(pair, key=names.index) for pair in pairs)
        return [(b, a) if self._workers[a].is_near else (a, b) for a, b in ordered]

    @property
    def _remaining(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def run(self) -> None:
        credentials = self._credentials()
        with self._sockets() as addresses:
            installed = self._ask(
                INSTALL,
                {
                    name: Install(
                        graph_id=self._graph_id,
                        worker=name,
                        graph=_part_of(self._graph, name),
                        offers_to={peer: addresses[name, peer] for one, peer in self._links if one == name},
                        credentials=credentials[name],
                        timeout=self._remaining,
                    )
                    for name in self._workers
                },
                Installed,
            )
            connects = {name: self._connect(name, installed) for name in self._workers}
            self._ask(CONNECT, {name: it for name, it in connects.items() if it.offers or it.outlets})
            self._ask(
                ACCEPT,
                {
                    name: Accept(graph_id=self._graph_id, timeout=self._remaining)
                    for name in dict.fromkeys(one for one, _ in self._links)
                },
            )

    def _connect(self, name: str, installed: Mapping[str, Installed]) -> Connect:
        """What ``name`` is to take up."""
        outlets = {
            index: {
                peer: self._as_seen(peer, installed[peer].inlets[index], node.transport == "grpc")
                for peer in peers_of(self._graph, index)
            }
            for index, node in enumerate(self._graph.nodes)
            if node.worker == name and node.transport != "auto"
        }
        offers = {}
        for one, peer in self._links:
            if peer == name:
                offer = installed[one].offers[name]
                offers[one] = Offer(self._as_seen(one, offer.address, True), offer.ticket)
        return Connect(graph_id=self._graph_id, offers=offers, outlets=outlets, timeout=self._remaining)

    def _credentials(self) -> dict[str, StageCredentials]:
        """With certificates for workers whose servers have TLS: their own are for servers, and say nothing of a
        graph."""
        group, token = secrets.token_hex(8), secrets.token_urlsafe(32)
        if not any(worker.tls for worker in self._workers.values()):
            return dict.fromkeys(self._workers, StageCredentials(group=group, token=token))
        from lightvllm.certs import Authority

        authority = Authority.new(days=2 * VALID_DAYS)
        credentials = {}
        for name, number in numbers_of(self._graph).items():
            issued = authority.issue(host_name(number), "peer", [host_name(number)], VALID_DAYS)
            credentials[name] = StageCredentials(
                group=group, token=token, cert=issued.cert, key=issued.key, ca=authority.cert
            )
        return credentials

    @contextlib.contextmanager
    def _sockets(self) -> Iterator[dict[tuple[str, str], str]]:
        """Where to listen for each link (``Install.offers_to``): for local workers in a directory that goes again."""
        local = [link for link in self._links if self._workers[link[0]].is_local]
        directory: Path | None = private_directory() if local else None
        try:
            yield {
                link: f"unix:{directory}/{number}.sock" if link in local else ""
                for number, link in enumerate(self._links)
            }
        finally:
            if directory is not None:
                for left in directory.iterdir():  # of a worker that has died
                    left.unlink(missing_ok=True)
                directory.rmdir()

    def _as_seen(self, worker: str, address: str, on_network: bool) -> str:
        """With the host by which the driver, too, reaches ``worker``."""
        if not on_network or self._workers[worker].is_local:
            return address
        return f"{self._workers[worker].target.rpartition(':')[0]}:{address.rpartition(':')[2]}"

    def _ask(self, method: str, calls: Mapping[str, msgspec.Struct], answer: type[T] | None = None) -> dict[str, T]:
        encoded = {name: msgspec.msgpack.encode(call) for name, call in calls.items()}
        futures = {name: self._workers[name].session.call(method, payload) for name, payload in encoded.items()}
        answers = {}
        for name, future in futures.items():
            self._wait(future, self._remaining)
            if not future.done():
                raise RpcTimeout(f"compile: worker {name} has not answered {method} within {self._timeout:g} s")
            reply = future.result()
            if is_failure(reply):
                try:
                    decode_reply(method, reply)
                except ConfigError as error:
                    raise ConfigError(f"worker {name}: {error}") from None
            if answer is not None:
                answers[name] = msgspec.msgpack.decode(reply, type=answer)
        return answers


def _part_of(graph: Graph, worker: str) -> Graph:
    """``graph`` without the constants of the other workers, which are no business of ``worker``."""

    def stripped(argument: GraphArgument) -> GraphArgument:
        return GraphConstant(b"") if isinstance(argument, GraphConstant) else argument

    def part(node: GraphNode) -> GraphNode:
        if node.worker == worker:
            return node
        return msgspec.structs.replace(
            node,
            args=tuple(map(stripped, node.args)),
            kwargs={name: stripped(argument) for name, argument in node.kwargs.items()},
        )

    return msgspec.structs.replace(graph, nodes=tuple(map(part, graph.nodes)))


class _Part(NamedTuple):
    """What the driver knows of a worker's part.

    Attributes:
        inputs: position of its payload among those of an execution; workers with equal inputs share one.
        places: for each result in its reply, the places that it has among ``Graph.outputs``.
    """

    worker: str
    session: WorkerSession
    inputs: int
    places: list[list[int]]


class KubernetesGraph:
    """See ``BackendGraph``."""

    def __init__(self, graph: Graph, graph_id: int, workers: Mapping[str, GraphWorker], wait: Wait) -> None:
        self._graph_id = graph_id
        self._method = step_method(graph_id)
        keys = {name: tuple(given.key for given in inputs_of(graph, name)) for name in workers}
        self._inputs = list(dict.fromkeys(keys.values()))
        self._parts = [
            _Part(
                name,
                worker.session,
                self._inputs.index(keys[name]),
                [_places(graph.outputs, node) for node in outputs_of(graph, name)],
            )
            for name, worker in workers.items()
        ]
        self._num_outputs = len(graph.outputs)
        self._wait = wait
        self._lock = threading.Lock()  # executions reach every worker in the same order
        self._pending: set[_Execution] = set()
        self._forgetting: list[Future[Buffer]] | None = None

    def execute(self, inputs: Mapping[int | str | None, bytes]) -> Future[list[Buffer]]:
        payloads = [inputs[keys[0]] if len(keys) == 1 else pack([inputs[key] for key in keys]) for keys in self._inputs]
        execution = _Execution(self._num_outputs, len(self._parts))
        with self._lock:
            for part in self._parts:  # it must be sent to all of the workers or to none
                error = part.session.refusal(self._method, len(payloads[part.inputs]))
                if error is not None:
                    execution.fail(error)
                    return execution
            self._pending.add(execution)
            for part in self._parts:
                on_reply = functools.partial(execution.replied, part.places)
                part.session.send(self._method, payloads[part.inputs], on_reply)
        execution.add_done_callback(self._pending.discard)
        return execution

    def worker_died(self, worker: str, died: WorkerDied) -> None:
        """Fail what is pending if ``worker`` is one of the graph's, also where it had replied already. Its session
        refuses calls by now."""
        if any(part.worker == worker for part in self._parts):
            with self._lock:
                pending = list(self._pending)
            for execution in pending:
                execution.fail(died)

    def teardown(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._lock:
            pending = list(self._pending)
        for execution in pending:
            self._await(execution, deadline, f"the graph is still executing after {timeout:g} s")
        for future in self.forget():
            self._await(future, deadline, f"a worker has not forgotten the graph after {timeout:g} s")

    def _await(self, future: Future[Any], deadline: float, what: str) -> None:
        self._wait(future, max(0.0, deadline - time.monotonic()))
        if not future.done():
            raise RpcTimeout(f"tear-down: {what}; it can be repeated")

    def forget(self) -> list[Future[Buffer]]:
        """Have those workers that still live forget the graph, and whatever there is of it. Returns at once."""
        with self._lock:
            if self._forgetting is None:
                payload = msgspec.msgpack.encode(Forget(graph_id=self._graph_id))
                self._forgetting = [part.session.call(FORGET, payload) for part in self._parts]
            return self._forgetting


def _places(outputs: Sequence[int], node: int) -> list[int]:
    return [place for place, output in enumerate(outputs) if output == node]


class _Execution(Future[list[Buffer]]):
    """Done when every worker has replied, failed when the first one fails."""

    def __init__(self, num_outputs: int, num_workers: int) -> None:
        super().__init__()
        self._results: list[Buffer] = [b""] * num_outputs
        self._guard = threading.Lock()
        self._missing = num_workers  # that have not replied; 0 once it is decided
        self.set_running_or_notify_cancel()  # what has been sent cannot be cancelled

    def fail(self, error: BaseException) -> None:
        with self._guard:
            first, self._missing = self._missing > 0, 0
        if first:
            self.set_exception(error)

    def replied(self, places: Sequence[Sequence[int]], reply: Buffer | BaseException) -> None:
        """``places``: of ``_Part``."""
        if isinstance(reply, BaseException):
            self.fail(reply)
            return
        if len(places) == 1:
            for place in places[0]:
                self._results[place] = reply
        else:
            self._unpack(places, reply)
        with self._guard:
            self._missing -= 1
            last = self._missing == 0
        if last:
            self.set_result(self._results)

    def _unpack(self, places: Sequence[Sequence[int]], reply: Buffer) -> None:
        """A worker's whole reply may be a failure, which then is the result of all that it has part in."""
        results: Sequence[Buffer]
        try:
            if is_failure(reply):
                places, results = places or [range(len(self._results))], [reply] * max(1, len(places))
            else:
                results = unpack(reply, len(places))
        except LightvllmError as malformed:
            places, results = places or [range(len(self._results))], [encode_failure(malformed)] * max(1, len(places))
        for those, result in zip(places, results, strict=True):
            for place in those:
                self._results[place] = result

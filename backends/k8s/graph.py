"""The driver's side of compiled graphs on this backend: programs to the workers, and their links; then one frame to
each worker for one execution, by the sessions that are open.

Every worker of a graph gets a frame for every execution, also one that takes results of other workers only: so that
each worker's calls and steps are in the order in which the driver made them, and each answers for itself. The frame
holds the inputs that the worker takes, and the reply the results that the driver wants from it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from lightvllm.backends.base import Graph, GraphArgument, GraphConstant, GraphNode
from lightvllm.backends.k8s.discovery import private_directory
from lightvllm.backends.k8s.edges import Identity, Offer
from lightvllm.backends.k8s.programs import (
    ACCEPT,
    CONNECT,
    FORGET,
    INSTALL,
    Accept,
    Connect,
    Forget,
    Install,
    Offers,
    inputs_of,
    outputs_of,
    pack,
    peers_of,
    step_method,
    unpack,
)
from lightvllm.backends.k8s.security import is_loopback, split_address
from lightvllm.backends.k8s.session import WorkerSession
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout, WorkerDied
from lightvllm.messages import Buffer, decode_reply, encode_failure, is_failure

T = TypeVar("T")
Wait = Callable[[Future[Any], float], None]
"""``Backend.wait``."""

_IDENTITY_DAYS = 1.0  # certificates are shown once, when the links are made; the links outlive them


class GraphWorker(NamedTuple):
    """``target``: where the driver reaches its server, ``"unix:/path"`` or ``"host:port"``; ``tls``: by TLS."""

    session: WorkerSession
    target: str
    tls: bool


def compile_graph(
    graph: Graph, graph_id: int, workers: Mapping[str, GraphWorker], wait: Wait, timeout: float
) -> KubernetesGraph:
    """Have the workers of ``graph`` install their programs and link up. See ``Backend.compile``.

    ``graph_id``: a number that no other graph of these workers has.
    """
    _check(graph)
    used = {node.worker: workers[node.worker] for node in graph.nodes}
    compiled = KubernetesGraph(graph, graph_id, used, wait)
    try:
        _Linking(graph, graph_id, used, wait, timeout).run()
    except BaseException:
        compiled.forget()
        raise
    return compiled


def _check(graph: Graph) -> None:
    for node in graph.nodes:
        if node.transport != "auto":
            raise ConfigError(
                f"tensor transport {node.transport!r} of {node.method}: on this backend, results go from worker to "
                "worker by direct connections; use 'auto'"
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
        """Who listens and who connects, for each two workers with an edge between them."""
        pairs = {
            frozenset((node.worker, peer))
            for index, node in enumerate(self._graph.nodes)
            for peer in peers_of(self._graph, index)
        }
        names = list(self._workers)
        return [(b, a) if self._is_near(a) else (a, b) for a, b in (sorted(pair, key=names.index) for pair in pairs)]

    def _is_near(self, worker: str) -> bool:
        """Whether the driver reaches it at an address that means another host elsewhere."""
        target = self._workers[worker].target
        return not target.startswith("unix:") and is_loopback(split_address(target)[0])

    @property
    def _remaining(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def run(self) -> None:
        identities = self._identities()
        with self._sockets() as addresses:
            offers = self._ask(
                INSTALL,
                {
                    name: Install(
                        graph_id=self._graph_id,
                        worker=name,
                        graph=_part_of(self._graph, name),
                        offers_to={peer: addresses[name, peer] for one, peer in self._links if one == name},
                        identity=identities.get(name),
                        timeout=self._remaining,
                    )
                    for name in self._workers
                },
                Offers,
            )
            self._ask(
                CONNECT,
                {
                    name: Connect(
                        graph_id=self._graph_id,
                        offers={
                            one: self._as_seen(one, offers[one][name]) for one, peer in self._links if peer == name
                        },
                        timeout=self._remaining,
                    )
                    for name in dict.fromkeys(peer for _, peer in self._links)
                },
            )
            self._ask(
                ACCEPT,
                {
                    name: Accept(graph_id=self._graph_id, timeout=self._remaining)
                    for name in dict.fromkeys(one for one, _ in self._links)
                },
            )

    def _identities(self) -> dict[str, Identity]:
        """For workers whose servers have TLS: their own certificates are for servers, and say nothing of a graph."""
        if not self._links or not any(worker.tls for worker in self._workers.values()):
            return {}
        from lightvllm.certs import Authority

        authority = Authority.new(days=2 * _IDENTITY_DAYS)
        identities = {}
        for number, name in enumerate(self._workers):
            host = f"worker-{number}"
            issued = authority.issue(host, "peer", [host], _IDENTITY_DAYS)
            identities[name] = Identity(issued.cert, issued.key, authority.cert)
        return identities

    @contextlib.contextmanager
    def _sockets(self) -> Iterator[dict[tuple[str, str], str]]:
        """Where to listen for each link (``Install.offers_to``): for local workers in a directory that goes again."""
        local = [link for link in self._links if self._workers[link[0]].target.startswith("unix:")]
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

    def _as_seen(self, worker: str, offer: Offer) -> Offer:
        """With the host by which the driver, too, reaches ``worker``."""
        if offer.address.startswith("unix:"):
            return offer
        host, port = self._workers[worker].target.rpartition(":")[0], offer.address.rpartition(":")[2]
        return Offer(f"{host}:{port}", offer.ticket)

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
        futures = []
        with self._lock:
            for part in self._parts:  # it must be sent to all of the workers or to none
                error = part.session.refusal(self._method, len(payloads[part.inputs]))
                if error is not None:
                    execution.fail(error)
                    return execution
            for part in self._parts:
                futures.append((part.session.call(self._method, payloads[part.inputs]), part))  # noqa: PERF401
            self._pending.add(execution)
        execution.add_done_callback(self._pending.discard)
        for future, part in futures:
            future.add_done_callback(functools.partial(execution.replied, part.places))
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

    def replied(self, places: Sequence[Sequence[int]], future: Future[Buffer]) -> None:
        """``places``: of ``_Part``."""
        try:
            reply = future.result()
        except LightvllmError as error:
            self.fail(error)
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

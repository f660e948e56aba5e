"""The Kubernetes backend: workers behind authenticated gRPC, started here or found by address or by DNS."""

from __future__ import annotations

import atexit
import itertools
import platform
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from lightvllm.backends.base import BackendGraph, Graph, OnFailure, OnReply, Placement, Progress, WorkerRef, wait_for
from lightvllm.backends.k8s.discovery import Discovery, Endpoint, LocalProcesses, ServicePods, StaticAddresses
from lightvllm.backends.k8s.process import MAX_MESSAGE_BYTES
from lightvllm.backends.k8s.reactor import Reactor
from lightvllm.backends.k8s.security import Tls, Token
from lightvllm.config import KUBERNETES_TRANSPORTS, RUNNING_WORKERS, KubernetesTransport
from lightvllm.errors import (
    ConfigError,
    MissingExtra,
    PlacementError,
    Shutdown,
    WorkerDied,
    WorkerError,
)
from lightvllm.messages import Buffer, decode_reply
from lightvllm.version import __version__

try:
    from lightvllm.backends.k8s.graph import GraphWorker, KubernetesGraph, compile_graph
    from lightvllm.backends.k8s.session import WorkerSession
    from lightvllm.backends.k8s.wire import CallEncoder
except ImportError as missing:
    if missing.name is None or missing.name.partition(".")[0] not in ("grpc", "grpc_health", "google"):
        raise
    raise MissingExtra("grpcio", "k8s", "--executor k8s") from None

if TYPE_CHECKING:
    from dns.resolver import Resolver

_EXIT_REPORT_SECONDS = 0.5  # between a local worker's connection breaking and its process's exit being known


class _Member:
    """One worker, from its endpoint to its death."""

    def __init__(self, index: int, endpoint: Endpoint) -> None:
        self.index = index
        self.endpoint = endpoint
        self.id = endpoint.id
        self.doing = "is starting"  # completes "worker … "
        self.session: WorkerSession | None = None
        self.placed: Future[WorkerRef] = Future()
        self.died: WorkerDied | None = None


class KubernetesBackend:
    """See ``backends/base.py`` for the contract.

    Without ``workers``, ``place`` starts local worker processes, which end with this process however it ends.
    With them, or with ``service``, it connects to servers started by ``lightvllm worker``.
    """

    name = "k8s"

    def __init__(
        self,
        workers: tuple[str, ...] = (),
        token_file: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        transport: KubernetesTransport = "auto",
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        local_gpus: Sequence[str] | None = None,
        show_output: bool = False,
        gpus_per_pod: int = 1,
        service: str | None = None,
        pod_prefix: str | None = None,
        first_pod: int = 0,
        resolver: Resolver | None = None,
    ) -> None:
        """Starts and connects to nothing.

        Args:
            workers: addresses ``"host:port"`` of running servers, in the order of ranks.
            token_file: file with the token of those servers.
            tls_cert, tls_key, tls_ca: PEM files for mutual TLS; needed for addresses that are not loopback.
            transport: what carries calls: ``"grpc"`` (the session's stream), ``"direct"`` (a socket beside it, opened
                by a ticket), or ``"auto"``: direct where it can be opened, else grpc.
            max_message_bytes: the largest payload of a call or reply.
            local_gpus: GPUs, by index or UUID, that local workers are dealt, in place of all that this process sees.
            show_output: what local workers print appears on this process's stderr, line by line as it is. What the
                servers of ``workers`` print appears where they run.
            gpus_per_pod: servers behind each of ``workers``, at as many consecutive ports from the one that is named.
                Their order is address by address, port by port. So many servers are in each pod of ``service``, too.
            service: the headless Service of a StatefulSet whose pods are the workers, in place of ``workers``:
                ``NAME[.NAMESPACE[.svc[.DOMAIN]]][:PORT]``. Needs TLS; pod i's certificate is for ``POD-i.`` and the
                name as it is written here.
            pod_prefix: the StatefulSet's name, if it is not the Service's without ``-headless``.
            first_pod: index of the first of its pods that are used.
            resolver: asked for the pods' addresses in place of the system's name servers.

        Raises:
            ConfigError: the options contradict each other, a file cannot be used, an address is malformed or unsafe.
            MissingExtra: ``service`` without dnspython.
        """
        self.driver_node = socket.gethostname()
        if transport not in KUBERNETES_TRANSPORTS:
            raise ConfigError(f"transport={transport!r} is unknown; use one of {', '.join(KUBERNETES_TRANSPORTS)}")
        self._max_message_bytes = max_message_bytes
        self._transport = transport
        self._encoder = CallEncoder()
        self._graph_ids = itertools.count(1)
        self._graphs: weakref.WeakSet[KubernetesGraph] = weakref.WeakSet()
        self._reactor: Reactor | None = None
        self._discovery: Discovery
        tls = Tls.from_options(tls_cert, tls_key, tls_ca)
        if workers and service is not None:
            raise ConfigError(f"k8s_workers and k8s_service={service!r} are both given; keep one")
        if pod_prefix is not None and service is None:
            raise ConfigError(f"k8s_pod_prefix={pod_prefix!r} is for k8s_service, which is not given; leave it out")
        if workers or service is not None:
            where = "k8s_workers" if service is None else "k8s_service"
            if local_gpus is not None:
                raise ConfigError(f"local_gpus={list(local_gpus)} is for local workers, not {where}; leave one out")
            if token_file is None:
                raise ConfigError(f"{where} needs k8s_token_file, the token file that the workers were started with")
            token = Token.read(token_file)
            if service is None:
                self._discovery = StaticAddresses(workers, token, tls, gpus_per_pod)
            else:
                self._discovery = ServicePods(service, token, tls, gpus_per_pod, pod_prefix, first_pod, resolver)
        elif token_file is not None or tls is not None:
            raise ConfigError(f"k8s_token_file and TLS options are for {RUNNING_WORKERS}; leave them out")
        elif gpus_per_pod != 1:
            raise ConfigError(f"k8s_gpus_per_pod={gpus_per_pod} is for {RUNNING_WORKERS}; leave it out")
        else:
            self._discovery = LocalProcesses(max_message_bytes, local_gpus, show_output=show_output)
        self._members: dict[str, _Member] = {}
        self._on_failure: OnFailure | None = None
        self._changed = threading.Condition()  # guards the state below, and wakes place()
        self._closed = False
        self._report_failures = False
        self._reporting = threading.RLock()  # held while on_failure runs; shutdown may be called from within
        self._ended = threading.Event()

    # ------------------------------------------------------------------------------------------------- place

    def place(
        self, request: Placement, on_failure: OnFailure, timeout: float, progress: Progress | None = None
    ) -> Sequence[WorkerRef]:
        deadline = time.monotonic() + timeout
        with self._changed:
            if self._closed:
                raise Shutdown("the backend has been shut down")
            if self._on_failure is not None:
                raise ConfigError("place was called before; a backend places once")
            self._on_failure = on_failure
            if self._transport != "grpc":
                self._reactor = Reactor()
        atexit.register(self.shutdown)
        try:
            members = [
                _Member(index, endpoint)
                for index, endpoint in enumerate(self._discovery.find(request, self._process_exited))
            ]
            with self._changed:
                self._members = {member.id: member for member in members}
            if progress:
                progress(self._discovery.decision(request))
            for member in members:
                threading.Thread(
                    target=self._bring_up,
                    args=(member, request, deadline),
                    name=f"lightvllm-place-{member.id}",
                    daemon=True,
                ).start()
            refs = self._wait_placed(members, deadline, timeout, progress)
            self._discovery.connected()
            _check_nodes(request, refs)
            if progress:
                progress(self._what_was_decided())
            with self._changed:
                if dead := next((member.died for member in members if member.died), None):
                    raise PlacementError(f"{len(members) - 1} of {len(members)} workers: {dead}")
                self._report_failures = not self._closed
        except BaseException:
            self.shutdown(0.5)
            raise
        return refs

    def _wait_placed(
        self, members: list[_Member], deadline: float, timeout: float, progress: Progress | None
    ) -> list[WorkerRef]:
        said = ""
        while True:
            with self._changed:
                if self._closed:
                    raise Shutdown("the backend has been shut down")
                ready = sum(member.placed.done() for member in members)
                failure = next((e for m in members if m.placed.done() and (e := m.placed.exception() or m.died)), None)
                waiting = [f"{member.id} {member.doing}" for member in members if not member.placed.done()]
                parts = [f"workers {ready}/{len(members)} ready", ", ".join(waiting), *self._discovery.remarks()]
                text = "; ".join(filter(None, parts))
                remaining = deadline - time.monotonic()
                if failure is None and waiting and remaining > 0 and text == said:
                    self._changed.wait(remaining)
                    continue
            if failure is not None:
                if isinstance(failure, PlacementError | WorkerDied | WorkerError):
                    well = sum(m.placed.done() and not m.placed.exception() and not m.died for m in members)
                    raise PlacementError(f"{well} of {len(members)} workers: {failure}") from failure
                raise failure
            if progress and text != said:
                progress(text)
            said = text
            if not waiting:
                return [member.placed.result() for member in members]
            if remaining <= 0:
                why = "; ".join([", ".join(waiting), *self._discovery.remarks(final=True)])
                raise PlacementError(f"{ready} of {len(members)} workers ready within {timeout:g} s; {why}")

    def _bring_up(self, member: _Member, request: Placement, deadline: float) -> None:
        """In a thread of its own; ends with a result or an exception in ``member.placed``."""
        try:
            ref, error = self._connect(member, request, deadline), None
        except BaseException as failure:  # noqa: BLE001  handed to place()
            ref, error = None, failure
        with self._changed:
            if ref is not None:
                member.placed.set_result(ref)
            else:
                member.placed.set_exception(error)
            self._changed.notify_all()

    def _connect(self, member: _Member, request: Placement, deadline: float) -> WorkerRef:
        def say(doing: str) -> None:
            with self._changed:
                member.doing = doing
                self._changed.notify_all()

        # place() itself watches the deadline, and knows of all workers what they are waiting for; it is to be first.
        slack = 1.0
        endpoint = member.endpoint
        target = endpoint.target
        if endpoint.process is not None:
            target = endpoint.process.wait_listening(deadline - time.monotonic() + slack)
        session = WorkerSession(
            member.id,
            target,
            endpoint.token,
            endpoint.tls,
            max_message_bytes=self._max_message_bytes,
            on_break=lambda reason: self._session_broke(member, reason),
            transport=self._transport,
            reactor=self._reactor,
            encoder=self._encoder,
            locate=endpoint.locate,
        )
        with self._changed:
            closed = self._closed
            member.session = session
        if closed:
            session.abort()
        died = "while it was starting"
        if endpoint.process is not None and endpoint.process.exited.is_set():  # from here on, _process_exited tells
            raise PlacementError(f"{member.id} {endpoint.process.reason(died)}")
        try:
            session.open(deadline + slack, say)
            say(f"is constructing {request.worker_class}")
            overrides = request.env_overrides if endpoint.process is None else {}  # a child was started with them
            remaining = deadline - time.monotonic() + slack
            reply = session.init_worker(request.worker_class, request.env, remaining, overrides)
        except (PlacementError, WorkerDied):
            if endpoint.process is not None and endpoint.process.exited.wait(_EXIT_REPORT_SECONDS):
                raise PlacementError(f"{member.id} {endpoint.process.reason(died)}") from None
            raise
        if reply.failure:
            try:
                decode_reply("__init__", reply.failure)
            except WorkerError as error:
                raise PlacementError(
                    f"{member.id} cannot construct {request.worker_class}: {error.kind}: {error.remote_message}"
                ) from error
            except ConfigError as error:
                raise ConfigError(f"{member.id}: {error}") from None
        _check_versions(member.id, reply)
        return WorkerRef(
            id=member.id,
            node=reply.node,
            address=endpoint.target if endpoint.process is None else "",
            device_ids=tuple(reply.device_ids),
            index=member.index,
            pid=reply.pid,
        )

    # -------------------------------------------------------------------------------------------------- call

    def send(self, worker: WorkerRef, method: str, payload: Buffer, on_reply: OnReply) -> None:
        session = self._members[worker.id].session
        assert session is not None  # a WorkerRef exists only for a worker that has been placed
        session.send(method, payload, on_reply)

    def call(self, worker: WorkerRef, method: str, payload: Buffer) -> Future[Buffer]:
        session = self._members[worker.id].session
        assert session is not None  # a WorkerRef exists only for a worker that has been placed
        return session.call(method, payload)

    def wait(self, future: Future[Any], timeout: float) -> None:
        if self._reactor is not None:
            self._reactor.wait(future, timeout)
        else:
            wait_for(future, timeout)

    def _what_was_decided(self) -> str:
        """What carries the calls, and why the slower where the faster was wanted."""
        sessions = {id_: member.session for id_, member in self._members.items() if member.session is not None}
        slow = [f"{id_}: {session.why_not_direct}" for id_, session in sessions.items() if session.why_not_direct]
        said = f"calls go by {' and '.join(sorted({session.carrier for session in sessions.values()}))}"
        return f"{said} (no direct connection to {'; '.join(slow)})" if slow else said

    def compile(self, graph: Graph, timeout: float) -> BackendGraph:
        """Links between workers are opened here: Unix sockets between local workers, else TCP, with mutual TLS of the
        graph's own CA if the workers' servers have TLS."""
        workers = {}
        for id_, member in self._members.items():
            assert member.session is not None  # a graph is written with workers that have been placed
            workers[id_] = GraphWorker(member.session, member.session.address, member.endpoint.tls is not None)
        compiled = compile_graph(graph, next(self._graph_ids), workers, self.wait, timeout)
        with self._changed:
            self._graphs.add(compiled)
        return compiled

    @property
    def carriers(self) -> dict[str, str]:
        """What carries the calls of each worker, by its id: ``"grpc"`` or ``"direct"``."""
        return {id_: member.session.carrier for id_, member in self._members.items() if member.session is not None}

    # ------------------------------------------------------------------------------------------------- death

    def _process_exited(self, index: int) -> None:
        with self._changed:
            member = next((member for member in self._members.values() if member.index == index), None)
        if member is not None and member.endpoint.process is not None:
            method = member.session.pending_method if member.session else None
            self._died(member, member.endpoint.process.reason(f"during {method}" if method else ""))

    def _session_broke(self, member: _Member, reason: str) -> None:
        process = member.endpoint.process
        if process is not None:
            if process.exited.wait(_EXIT_REPORT_SECONDS):
                return  # _process_exited knows better why
            process.kill()
        self._died(member, reason)

    def _died(self, member: _Member, reason: str) -> None:
        with self._changed:
            if self._closed or member.died is not None:
                return
            member.died = WorkerDied(member.id, reason)
            self._changed.notify_all()
        if member.session is not None:
            member.session.fail(member.died)
        with self._changed:
            graphs = list(self._graphs)
        for graph in graphs:
            graph.worker_died(member.id, member.died)
        with self._reporting:
            with self._changed:
                report = self._on_failure if self._report_failures and not self._closed else None
            if report is not None:
                report(member.placed.result(), member.died)

    # ---------------------------------------------------------------------------------------------- shutdown

    def shutdown(self, timeout: float = 5.0) -> None:
        deadline = time.monotonic() + timeout
        with self._changed:
            first, self._closed = not self._closed, True
            members = list(self._members.values())
            self._changed.notify_all()
        if not first:
            self._ended.wait(timeout)
            return
        if self._reporting.acquire(timeout=timeout):  # an on_failure that has begun comes to its end first
            self._reporting.release()
        try:
            goodbyes = [self._say_goodbye(member) for member in members]
            politely_until = time.monotonic() + 0.6 * (deadline - time.monotonic())
            for over in filter(None, goodbyes):
                over.wait(max(0.0, politely_until - time.monotonic()))
        finally:  # also if Ctrl-C cuts the politeness short
            self._discovery.close(deadline)
            for member in members:
                if member.session is not None:
                    member.session.abort()
            if self._reactor is not None:
                self._reactor.close()
            atexit.unregister(self.shutdown)
            self._ended.set()

    def _say_goodbye(self, member: _Member) -> threading.Event | None:
        """Tell an idle worker to end, and return what tells that it has; one that is busy or was never placed is ended
        at once."""
        session, process = member.session, member.endpoint.process
        placed = member.placed.done() and member.placed.exception() is None
        if session is not None and placed and session.pending_method is None:
            session.close()
            return process.exited if process is not None else session.ended
        if process is not None:
            process.kill()
        if session is not None:
            session.abort()
        return None


def _check_nodes(request: Placement, refs: list[WorkerRef]) -> None:
    """Hold the workers to what was asked of their nodes."""
    nodes = {ref.node for ref in refs}
    if request.strategy == "STRICT_PACK" and len(nodes) > 1:
        raise PlacementError(
            f"strategy STRICT_PACK needs all workers on one node; they are on {', '.join(sorted(nodes))}"
        )
    if request.strategy == "STRICT_SPREAD" and len(nodes) < len(refs):
        raise PlacementError(
            f"strategy STRICT_SPREAD needs {len(refs)} nodes; the workers are on {', '.join(sorted(nodes))}"
        )
    for ref in refs:
        if len(ref.device_ids) < request.gpus_per_worker:
            raise PlacementError(f"{ref.id} sees {len(ref.device_ids)} GPUs; {request.gpus_per_worker} are needed")


def _check_versions(who: str, reply: Any) -> None:
    """Driver and worker exchange pickled code, so that both versions count."""
    ours, theirs = platform.python_version_tuple()[:2], tuple(reply.python_version.split(".")[:2])
    if reply.lightvllm_version != __version__ or ours != theirs:
        raise PlacementError(
            f"{who} runs lightvllm {reply.lightvllm_version} on Python {'.'.join(theirs)}, this driver lightvllm "
            f"{__version__} on Python {'.'.join(ours)}; install the same on both"
        )

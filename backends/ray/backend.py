"""The Ray backend: one actor per worker, each in a bundle of one placement group.

It places actors and moves bytes; what they mean is ``messages``' business, which cluster they live on is
``cluster.py``'s, and what happens inside an actor is ``host.py``'s.

Two threads do not belong to the caller. Ray completes a future on its own I/O thread, from which Ray must not be
called again; so that thread only puts the event into a queue, and ``_deliver`` resolves the caller's future. And
whatever in Ray may block for long runs in a short-lived thread (``cluster.in_thread``), so that every wait here ends on
time, on ``shutdown`` and on Ctrl-C.

A worker's end is seen by a call that never returns, ``WorkerHost.watch``: Ray fails it some ten milliseconds after
the process is gone, whether or not any call is pending.
"""

from __future__ import annotations

import collections
import functools
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import psutil

from lightvllm.backends.base import BackendGraph, Graph, OnFailure, OnReply, Placement, Progress, WorkerRef, tell
from lightvllm.backends.ray import cluster
from lightvllm.backends.ray.cluster import Lease, LocalClusterConfig, in_thread, one_line
from lightvllm.backends.ray.graph import MAX_GRAPHS, GraphFuture, Part, RayGraph
from lightvllm.backends.ray.host import BEGUN, WorkerHost
from lightvllm.errors import ConfigError, LightvllmError, PlacementError, RpcTimeout, Shutdown, WorkerDied, WorkerError
from lightvllm.messages import Buffer, decode_reply

logger = logging.getLogger(__name__)

SHARED_PAYLOAD_BYTES = 100 * 1024  # from here Ray puts an argument into shared memory: once for all workers is enough
_CLEAN_UP_SECONDS = 3.0  # for what Ray does at the end, where it still answers


class RayBackend:
    """See ``backends/base.py`` for the contract.

    Args:
        address: ``host:port`` of a running cluster, or ``auto``; None for RAY_ADDRESS or else a local cluster.
        local_cluster: what a local cluster is started with.
    """

    name = "ray"

    def __init__(self, address: str | None = None, local_cluster: LocalClusterConfig | None = None) -> None:
        cluster.require_ray()
        self.driver_node = ""  # known once there is a connection
        self._address = address
        self._local_cluster = local_cluster or LocalClusterConfig()
        self._connecting: Future[None] | None = None
        self._lease: Lease | None = None
        self._group: Any = None
        self._actors: dict[str, _Actor] = {}
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deliverer = threading.Thread(target=self._deliver, name="lightvllm-ray-replies", daemon=True)
        self._deliverer.start()
        self._on_failure: OnFailure | None = None  # set while workers are placed and the backend is open
        self._closing: Future[None] = Future()
        self._guard = threading.Lock()
        self._reporting = threading.RLock()  # held while on_failure runs
        self._ending = threading.RLock()
        self._placing: threading.Thread | None = None
        self._idle = threading.Event()  # no place() is under way
        self._idle.set()
        self._shared: tuple[bytes, Any] | None = None
        self._graph_order = threading.Lock()
        self._graphs: set[RayGraph] = set()  # not torn down

    # ------------------------------------------------------------------------------------------- placement

    def place(
        self, request: Placement, on_failure: OnFailure, timeout: float, progress: Progress | None = None
    ) -> Sequence[WorkerRef]:
        deadline = time.monotonic() + timeout
        tell: Progress = progress or (lambda _: None)
        if request.gpus_per_worker and "CUDA_VISIBLE_DEVICES" in request.env_overrides:
            raise ConfigError("env_overrides: Ray deals the GPUs out by CUDA_VISIBLE_DEVICES itself; leave it out")
        with self._guard:
            if self._closing.done():
                raise Shutdown("the backend has been shut down")
            if self._actors or self._placing:
                raise LightvllmError("place() has been called already; use another RayBackend for other workers")
            self._placing = threading.current_thread()
            self._idle.clear()
        try:
            where = f"to connect to Ray at {self._address}" if self._address else "for Ray to start"
            tell(f"waiting {where}")
            self._connecting = in_thread(self._connect)
            late = f"0 of {request.world_size} workers within {timeout:g} s; still waiting {where}"
            self._await([self._connecting], deadline, late)
            self._start_actors(request)
            refs = self._wait_until_ready(request, deadline, timeout, tell)
            with self._guard:
                dead = [actor for actor in self._actors.values() if actor.ended]
                if not dead and not self._closing.done():
                    self._on_failure = on_failure
                    return refs
            raise dead[0].ended if dead and dead[0].ended else Shutdown("the backend has been shut down")
        except WorkerDied as died:
            self._end(_CLEAN_UP_SECONDS)
            raise PlacementError(f"{self._ready()} of {request.world_size} workers; {died}") from died
        except BaseException as error:
            self._end(_CLEAN_UP_SECONDS)
            if isinstance(error, LightvllmError) or not isinstance(error, Exception):
                raise
            raise PlacementError(
                f"{self._ready()} of {request.world_size} workers; Ray failed: {one_line(error)}"
            ) from error
        finally:
            self._placing = None
            self._idle.set()

    def _connect(self) -> None:
        lease = cluster.connect(self._address, self._local_cluster, self._closing)
        with self._guard:
            if not self._closing.done():
                self._lease = lease
                self.driver_node = str(cluster.import_ray().util.get_node_ip_address())
                return
        lease.release()

    def _start_actors(self, request: Placement) -> None:
        """Ask for the group and its actors. Ray starts the actors when it has reserved the group."""
        ray = cluster.import_ray()
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._lease is not None
        bundle = _bundle(request)
        if self._lease.is_local and (missing := _never_fits(ray, request)):
            raise PlacementError(missing)
        self._group = ray.util.placement_group([bundle] * request.world_size, strategy=request.strategy)
        # Ray runs the loops of compiled graphs in a group of its own, by default one at a time.
        groups = {"watch": 1, "control": 1, "late": 1, "_ray_system": MAX_GRAPHS}
        host = ray.remote(concurrency_groups=groups)(WorkerHost)
        for index in range(request.world_size):
            handle = host.options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            ).remote()
            actor = _Actor(WorkerRef(f"ray-{index}", "", index=index), handle)
            self._actors[actor.ref.id] = actor
            self._follow(actor, handle.watch.options(concurrency_group="watch").remote(), None, "watch")
            env, overrides = dict(request.env), dict(request.env_overrides)
            self._follow(actor, handle.start.remote(request.worker_class, env, overrides), actor.started, "start")

    def _wait_until_ready(
        self, request: Placement, deadline: float, timeout: float, tell: Progress
    ) -> Sequence[WorkerRef]:
        actors = list(self._actors.values())
        pending = {actor.started for actor in actors}
        tell(f"workers 0/{len(actors)} ready")
        while pending:
            try:
                done = self._await(pending, deadline, "")
            except PlacementError:
                raise PlacementError(
                    f"{self._ready()} of {len(actors)} workers within {timeout:g} s; {self._what_is_missing(request)}"
                ) from None
            pending -= done
            for actor in actors:
                if actor.started in done:
                    actor.ref = self._placed(actor)
            tell(f"workers {self._ready()}/{len(actors)} ready")
        return [actor.ref for actor in actors]

    def _placed(self, actor: _Actor) -> WorkerRef:
        """The finished reference of an actor that has answered ``start``; raises what it answered."""
        answer = actor.started.result()
        if isinstance(answer, dict):
            return WorkerRef(actor.ref.id, answer["node"], "", answer["device_ids"], actor.ref.index, answer["pid"])
        try:
            decode_reply("__init__", answer)
        except WorkerError as failed:
            raise PlacementError(
                f"{self._ready()} of {len(self._actors)} workers; {actor.ref.id} could not be constructed: "
                f"{failed.kind}: {failed.remote_message}"
            ) from failed
        raise PlacementError(f"{actor.ref.id} gave no answer to start; do driver and worker run the same lightvllm?")

    def _ready(self) -> int:
        return sum(bool(actor.ref.pid) for actor in self._actors.values())

    def _what_is_missing(self, request: Placement) -> str:
        ray = cluster.import_ray()
        reserved = in_thread(lambda: bool(self._group.wait(0.01)))
        wait([reserved], 1.0)
        if reserved.done() and not reserved.exception() and reserved.result():
            late = ", ".join(actor.ref.id for actor in self._actors.values() if not actor.ref.pid)
            return f"{late} still constructing {request.worker_class}"
        return f"no room: {_needs(request)}; {_offers(ray)}"

    def _await(self, futures: Sequence[Future[Any]] | set[Future[Any]], deadline: float, late: str) -> set[Future[Any]]:
        """Those of ``futures`` that are done, at least one; raises the error of one, Shutdown, or PlacementError."""
        done = wait({*futures, self._closing}, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED).done
        if self._closing in done:
            raise Shutdown("the backend has been shut down while it was placing workers")
        if not done:
            raise PlacementError(late)
        for future in done:
            future.result()
        return done

    # ------------------------------------------------------------------------------------------------ calls

    def send(self, worker: WorkerRef, method: str, payload: Buffer, on_reply: OnReply) -> None:
        self.call(worker, method, payload).add_done_callback(functools.partial(tell, on_reply))

    def call(self, worker: WorkerRef, method: str, payload: Buffer) -> Future[Buffer]:
        actor = self._actors[worker.id]
        future: Future[Buffer] = Future()
        future.set_running_or_notify_cancel()
        with actor.guard:  # also keeps the order of calls
            if actor.ended is not None:
                future.set_exception(actor.ended)
                return future
            number = actor.next_number
            try:
                reply = actor.handle.call.remote(number, method, self._argument(payload))
            except Exception as error:  # noqa: BLE001  Ray's, which may not come out
                future.set_exception(LightvllmError(f"Ray could not send {method} to {worker.id}: {one_line(error)}"))
                return future
            actor.next_number += 1
            actor.pending.add(future)
        self._follow(actor, reply, future, method, number)
        return future

    def wait(self, future: Future[Any], timeout: float) -> None:
        if isinstance(future, GraphFuture):
            future.wait(timeout)
        else:
            wait([future], timeout)

    def _argument(self, payload: Buffer) -> Any:
        """What to hand to Ray: the bytes, or for many of them a reference that the other workers' calls share."""
        if len(payload) < SHARED_PAYLOAD_BYTES:
            return bytes(payload)
        if not isinstance(payload, bytes):  # may be changed between two calls
            return cluster.import_ray().put(bytes(payload))
        shared = self._shared
        if shared is None or shared[0] is not payload:
            shared = self._shared = (payload, cluster.import_ray().put(payload))
        return shared[1]

    def _follow(
        self, actor: _Actor, reply: Any, future: Future[Any] | None, method: str, number: int | None = None
    ) -> None:
        """Have ``reply``'s value, or its error, reach ``future`` (None: the watch) through the queue.

        ``number``: of the call, if the value may be BEGUN."""
        reply.future().add_done_callback(
            lambda source: self._events.put(lambda: self._settle(actor, source, future, method, number))
        )

    def _deliver(self) -> None:
        while (event := self._events.get()) is not None:
            event()

    def _settle(
        self, actor: _Actor, source: Future[Any], future: Future[Any] | None, method: str, number: int | None
    ) -> None:
        error = source.exception()
        self._shared = None  # nobody is waiting for as long as a large payload should be kept
        if error is not None and isinstance(error, cluster.import_ray().exceptions.RayActorError):
            self._died(actor, WorkerDied(actor.ref.id, _reason(error, actor.ref)))
        elif future is not None:
            if number is not None and error is None and source.result() == BEGUN:
                self._collect(actor, future, method, number)
                return
            with actor.guard:
                actor.pending.discard(future)
                if future.done():
                    return
            if error is None:
                future.set_result(source.result())
            else:
                future.set_exception(WorkerError(None, method, type(error).__name__, one_line(error)))

    def _collect(self, actor: _Actor, future: Future[Any], method: str, number: int) -> None:
        """Ask for the reply to a call that has only been begun."""
        with actor.guard:
            if actor.ended is not None:
                return  # the future has failed
            try:
                reply = actor.handle.collect.options(concurrency_group="late").remote(number)
            except Exception as error:  # noqa: BLE001  Ray's, which may not come out
                actor.pending.discard(future)
                failure = f"Ray could not ask {actor.ref.id} for the reply of {method}: {one_line(error)}"
            else:
                self._follow(actor, reply, future, method)
                return
        future.set_exception(LightvllmError(failure))

    def _died(self, actor: _Actor, died: WorkerDied) -> None:
        if not actor.end(died):
            return
        with self._reporting:
            with self._guard:  # place() looks for the dead and sets on_failure in one go
                report = self._on_failure
            if report is not None:
                try:
                    report(actor.ref, died)
                except Exception:
                    logger.exception("on_failure raised for %s", actor.ref.id)

    # ---------------------------------------------------------------------------------------------- graphs

    def compile(self, graph: Graph, timeout: float) -> BackendGraph:
        _check(graph)
        counts = collections.Counter(node.worker for node in graph.nodes)
        actors = [self._actors[worker] for worker in counts]
        parts = [Part(a.ref.id, a.handle, counts[a.ref.id], a.take_numbers) for a in actors]
        made = RayGraph(graph, parts, self._graph_order, self._graphs.discard)
        self._graphs.add(made)
        try:
            for actor in actors:
                actor.join(made)
        except LightvllmError as error:
            made.fail(error)
            self._graphs.discard(made)
            raise
        building = in_thread(made.build)
        ended = made.ended
        awaited: list[Future[Any]] = [building, ended]
        wait(awaited, timeout, FIRST_COMPLETED)
        if building.done() and building.exception() is not None:  # of a death we hear in a moment
            wait([ended], _CLEAN_UP_SECONDS)
        if ended.done():
            raise ended.result()
        if not building.done():
            made.fail(ConfigError("the graph was not compiled in time"))
            raise RpcTimeout(f"compile: the graph's workers did not learn it within {timeout:g} s; are they busy?")
        if (failure := building.exception()) is not None:
            made.fail(ConfigError("the graph could not be compiled"))
            self._graphs.discard(made)
            raise LightvllmError(f"Ray could not compile the graph: {one_line(failure)}") from failure
        return made

    # --------------------------------------------------------------------------------------------- shutdown

    def shutdown(self, timeout: float = 5.0) -> None:
        if self._placing is not threading.current_thread():
            self._close()
            self._idle.wait(timeout)  # place() sees the closing and undoes what it has done
        self._end(timeout)

    def _close(self) -> None:
        with self._guard:
            self._on_failure = None
            first = not self._closing.done()
            if first:
                self._closing.set_running_or_notify_cancel()
        if first:
            self._closing.set_result(None)
        for actor in list(self._actors.values()):
            actor.end(Shutdown("the backend has been shut down"))

    def _end(self, timeout: float) -> None:
        """Undo everything; what Ray does not do within ``timeout`` is left to the end of the cluster or the job."""
        self._close()
        with self._ending:
            if self._connecting is not None:  # it sees the closing, and undoes what it has begun
                wait([self._connecting], max(timeout, _CLEAN_UP_SECONDS))
            lease, self._lease = self._lease, None
            if lease is not None:
                graphs = [graph.dispose() for graph in list(self._graphs)]
                if graphs or not lease.ends_cluster:
                    self._remove_actors(timeout)
                wait(graphs, max(timeout, _CLEAN_UP_SECONDS))  # Ray's own threads for them would outlive the cluster
                wait([in_thread(lease.release)], max(timeout, _CLEAN_UP_SECONDS))
            self._events.put(None)
        if threading.current_thread() is not self._deliverer:
            self._deliverer.join(timeout)
        if self._reporting.acquire(timeout=timeout):  # an on_failure that had begun has returned
            self._reporting.release()

    def _remove_actors(self, timeout: float) -> None:
        ray = cluster.import_ray()

        def remove() -> None:
            for actor in self._actors.values():
                ray.kill(actor.handle, no_restart=True)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)

        removed = in_thread(remove)
        wait([removed], max(timeout, _CLEAN_UP_SECONDS))
        if removed.done() and (error := removed.exception()):
            logger.warning("Ray did not remove all workers: %s", one_line(error))
        deadline = time.monotonic() + max(timeout, _CLEAN_UP_SECONDS)
        here = [actor.ref.pid for actor in self._actors.values() if actor.ref.node == self.driver_node]
        while any(map(_is_running, here)) and time.monotonic() < deadline:
            time.sleep(0.005)


class _Actor:
    """A worker as the driver sees it."""

    def __init__(self, ref: WorkerRef, handle: Any) -> None:
        self.ref = ref  # node, devices and process id are known once it has started
        self.handle = handle
        self.started: Future[dict[str, Any] | bytes] = Future()
        self.started.set_running_or_notify_cancel()
        self.pending: set[Future[Any]] = {self.started}
        self.ended: WorkerDied | Shutdown | None = None
        self.guard = threading.Lock()
        self.next_number = 0  # of its next call or step (``host.Turns``)
        self.graphs: set[RayGraph] = set()

    def take_numbers(self, count: int) -> range:
        """The turns of the next ``count`` calls; raises what it has ended with."""
        with self.guard:
            if self.ended is not None:
                raise self.ended
            first, self.next_number = self.next_number, self.next_number + count
            return range(first, self.next_number)

    def join(self, graph: RayGraph) -> None:
        """Have ``graph`` end with this worker; raises what it has ended with, and ConfigError if it is in too many."""
        with self.guard:
            if self.ended is not None:
                raise self.ended
            self.graphs = {other for other in self.graphs if other.end is None}
            if len(self.graphs) >= MAX_GRAPHS:
                raise ConfigError(
                    f"{self.ref.id} is part of {MAX_GRAPHS} compiled graphs already, as many as it has threads for on "
                    "Ray; tear one down"
                )
            self.graphs.add(graph)

    def end(self, error: WorkerDied | Shutdown) -> bool:
        """Fail what is pending and refuse what comes; False if that has happened before."""
        with self.guard:
            if self.ended is not None:
                return False
            self.ended = error
            pending, self.pending = self.pending, set()
        for future in pending:
            future.set_exception(error)
        for graph in self.graphs:
            graph.fail(error)
        return True


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # Ray is in no hurry to reap it
    except psutil.NoSuchProcess:
        return False


def _check(graph: Graph) -> None:
    for node in graph.nodes:
        if node.transport != "auto":
            raise ConfigError(
                f"tensor transport {node.transport!r} of {node.method}: Ray offers 'auto', which is its shared memory"
            )
    if graph.overlap_gpu_communication:
        raise ConfigError("_overlap_gpu_communication: no node uses 'nccl', so there is nothing to overlap")


# ------------------------------------------------------------------------------------- what fits, and in words


def _bundle(request: Placement) -> dict[str, float]:
    bundle = {"CPU": float(request.cpus_per_worker), "GPU": float(request.gpus_per_worker)}
    if not any(bundle.values()):
        raise ConfigError("cpus_per_worker=0 and gpus_per_worker=0; a Ray bundle must hold one of them")
    return {name: amount for name, amount in bundle.items() if amount}


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _never_fits(ray: Any, request: Placement) -> str:
    """Why a cluster that does not grow can never hold the request; empty if it can."""
    nodes, bundle = _nodes(ray), _bundle(request)
    room = [
        int(min(node.get(name, 0.0) // amount for name, amount in bundle.items())) for node in nodes
    ]  # bundles per node
    if request.strategy == "STRICT_SPREAD":
        room = [min(1, bundles) for bundles in room]
    most = max(room, default=0) if request.strategy == "STRICT_PACK" else sum(room)
    if most >= request.world_size:
        return ""
    return f"0 of {request.world_size} workers; no room: {_needs(request)}; {_offers(ray)}"


def _needs(request: Placement) -> str:
    bundles = f"{request.world_size} bundle{'s' * (request.world_size != 1)} of {_amounts(_bundle(request))}"
    where = {"STRICT_SPREAD": ", each on a node of its own", "STRICT_PACK": ", all on one node"}
    return f"{request.strategy} needs {bundles}{where.get(request.strategy, '')}"


def _offers(ray: Any) -> str:
    nodes = _nodes(ray)
    total, free = ray.cluster_resources(), ray.available_resources()
    resources = {name: f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} free" for name in ("CPU", "GPU")}
    return f"the cluster has {len(nodes)} node{'s' * (len(nodes) != 1)} with {_amounts(resources)}"


def _amounts(amounts: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{k}: {v:g}" if isinstance(v, float) else f"{k}: {v}" for k, v in amounts.items()) + "}"


def _reason(error: BaseException, ref: WorkerRef) -> str:
    """How the actor ended, in one sentence out of Ray's paragraph, which is about what else it may have been."""
    text = str(error)
    who = f"process {ref.pid} on {ref.node}" if ref.pid else "its process"
    if status := re.search(r"exit code (-?\d+)", text):
        return f"{who} exited with status {status[1]}"
    if "connection error code" in text or "Socket closed" in text:
        return f"{who} is gone without a word: killed (the kernel does so when memory is short), crashed or exited"
    return f"{who}: {one_line(error)}"

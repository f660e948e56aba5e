"""The narrow waist: what an orchestrator must be able to do, and nothing about models.

``DistributedExecutor`` is written against ``Backend`` alone, so that parity between orchestrators is a property
of the construction. The contract, held by one test suite on every backend (``tests/test_backend_contract.py``):

* ``place`` is all or nothing. It returns when every worker has answered; otherwise it cleans up and raises
  PlacementError (or the worker's own ConfigError) saying what was missing.
* Backends move bytes. A payload is encoded once and handed to ``call`` once per worker; a backend never decodes it.
* ``call`` returns at once. One worker runs one call at a time, in the order in which ``call`` was called.
* A method may return a ``messages.Deferred``: its worker goes on with the next call, and the reply comes later. One
  other thread finishes a worker's Deferreds, in their order. Until then their futures are pending like any others.
* A worker that dies fails its pending futures with WorkerDied at once, and ``on_failure`` fires exactly once per
  worker, never after ``shutdown`` has returned. A call to a dead worker gives a future that has failed already.
* ``shutdown`` is idempotent, may be called at any moment from any thread, fails what is pending with Shutdown,
  and leaves no process, actor, placement group, socket or shared memory behind.
* No exception of ray, grpc or kubernetes crosses this border.

* ``wait`` waits for a future of this backend; where a caller waits, its thread may do the backend's own reading.
* ``compile`` installs a static graph of calls at the workers. A graph's calls and plain ones share each worker's one
  order. See ``Graph``; its contract is ``tests/test_graph_contract.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Literal, NoReturn, Protocol

import msgspec

from lightvllm.errors import ConfigError, WorkerDied
from lightvllm.messages import Buffer

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """What to place.

    Attributes:
        world_size: number of workers.
        worker_class: ``"package.module:Class"``, constructed without arguments on the worker's side.
        gpus_per_worker: GPUs reserved for each worker; 0 on CPUs.
        cpus_per_worker: CPUs reserved for each worker, where the orchestrator counts them.
        strategy: over nodes; PACK and SPREAD are wishes, the STRICT ones are conditions.
        env: environment variables for the workers, set before ``worker_class`` is imported.
            A variable that a worker's own environment has already is not overwritten.
        env_overrides: likewise, but a worker's own value, and that of ``env``, gives way. What only a process's start
            reads (LD_PRELOAD, PYTHONHASHSEED) takes effect where the backend starts the processes itself: local workers
            of the Kubernetes backend. PYTHONPATH takes effect everywhere.

    Neither ``repr`` nor an error shows a variable's value.

    Raises:
        ConfigError: a variable that no environment can hold, or that cannot be sent.
    """

    world_size: int
    worker_class: str
    gpus_per_worker: int = 0
    cpus_per_worker: int = 1
    strategy: Strategy = "PACK"
    env: Mapping[str, str] = {}
    env_overrides: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        for field in ("env", "env_overrides"):
            for name, value in getattr(self, field).items():
                _check_variable(field, name, value)

    def __repr__(self) -> str:
        hidden = {field: sorted(getattr(self, field)) for field in ("env", "env_overrides")}
        shown = {field: getattr(self, field) for field in self.__struct_fields__} | hidden
        return f"Placement({', '.join(f'{field}={value!r}' for field, value in shown.items())})"


def _check_variable(field: str, name: object, value: object) -> None:
    """Raise ConfigError, without the value, for what would fail later and elsewhere, with the value."""
    if not isinstance(name, str) or not name or "=" in name or not _is_plain(name):
        shown = name.partition("=")[0] if isinstance(name, str) else type(name).__name__  # a value may stand behind it
        raise ConfigError(
            f"{field}: {shown!r} is no name of a variable, or not all of it; expected text without = or NUL"
        )
    if not isinstance(value, str):
        raise ConfigError(f"{field}: the value of {name} is of type {type(value).__name__}; expected str")
    if not _is_plain(value):
        raise ConfigError(f"{field}: the value of {name} contains NUL or is no valid UTF-8; expected plain text")


def _is_plain(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


class WorkerRef(msgspec.Struct, frozen=True):
    """A placed worker. It carries no rank: ranks are dealt after placement (``executors/ranks.py``).

    Attributes:
        id: unique within its backend; names the worker in messages.
        node: the node's name or address; equal for workers on one node.
        address: where it listens, or ``""``.
        device_ids: GPUs that it sees.
        index: position in the order of placement (the pod's index, the bundle's index).
        pid: process id on its node, for messages and tests.
    """

    id: str
    node: str
    address: str = ""
    device_ids: tuple[str, ...] = ()
    index: int = 0
    pid: int = 0


TensorTransport = Literal["auto", "grpc", "nccl", "gloo", "shared"]
"""How a node's result travels to nodes on other workers: ``auto`` is the backend's own choice."""


class GraphInput(msgspec.Struct, frozen=True, tag="input"):
    """What ``execute`` is given: all of it (``key`` None), a positional argument or a keyword argument."""

    key: int | str | None = None


class GraphResult(msgspec.Struct, frozen=True, tag="result"):
    """The result of an earlier node, by its position in ``Graph.nodes``."""

    node: int


class GraphConstant(msgspec.Struct, frozen=True, tag="constant"):
    """A value known when the graph is compiled (``messages.encode_value``)."""

    payload: bytes


GraphArgument = GraphInput | GraphResult | GraphConstant


class GraphNode(msgspec.Struct, frozen=True):
    """One method call on one worker (``WorkerRef.id``), and how its result travels to other workers."""

    worker: str
    method: str
    args: tuple[GraphArgument, ...] = ()
    kwargs: Mapping[str, GraphArgument] = {}
    transport: TensorTransport = "auto"


class Graph(msgspec.Struct, frozen=True):
    """A static graph of calls.

    Attributes:
        nodes: in an order in which each uses only earlier ones; a worker runs its own in this order.
        outputs: nodes whose results ``execute`` gives back.
        max_inflight_executions: bound of the executions that are not done, which the caller keeps.
        buffer_size_bytes: initial size of a channel's buffers; None for the backend's own choice. A backend whose
            channels have no buffers of fixed size refuses anything else with ConfigError.
        overlap_gpu_communication: overlap sending and receiving with computing. A backend that has no such choice
            refuses True with ConfigError.
        step_timeout: seconds that a worker may wait for another's result, where it would otherwise wait for ever: the
            other one lives, but does not come to an end. What depends on that result fails then. (Not on Ray, whose
            loops cannot be told: there it is waited for until the other one dies or the backend is shut down.)
    """

    nodes: tuple[GraphNode, ...]
    outputs: tuple[int, ...]
    max_inflight_executions: int = 10
    buffer_size_bytes: int | None = None
    overlap_gpu_communication: bool = False
    step_timeout: float = 300.0


class BackendGraph(Protocol):
    """A graph that its workers know. Times and bounds are the caller's business (``executors/graph.py``)."""

    def execute(self, inputs: Mapping[int | str | None, bytes]) -> Future[list[Buffer]]:
        """Run once: one encoded value or failure (``messages.decode_value``) for each of ``Graph.outputs``.

        ``inputs``: an encoded value for every key of the graph's GraphInputs. Returns at once; executions run in
        the order of the calls and may overlap at different workers. A method that raises makes its node's result a
        failure, which spreads to what uses it and leaves the graph usable (``backends/program.py``). The future itself
        fails only as those of ``Backend.call`` do: with WorkerDied if any of the graph's workers is dead or dies.
        It gets done if somebody waits for it, by ``Backend.wait`` or by ``result``, or has added a callback.
        """

    def teardown(self, timeout: float) -> None:
        """Let the workers forget the graph, after what is in flight; the workers stay usable. Idempotent.

        What is in flight comes to its end and its futures get done; nothing may be executed from the call on. Raises
        RpcTimeout if that takes longer than ``timeout`` seconds, whereupon it may be called again. Does nothing for a
        graph that a death or ``shutdown`` has ended.
        """


OnFailure = Callable[[WorkerRef, WorkerDied], None]
OnReply = Callable[[Buffer | BaseException], None]
"""Given a call's reply, or the error that the future of ``Backend.call`` would have failed with."""
Progress = Callable[[str], None]
"""Told, in a few words, what is being waited for: "workers 1/2 ready"."""


class Backend(Protocol):
    """See the module's docstring for the contract of each method."""

    name: str
    driver_node: str
    """The node that the driver runs on, in the terms of ``WorkerRef.node``."""

    def place(
        self, request: Placement, on_failure: OnFailure, timeout: float, progress: Progress | None = None
    ) -> Sequence[WorkerRef]:
        """Start or find ``request.world_size`` workers within ``timeout`` seconds. Called once."""

    def call(self, worker: WorkerRef, method: str, payload: Buffer) -> Future[Buffer]:
        """Have ``worker`` run ``messages.begin(method, payload)``; the future gives the encoded reply."""

    def send(self, worker: WorkerRef, method: str, payload: Buffer, on_reply: OnReply) -> None:
        """``call`` without a future, which costs as much as a small call itself. ``on_reply`` is called once, in
        whichever thread has the reply or the error, perhaps before ``send`` returns; it must neither block nor
        raise."""

    def wait(self, future: Future[Any], timeout: float) -> None:
        """Return when ``future``, which depends on calls of this backend, is done, or after ``timeout`` seconds."""

    def compile(self, graph: Graph, timeout: float) -> BackendGraph:
        """Have the workers learn ``graph`` within ``timeout`` seconds.

        Raises ConfigError for what this backend cannot do (a transport), WorkerDied, RpcTimeout, Shutdown.
        """

    def shutdown(self, timeout: float = 5.0) -> None:
        """End every worker, with force where it does not end by itself within ``timeout`` seconds."""


def wait_for(future: Future[Any], timeout: float) -> None:
    """Return when ``future`` is done or ``timeout`` seconds have passed; cheaper than ``concurrent.futures.wait``."""
    with contextlib.suppress(TimeoutError, CancelledError):
        future.exception(timeout)


def complete(future: Future[Buffer], reply: Buffer | BaseException) -> None:
    """As OnReply: what ``call`` makes of ``send``."""
    if isinstance(reply, BaseException):
        future.set_exception(reply)
    else:
        future.set_result(reply)


def tell(on_reply: OnReply, future: Future[Buffer]) -> None:
    """As the callback of a future: what ``send`` makes of ``call``."""
    error = future.exception()
    on_reply(future.result() if error is None else error)


def exit_with(error: BaseException) -> NoReturn:
    """In a worker's process: end it as ``error`` would have ended it in the main thread."""
    code = error.code if isinstance(error, SystemExit) else 1
    if isinstance(error, SystemExit) and not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def set_environment(env: Mapping[str, str], overrides: Mapping[str, str]) -> None:
    """``Placement.env`` and ``Placement.env_overrides`` in this process, before the worker class is imported.

    The interpreter has read PYTHONPATH at its start, so the folders of one in ``overrides`` come first in ``sys.path``
    from now on.
    """
    for name, value in env.items():
        os.environ.setdefault(name, value)
    os.environ.update(overrides)
    folders = [folder for folder in overrides.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*folders, *(entry for entry in sys.path if entry not in folders)]


def load_worker_class(name: str) -> Any:
    """``"package.module:Class"`` to the class. Raises ConfigError for a malformed name or a missing class."""
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"worker class {name!r} is malformed; expected 'package.module:Class'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        raise ConfigError(f"worker class {name!r}: {missing}") from missing
    try:
        return getattr(module, class_name)
    except AttributeError:
        raise ConfigError(f"worker class {name!r}: module {module_name!r} has no class {class_name!r}") from None

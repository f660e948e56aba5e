"""``EngineCore``: the one thread that owns an ``LLMEngine``. Commands come in, events go out (``core_messages.py``).

It takes all commands that have come, runs a step, and says in one event all that is new; then again. While no request
is unfinished it sleeps until a command comes. It never waits for whoever takes the events: ``emit`` must return at
once, and ``Outbox`` is where events wait, merged, so that what waits is bounded by the text of the unfinished requests
and of those that have finished since the last were taken.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from lightvllm.backends.base import WorkerRef
from lightvllm.config import EngineConfig
from lightvllm.engine.core_messages import (
    Abort,
    Add,
    CheckHealth,
    Command,
    Delta,
    Ended,
    Event,
    Failure,
    Health,
    Outputs,
    Progress,
    Ready,
    Stop,
)
from lightvllm.engine.engine import LLMEngine, StepExecutor
from lightvllm.engine.outputs import RequestOutput
from lightvllm.engine.protocol import RankState
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import LightvllmError, RpcTimeout, Shutdown, WorkerDied, WorkerError
from lightvllm.messages import WorkerInfo


class CoreExecutor(StepExecutor, Protocol):
    """What the loop needs of an executor beyond what the engine needs (``executors.factory.EngineExecutor``)."""

    workers: list[WorkerRef]
    worker_infos: list[WorkerInfo]
    start_seconds: float

    @property
    def is_failed(self) -> bool: ...

    def register_failure_callback(self, callback: Callable[[], None]) -> None: ...

    def check_health(self) -> None: ...


DEATH_SECONDS = 2.0
"""How long a worker's error may wait for the death that it came of: peers of a worker that dies are often heard first,
with an error of their connection to it."""

_SHORTEST_TIMEOUT = 1e-6

MakeExecutor = Callable[[Callable[[str], None]], CoreExecutor]
"""Places the workers and has them load the model; given what is to be told of the progress."""


class _WorkerDied(msgspec.Struct, frozen=True):
    """In the inbox: the executor has said so."""


class EngineCore:
    """See the module's docstring. ``post`` is for any thread and for signal handlers; ``run`` is the loop's thread.

    Args:
        config: of the engine.
        tokenizer: makes text of tokens; None leaves the text out.
        make_executor: called in the loop's thread.
        emit: given each event, in the loop's thread (``Health``: in another); returns at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        make_executor: MakeExecutor,
        emit: Callable[[Event], None],
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._make_executor = make_executor
        self._emit = emit
        self._inbox: queue.SimpleQueue[Command | _WorkerDied] = queue.SimpleQueue()  # its put may interrupt its put
        self._executor: CoreExecutor | None = None
        self._begun: dict[int, bool] = {}  # unfinished requests: whether anything has been said of them
        self._stopping = False

    @property
    def started(self) -> bool:
        """The workers are ready; until then only an exception in the loop's thread can end it early."""
        return self._executor is not None

    def post(self, command: Command | _WorkerDied) -> None:
        """Have the loop do something. Returns at once."""
        self._inbox.put(command)

    def force(self) -> None:
        """End the workers although a step may be running, which fails then. For a ``Stop`` that takes too long."""
        if self._executor is not None:
            self._executor.shutdown()

    def run(self) -> None:
        """Start the workers and loop until ``Stop``, or until the engine has failed. Raises nothing."""
        try:
            executor = self._make_executor(lambda text: self._emit(Progress(text)))
        except BaseException as error:  # noqa: BLE001  an interrupt, too, is how a start ends
            _complain(error)
            self._emit(Ended(Failure.of(error)))
            return
        try:
            engine = LLMEngine(self._config, executor, tokenizer=self._tokenizer, structured_checked=True)
            self._executor = executor
            executor.register_failure_callback(lambda: self.post(_WorkerDied()))
            self._emit(Ready(rank_states(executor, self._config), engine.stats(), executor.start_seconds))
            self._loop(engine)
            failure: BaseException = Shutdown("the engine has been shut down")
        except BaseException as error:  # noqa: BLE001  said to the front; nobody else is there to be told
            _complain(error)
            failure = _cause(error, executor)
        try:
            self._emit(Ended(Failure.of(failure)))
        finally:
            executor.shutdown()

    def _loop(self, engine: LLMEngine) -> None:
        while True:
            refused: dict[int, Failure] = {}
            if not engine.has_unfinished_requests():
                self._handle(self._inbox.get(), engine, refused)
            while not self._stopping:
                try:
                    command = self._inbox.get_nowait()
                except queue.Empty:
                    break
                self._handle(command, engine, refused)
            if self._stopping:
                return
            deltas = [self._delta(output) for output in engine.step()] if engine.has_unfinished_requests() else []
            self._emit(Outputs(deltas, engine.stats(), refused))

    def _handle(self, command: Command | _WorkerDied, engine: LLMEngine, refused: dict[int, Failure]) -> None:
        match command:
            case Add():
                try:
                    self._add(command, engine)
                except LightvllmError as error:
                    refused[command.number] = Failure.of(error)
            case Abort():
                self._begun.pop(command.number, None)
                engine.abort(str(command.number))
            case CheckHealth():
                threading.Thread(target=self._check_health, name="lightvllm-health", daemon=True).start()
            case Stop():
                self._stopping = True
            case _WorkerDied():
                assert self._executor is not None
                self._executor.check_health()  # raises what has happened
                raise LightvllmError("the executor reported a failure, but finds none")

    def _add(self, command: Add, engine: LLMEngine) -> None:
        timeout = command.timeout
        if timeout is not None:  # some of it has gone by while the step before was running
            timeout = max(timeout - (time.monotonic() - command.arrival_time), _SHORTEST_TIMEOUT)
        request_id, priority = str(command.number), command.priority
        if command.sampling_params is None:
            engine.add_embedding_request(request_id, command.prompt_token_ids, priority=priority, timeout=timeout)
        else:
            engine.add_request(
                request_id,
                command.prompt_token_ids,
                command.sampling_params,
                stream="delta" if command.stream else False,
                priority=priority,
                timeout=timeout,
            )
        self._begun[command.number] = False

    def _delta(self, output: RequestOutput) -> Delta:
        number = int(output.request_id)
        first = not self._begun[number]
        if output.finished:
            del self._begun[number]
        else:
            self._begun[number] = True
        return Delta.of(number, output, first=first)

    def _check_health(self) -> None:
        """Apart from the loop, which goes on; the executor's calls may come from any thread."""
        assert self._executor is not None
        try:
            self._executor.check_health()
        except Exception as error:  # noqa: BLE001  said to whoever asked
            self._emit(Health(Failure.of(error)))
        else:
            self._emit(Health())


class Outbox:
    """Events that nobody has taken yet; outputs that follow each other become one. For any threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        with self._lock:
            last = self._events[-1] if self._events else None
            if isinstance(event, Outputs) and isinstance(last, Outputs):
                last.add(event)
            else:
                self._events.append(event)

    def take(self) -> list[Event]:
        with self._lock:
            events, self._events = self._events, []
        return events


def rank_states(executor: CoreExecutor, config: EngineConfig) -> list[RankState]:
    """The workers, in rank order, all of them ready."""
    tp = config.parallel.tensor_parallel_size
    return [
        RankState(
            rank=rank,
            tp_rank=rank % tp,
            pp_rank=rank // tp,
            worker=worker.id,
            node=worker.node,
            address=worker.address,
            device=info.device,
            pid=worker.pid,
            parameter_bytes=info.parameter_bytes,
        )
        for rank, (worker, info) in enumerate(zip(executor.workers, executor.worker_infos, strict=True))
    ]


def ended_ranks(ranks: Sequence[RankState], failure: Failure) -> list[RankState]:
    """The same workers after the engine's end: dead is the one whose death was the failure, the others are stopped."""
    died = failure.attributes if failure.kind == "WorkerDied" else {}
    return [
        msgspec.structs.replace(state, health="dead", reason=str(died["reason"]))
        if died and state.rank == died["rank"]
        else msgspec.structs.replace(state, health="stopped")
        for state in ranks
    ]


def _cause(error: BaseException, executor: CoreExecutor) -> BaseException:
    """The death that ``error`` came of, if one worker's error was heard before another's death; else ``error``."""
    if not isinstance(error, WorkerError | RpcTimeout) or len(executor.workers) < 2:
        return error
    died = threading.Event()
    executor.register_failure_callback(died.set)
    if not died.wait(DEATH_SECONDS):
        return error
    try:
        executor.check_health()
    except WorkerDied as death:
        return death
    except LightvllmError:
        pass
    return error


def _complain(error: BaseException) -> None:
    """A defect's traceback; what is lightvllm's own says all in its text."""
    if not isinstance(error, LightvllmError | KeyboardInterrupt):
        traceback.print_exception(error, file=sys.stderr)

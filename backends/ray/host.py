"""The actor's side: one worker object in one Ray actor. Runs where the worker runs; the driver sends it there by name.

Calls run one at a time, in the order in which they were sent. Ray itself keeps that only for plain calls among
themselves: each compiled graph runs in a thread of its own, fed by shared memory that is faster than a call. So the
driver gives every plain call and every step of an execution a number, and here each waits for its turn.

What a method has left to be finished later (``messages.Deferred``) is finished by one other thread, in order. Ray knows
no call that returns twice: the call's answer is ``BEGUN``, upon which the driver asks for the reply by ``collect``.
"""

from __future__ import annotations

import functools
import os
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import psutil

from lightvllm.backends.base import Graph, GraphResult, exit_with, load_worker_class, set_environment
from lightvllm.backends.late import LateThread
from lightvllm.backends.program import Source, dump, load, steps
from lightvllm.messages import Buffer, begin, encode_failure

BEGUN = b"begun"
"""In place of a reply that is to be collected. No reply begins with such a byte (``messages.begin``)."""


def apply_env(env: Mapping[str, str], overrides: Mapping[str, str]) -> None:
    """Set what the process has not been started with, and ``overrides`` in any case.

    Ray sets OMP_NUM_THREADS to the CPUs that it counts for the actor, after the start; that is a guess and no wish of
    anybody's, so it gives way. PYTHONPATH has been read already, so its folders are appended to ``sys.path``.
    """
    if "OMP_NUM_THREADS" not in psutil.Process().environ():
        os.environ.pop("OMP_NUM_THREADS", None)
    set_environment(env, overrides)
    for folder in env.get("PYTHONPATH", "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)


class Turns:
    """Lets numbered calls through one by one, in the order of their numbers, whichever thread each comes on."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0
        self._running = False
        self._skipped: list[range] = []

    def wait(self, number: int) -> bool:
        """Return when all before ``number`` are done or skipped; False if it is to be skipped itself."""
        with self._changed:
            self._changed.wait_for(lambda: self._next >= number and not self._running)
            if self._next > number:
                return False
            self._running = True
            return True

    def done(self) -> None:
        """The call that was let through has been done."""
        with self._changed:
            self._running = False
            self._next += 1
            self._advance()

    def skip(self, numbers: range) -> None:
        """These will not come, or need not be done if they do. One that is running comes to its end."""
        with self._changed:
            self._skipped.append(numbers)
            if not self._running:
                self._advance()

    def _advance(self) -> None:
        while hit := next((numbers for numbers in self._skipped if self._next in numbers), None):
            self._next = hit.stop
        self._skipped = [numbers for numbers in self._skipped if numbers.stop > self._next]
        self._changed.notify_all()


class Program:
    """A worker's part of one graph.

    What passes between workers and driver begins with a header, the same for all values of one execution: for each
    worker of the graph the number of its first step in that execution, as an unsigned 64 bit integer.
    """

    def __init__(self, graph: Graph, worker: str, position: int, header_bytes: int) -> None:
        self.header_bytes = header_bytes
        self._steps = {step.index: (number, step) for number, step in enumerate(steps(graph, worker))}
        self._first_number = struct.Struct(f"<{8 * position}xQ").unpack_from
        self._kept: dict[int, Any] = {}  # results that later steps of this execution use here
        self._last_use = {
            source.node: index
            for index, (_, step) in self._steps.items()
            for source in step.sources
            if isinstance(source, GraphResult)
        }

    def number(self, node: int, header: bytes) -> int:
        """The turn of a node in the execution with this header."""
        return int(self._first_number(header)[0]) + self._steps[node][0]

    def run(self, worker: object, node: int, header: bytes, payloads: tuple[Buffer, ...]) -> bytes:
        """Run a node; what to send on."""
        _, step = self._steps[node]
        result = step.run(worker, [self._value(node, *given) for given in zip(step.sources, payloads, strict=True)])
        if step.kept:
            self._kept[node] = result
        return header + dump(result, node) if step.sent else header

    def _value(self, node: int, source: Source, payload: Buffer) -> Any:
        if not isinstance(source, GraphResult) or source.node not in self._steps:
            return load(memoryview(payload)[self.header_bytes :], node)
        return self._kept.pop(source.node) if self._last_use[source.node] == node else self._kept[source.node]


class WorkerHost:
    """What the backend makes an actor of."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._worker: object = None
        self._programs: dict[str, Program] = {}
        self._late = LateThread("lightvllm-late-replies")
        self._begun: dict[int, Future[bytes]] = {}

    def start(
        self, worker_class: str, env: Mapping[str, str], env_overrides: Mapping[str, str]
    ) -> dict[str, Any] | bytes:
        """Construct the worker and say where it is; an encoded failure if it cannot be constructed."""
        import ray

        try:
            apply_env(env, env_overrides)
            self._worker = load_worker_class(worker_class)()
        except Exception as error:  # noqa: BLE001  told to the driver, which raises it
            return encode_failure(error)
        return {
            "node": ray.util.get_node_ip_address(),
            "device_ids": tuple(str(gpu) for gpu in ray.get_gpu_ids()),
            "pid": os.getpid(),
        }

    def call(self, number: int, method: str, payload: Buffer) -> bytes:
        """One call: its reply (``messages.begin``), or BEGUN."""
        self._turns.wait(number)
        try:
            reply = begin(self._worker, method, payload)
            if isinstance(reply, bytes):
                return reply
            finished = self._begun[number] = Future()
            self._late.put(functools.partial(_finish, reply, finished))
            return BEGUN
        finally:
            self._turns.done()

    def collect(self, number: int) -> bytes:
        """The reply of a call that was answered by BEGUN, when it is there; once."""
        return self._begun.pop(number).result()

    def skip(self, numbers: list[range]) -> None:
        """See ``Turns.skip``."""
        for some in numbers:
            self._turns.skip(some)

    # ------------------------------------------------------------------------------------------------- graphs

    def learn(self, name: str, graph: Graph, worker: str, position: int, header_bytes: int) -> None:
        """Be ready for ``step``. ``worker`` is this one's id, ``position`` its place in the header."""
        from ray.experimental.channel import ChannelContext

        self._programs[name] = Program(graph, worker, position, header_bytes)
        # Ray's loop imports torch before it reads its first input, which takes seconds: now rather than then.
        _ = ChannelContext.get_current().torch_available

    def forget(self, name: str) -> None:
        """The graph is torn down."""
        self._programs.pop(name, None)

    def step(self, name: str, node: int, *payloads: Buffer) -> bytes:
        """Run one node of one execution, on the thread of Ray's loop for its graph. Never raises an Exception, which
        Ray would hand to nodes that do not depend on this one."""
        program = self._programs[name]
        header = bytes(payloads[0][: program.header_bytes])
        if not self._turns.wait(program.number(node, header)):
            return header  # nobody waits for it any more
        try:
            return program.run(self._worker, node, header, payloads)
        except BaseException as error:  # noqa: BLE001  SystemExit and the like, which would end Ray's loop alone
            exit_with(error)
        finally:
            self._turns.done()

    def watch(self) -> None:
        """Never returns: its failure tells the driver that this process is gone. It waits, and costs no time."""
        threading.Event().wait()


def _finish(reply: Callable[[], bytes], finished: Future[bytes]) -> None:
    try:
        finished.set_result(reply())
    except BaseException as error:  # noqa: BLE001  SystemExit and the like, which would end this thread alone
        exit_with(error)

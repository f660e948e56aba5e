"""The engine's loop in a process of its own: ``ProcessCore``, the handle that its parent has. The child is
``core_main.py``.

The two speak over a private pair of Unix sockets, of which the child inherits one end: frames (``transfer/frames.py``)
of MessagePack (``core_messages.py``). There is no listener, and nothing is pickled. The end of the connection is the
end of the child, however the parent has died; and a thread here waits for the child's end, however that has come.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

from lightvllm.child import how_it_ended, python_path
from lightvllm.engine.core_messages import (
    MAX_FRAME_BYTES,
    Command,
    Ended,
    Event,
    Failure,
    Start,
    Stop,
    decode_event,
    encode,
)
from lightvllm.engine.core_thread import FORCED_SECONDS, Deliver
from lightvllm.engine.options import Configured
from lightvllm.errors import ConfigError, PlacementError, WorkerDied
from lightvllm.transfer.frames import DATA, FrameSocket

EXECUTOR_FACTORY = "lightvllm.executors.factory:make_executor"
_CHILD_MODULE = "lightvllm.engine.core_main"


class ProcessCore:
    """A ``CoreHandle`` (``core_thread.py``). Starts at once; ``deliver`` is called in the running event loop.

    Attributes:
        pid: the child's.
    """

    def __init__(
        self, configured: Configured, skip_tokenizer_init: bool, deliver: Deliver, shutdown_timeout: float
    ) -> None:
        """Raises PlacementError if the system cannot start a process, ConfigError for a path that is no UTF-8."""
        start = _encoded_start(configured, skip_tokenizer_init)
        self._deliver = deliver
        self._shutdown_timeout = shutdown_timeout
        self._runs_worker = configured.executor.name == "uniproc"
        self._loop = asyncio.get_running_loop()
        self._has_ended = False  # the child has said so
        self._closed = False
        self._over = asyncio.Event()  # for the event loop: the child is gone, and said to be
        self._gone = threading.Event()  # for everybody else
        self._reaping = threading.Lock()
        mine, childs = socket.socketpair()
        with childs:
            # Until it has its own group (and ignores that signal anyway), a terminal's Ctrl-C would end it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", _CHILD_MODULE, str(childs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2 if os.environ.get("LIGHTVLLM_DEBUG") else subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": python_path(os.environ.get("PYTHONPATH"))},
                    pass_fds=[childs.fileno()],
                    process_group=0,  # a terminal's Ctrl-C is for this process, which decides what becomes of it
                )
            except OSError as error:
                mine.close()
                raise PlacementError(f"cannot start the engine's process: {error}") from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pid = self._process.pid
        self._socket = mine
        self._frames = FrameSocket(mine, MAX_FRAME_BYTES, spin=0)
        self._loop.add_reader(mine, self._on_readable)
        self._waiter = threading.Thread(target=self._wait, name=f"lightvllm-engine-{self.pid}", daemon=True)
        self._waiter.start()
        self._send(start)

    def send(self, command: Command) -> None:
        self._send(encode(command))

    def _send(self, command: bytes) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # it is gone, or closed: which is said elsewhere
            if not self._frames.send(DATA, 0, b"", command):
                self._loop.add_writer(self._socket, self._write)

    async def close(self, timeout: float) -> None:
        if not self._has_ended:
            self.send(Stop())
        for limit in (timeout, FORCED_SECONDS):
            try:
                await asyncio.wait_for(self._over.wait(), limit)
                break
            except TimeoutError:
                self._kill()
        self._close()
        self._waiter.join(FORCED_SECONDS)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._gone.wait(self._shutdown_timeout):
            self._kill()
            self._gone.wait(FORCED_SECONDS)
        if self._loop.is_closed():  # otherwise it is in use there
            self._frames.close()

    # --------------------------------------------------------------------------------------- in the event loop

    def _on_readable(self) -> None:
        if not self._read():
            self._stop_listening()
            self._loop.call_later(self._shutdown_timeout, self._kill)  # it has no more to say, and should have ended

    def _read(self) -> bool:
        """Deliver what has come; False if nothing more will."""
        events: list[Event] = []
        try:
            while received := self._frames.receive():
                while received:
                    events.append(decode_event(received.popleft()[3]))
            return True
        except ConnectionError:
            return False
        finally:
            self._has_ended |= any(isinstance(event, Ended) for event in events)
            if events:
                self._deliver(events)

    def _write(self) -> None:
        with contextlib.suppress(ConnectionError):  # which is noticed where it is read
            if not self._frames.flush():
                return
        self._loop.remove_writer(self._socket)

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)

    def _report_end(self, how: str) -> None:
        """The child is gone. What it has said before comes first."""
        if self._closed:
            return
        self._read()
        if not self._has_ended:
            died = WorkerDied(f"engine process {self.pid}", how, rank=0 if self._runs_worker else None)
            self._deliver([Ended(Failure.of(died))])
        self._over.set()
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stop_listening()
            self._frames.close()

    # ---------------------------------------------------------------------------------------------- anywhere

    def _kill(self) -> None:
        with self._reaping:
            if not self._gone.is_set():
                self._kill_group()

    def _kill_group(self) -> None:
        """Until the child is reaped, its group's number is nobody else's."""
        with contextlib.suppress(ProcessLookupError):  # it has been killed before it had a group
            os.killpg(self.pid, signal.SIGKILL)

    def _wait(self) -> None:
        how: str | None = None
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # then its number, and its group's, may be somebody else's already
            how = "ended, nobody knows how: this process ignores SIGCHLD, or waits for all children"
        with self._reaping:
            if how is None:
                self._kill_group()  # what it started itself and left behind
            self._process.wait()
            self._gone.set()
        if how is None:
            how = how_it_ended(self._process.returncode)
            if self._process.returncode == -signal.SIGKILL:
                how += " (if nobody sent it, memory has run out)"
        with contextlib.suppress(RuntimeError):  # the event loop is closed: there is nobody to be told
            self._loop.call_soon_threadsafe(self._report_end, how)


def _encoded_start(configured: Configured, skip_tokenizer_init: bool) -> bytes:
    start = Start(
        engine=configured.engine,
        executor=configured.executor,
        path=str(configured.path),
        skip_tokenizer_init=skip_tokenizer_init,
        executor_factory=EXECUTOR_FACTORY,
        sys_path=[entry or os.getcwd() for entry in sys.path],
    )
    try:
        return encode(start)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{error.object!r:.200} is no UTF-8, and cannot be told to the engine's process; rename it, or use "
            "engine_process=False"
        ) from None

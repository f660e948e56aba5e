"""One worker server as a child process: start it, learn where it listens, see it end, end it. Imports no grpc.

A child is bound to its parent by its standard streams. *stdin* brings the bootstrap (one line of JSON: where to listen,
the token, limits) and stays open: at its end the child exits at once, so that no child outlives its parent, however the
parent died. *stdout* gives back one line: the address, or why there is none. *stderr* is the worker's output.
Used by the driver for local workers and by the supervisor of ``lightvllm worker``.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import IO, Any

import msgspec

from lightvllm import logs
from lightvllm.backends.k8s.security import Tls, Token
from lightvllm.child import how_it_ended, python_path
from lightvllm.errors import ConfigError, PlacementError

MAX_MESSAGE_BYTES = 256 * 2**20
"""Default of the largest payload of a call or a reply."""

_KILLED_SECONDS = 5.0  # from SIGKILL to the end, which the kernel may put off (a stuck mount or device)
_LAST_WORDS_SECONDS = 1.0  # to read to the end of what it has said, once it has ended
_HELD_SECONDS = 0.2  # likewise, where a grandchild elsewhere holds the pipe open, so that no end is in sight
_TAIL_LINES = 40
_TAIL_LINE_BYTES = 4096
_LINE_BYTES = 2**20  # a longer line is shown in pieces of this size, each on a line of its own
_SERVER_MODULE = "lightvllm.backends.k8s.server"


class Bootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is told on its stdin.

    Attributes:
        listen: ``"unix:/path"`` or ``"host:port"``; port 0 takes a free one.
        sys_path: the parent's ``sys.path``; what the child lacks is added behind its own, so that it can import the
            worker class that the parent named.
        reflection: answer server reflection, see ``reflection.py``.
    """

    listen: str
    token: str
    max_message_bytes: int
    tls: Tls | None = None
    sys_path: list[str] = []
    reflection: bool = False

    def __repr__(self) -> str:
        return f"Bootstrap(listen={self.listen!r}, token hidden)"


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the child says on its stdout, once: where it listens, or why it does not."""

    address: str = ""
    error: str = ""


_showing = threading.Lock()  # one line at a time, of all workers


class WorkerProcess:
    """A running child.

    Attributes:
        exited: set when the process has ended, ``reason`` knows how, and what it had started is killed.
    """

    def __init__(
        self,
        listen: str,
        token: Token,
        *,
        max_message_bytes: int,
        tls: Tls | None = None,
        reflection: bool = False,
        env: Mapping[str, str],
        capture: bool = True,
        show_output: bool = False,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        """Start it; returns before it listens.

        ``env`` is its whole environment. ``capture`` keeps the last lines of its stderr for error messages,
        otherwise it shares the parent's. ``show_output`` passes what is captured on to this process's stderr, line by
        line as it is. ``on_exit`` is called once, from a thread, when it has ended.
        Raises PlacementError if the system cannot start a process.
        """
        bootstrap = Bootstrap(
            listen=listen,
            token=token.reveal(),
            max_message_bytes=max_message_bytes,
            tls=tls,
            sys_path=[entry or os.getcwd() for entry in sys.path],
            reflection=reflection,
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _SERVER_MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if capture else None,
                env={**env, "PYTHONPATH": python_path(env.get("PYTHONPATH"))},
                process_group=0,  # a terminal's Ctrl-C is for the parent, which ends its children in order
            )
        except OSError as error:
            raise PlacementError(f"cannot start a worker process: {error}") from None
        self.pid = self._process.pid
        self.exited = threading.Event()
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._reader: threading.Thread | None = None
        if self._process.stderr is not None:
            self._reader = self._thread(self._read_stderr, self._process.stderr, show_output)
        self._status: Future[Status] = Future()
        self._reaping = threading.Lock()
        self._reaped = False
        self._thread(self._read_status, self._process.stdout)
        stdin = self._stdin()
        with contextlib.suppress(BrokenPipeError):  # it has died already, which wait_listening reports
            stdin.write(msgspec.json.encode(bootstrap) + b"\n")
            stdin.flush()
        self._thread(self._wait, on_exit)  # which closes stdin, so not before

    def wait_listening(self, timeout: float) -> str:
        """The address where it listens. Raises ConfigError with the child's reason, PlacementError if it died or
        ``timeout`` seconds passed."""
        try:
            status = self._status.result(timeout)
        except TimeoutError:
            raise PlacementError(f"worker process {self.pid} did not listen within {timeout:.0f} s") from None
        if status.error:
            raise ConfigError(status.error)
        if not status.address:
            self.exited.wait(1.0)  # its stdout has ended, so it is about to
            raise PlacementError(f"worker process {self.pid} {self.reason('before it listened')}")
        return status.address

    def reason(self, when: str = "") -> str:
        """How it ended, as part of a sentence: "killed by SIGKILL", "exited with code 1 during load_model: …"."""
        code = self._process.returncode
        if code is None:
            return "is running"
        how = f"{how_it_ended(code)} {when}" if when else how_it_ended(code)
        told = code not in (0, -signal.SIGKILL, -signal.SIGTERM) and self._tail
        return f"{how}: {self._tail[-1]}" if told else how

    def hang_up(self) -> None:
        """End the child's stdin, which makes it exit at once."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin().close()

    def kill(self) -> None:
        """SIGKILL it and what it has started itself."""
        with self._reaping:
            if not self._reaped:
                os.killpg(self.pid, signal.SIGKILL)

    def end(self, deadline: float) -> None:
        """Hang up; kill what has not gone at ``deadline`` (``time.monotonic()``)."""
        self.hang_up()
        if not self.exited.wait(max(0.0, deadline - time.monotonic())):
            self.kill()
            self.exited.wait(_KILLED_SECONDS)
        self._read_last_words()

    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name=f"lightvllm-worker-{self.pid}", daemon=True)
        thread.start()
        return thread

    def _read_stderr(self, stream: IO[bytes], show_output: bool) -> None:
        debug = bool(os.environ.get("LIGHTVLLM_DEBUG"))
        with stream:
            while line := stream.readline(_LINE_BYTES):
                if text := line[:_TAIL_LINE_BYTES].decode(errors="backslashreplace").rstrip():
                    self._tail.append(text)
                whole = line if line.endswith(b"\n") else line + b"\n"
                if show_output or logs.is_json_record(line.decode(errors="replace").rstrip()):  # says who it is from
                    _show(whole)
                elif debug:
                    _show(b"[worker %d] %s" % (self.pid, whole))

    def _read_last_words(self) -> None:
        """Of a process that has ended."""
        stream, reader = self._process.stderr, self._reader
        if stream is None or reader is None or not reader.is_alive():
            return
        poll = select.poll()
        with contextlib.suppress(ValueError):  # the reader has come to the end
            poll.register(stream.fileno(), 0)
            reader.join(_LAST_WORDS_SECONDS if poll.poll(0) else _HELD_SECONDS)  # POLLHUP comes unasked

    def _read_status(self, stream: IO[bytes]) -> None:
        with stream:
            line = stream.readline()
        self._status.set_result(msgspec.json.decode(line, type=Status) if line else Status())

    def _wait(self, on_exit: Callable[[], None]) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._reaping:  # until it is reaped, its group's number is nobody else's
            os.killpg(self.pid, signal.SIGKILL)  # what it started itself and left behind
            self._process.wait()
            self._reaped = True
        self._read_last_words()
        self.hang_up()
        self.exited.set()
        on_exit()


def _show(line: bytes) -> None:
    """On this process's stderr, in one go: below its text layer, where a line that is being printed in two writes may
    wait for its end. A stderr that takes nothing more is no reason to leave the worker with a pipe that is full."""
    with _showing, contextlib.suppress(OSError, ValueError):
        stream: Any = sys.stderr
        if stream is None:
            return
        if isinstance(stream, io.TextIOWrapper):
            stream, rest = stream.buffer, memoryview(line)
            while rest and (written := stream.write(rest)):  # with PYTHONUNBUFFERED it may take less than all
                rest = rest[written:]
        else:
            stream.write(line.decode(errors="backslashreplace"))
        stream.flush()

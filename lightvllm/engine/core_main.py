"""The engine's process: the loop in the main thread, and a thread that speaks with the parent (``core_process.py``).

Run as ``python -m lightvllm.engine.core_main FD``, where FD is its end of the connection. It says what it has to say on
that and writes only its log, to stderr. It ends when told to, by SIGTERM, when the engine has failed, and when the
parent has gone, which is the end of the connection. SIGINT is for the parent.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from lightvllm import logs
from lightvllm.backends.base import load_worker_class
from lightvllm.engine.core import EngineCore, Outbox
from lightvllm.engine.core_messages import (
    MAX_FRAME_BYTES,
    Command,
    Ended,
    Event,
    Failure,
    Start,
    Stop,
    decode_command,
    encode,
)
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import LightvllmError
from lightvllm.transfer.frames import DATA, FrameSocket

_START_SECONDS = 60.0  # for the parent to say what to start
_ORPHAN_SECONDS = 1.0  # from the parent's end to this process's
_LAST_WORDS_SECONDS = 5.0  # for the parent to take what is still to be said
_EXIT_SECONDS = 2.0  # for what has been registered to be done at the exit


class Link:
    """The connection, after ``Start`` has come. ``emit`` is for any thread; commands are handed on by its own.

    The loop's thread writes what the socket takes at once. The rest waits in an ``Outbox``, merged, until the socket
    takes more.

    Args:
        on_command: given each command.
        on_gone: called when the parent has gone.
    """

    def __init__(self, frames: FrameSocket, on_command: Callable[[Command], None], on_gone: Callable[[], None]) -> None:
        self._frames = frames
        self._on_command = on_command
        self._on_gone = on_gone
        self._outbox = Outbox()
        self._sending = threading.Lock()
        self._blocked = False  # the socket takes no more for now
        self._clear = threading.Event()  # all that was emitted has been written
        self._wake_read, self._wake_write = os.pipe()

    def start(self) -> None:
        threading.Thread(target=self._run, name="lightvllm-parent", daemon=True).start()

    def emit(self, event: Event) -> None:
        self._outbox.put(event)
        with contextlib.suppress(ConnectionError):  # the other thread notices it as well
            self._write()

    def flush(self, timeout: float) -> None:
        """Wait until all that this thread has emitted has been written."""
        self._clear.wait(timeout)

    def _write(self) -> None:
        with self._sending:
            while self._frames.flush():
                events = self._outbox.take()
                if not events:
                    self._blocked = False
                    self._clear.set()
                    return
                for event in events:
                    self._frames.send(DATA, 0, b"", encode(event))
            self._clear.clear()
            if not self._blocked:
                self._blocked = True
                os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        while True:
            try:
                # Before the first wait: what came together with Start has been taken from the socket already.
                received = self._frames.receive()
                while received:
                    self._on_command(decode_command(received.popleft()[3]))
                if self._blocked:
                    self._write()
            except ConnectionError:
                self._on_gone()
                return
            poll.register(self._frames, select.POLLIN | (select.POLLOUT if self._blocked else 0))
            ready = dict(poll.poll())
            if self._wake_read in ready:
                os.read(self._wake_read, 1)


def main(fd: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which also drops one that has come while it was blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # nothing that is started here shall inherit that
    faulthandler.enable()
    logs.inherit(process="engine")
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    frames = FrameSocket(connection, MAX_FRAME_BYTES, spin=0)
    try:
        start = decode_command(frames.read(_START_SECONDS)[3])
    except (ConnectionError, TimeoutError):  # the parent has gone already
        os._exit(0)
    assert isinstance(start, Start)
    sys.path.extend(entry for entry in start.sys_path if entry not in sys.path)
    _run(start, frames)
    sys.stdout.flush()
    sys.stderr.flush()
    limit = threading.Timer(_EXIT_SECONDS, os._exit, [0])
    limit.daemon = True
    limit.start()
    atexit._run_exitfuncs()  # tearing the interpreter down takes torch seconds
    os._exit(0)


def _run(start: Start, frames: FrameSocket) -> None:
    ended = threading.Event()
    breakable = True  # by an exception, once: what then tidies up, and what has failed to start, ends by itself

    def end() -> None:
        core.post(Stop())
        if not core.started:  # nothing else can break a start off
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def on_command(command: Command) -> None:
        end() if isinstance(command, Stop) else core.post(command)

    def on_gone() -> None:
        end()
        if not ended.wait(_ORPHAN_SECONDS):
            os._exit(1)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        nonlocal breakable
        core.post(Stop())
        if breakable and not core.started:
            breakable = False
            raise KeyboardInterrupt

    link = Link(frames, on_command, on_gone)
    try:
        tokenizer = None if start.skip_tokenizer_init else Tokenizer.from_dir(start.path)
        factory = load_worker_class(start.executor_factory)
        core = EngineCore(start.engine, tokenizer, functools.partial(factory, start.executor, start.engine), link.emit)
        signal.signal(signal.SIGTERM, on_sigterm)
        link.start()
        try:
            core.run()
        finally:
            breakable = False
    except (LightvllmError, KeyboardInterrupt) as error:
        link.emit(Ended(Failure.of(error)))
    link.flush(_LAST_WORDS_SECONDS)
    ended.set()


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""The engine's loop in a thread of this process: ``ThreadCore``, and ``CoreHandle``, which is all that a front knows.

The other handle is ``ProcessCore`` (``core_process.py``). Both belong to one event loop, in which ``deliver`` is called
with the events that have come since the last time: one wake-up per step, however many requests it had.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol

from lightvllm.config import EngineConfig
from lightvllm.engine.core import EngineCore, MakeExecutor, Outbox
from lightvllm.engine.core_messages import Command, Event, Stop
from lightvllm.engine.tokenizer import Tokenizer

Deliver = Callable[[list[Event]], None]

FORCED_SECONDS = 5.0
"""For a loop to end whose workers have been ended by force, or whose process has been killed."""


class CoreHandle(Protocol):
    """A running loop. ``send`` and ``close`` are for the event loop's thread."""

    def send(self, command: Command) -> None:
        """Have the loop do something; nothing happens if it has ended."""

    async def close(self, timeout: float) -> None:
        """End it, by force if that takes more than ``timeout`` seconds, and return when nothing of it is left.

        Idempotent. Of what comes, ``deliver`` is still told.
        """

    def abandon(self) -> None:
        """``close`` for when there is no event loop any more: at the interpreter's exit, or from the collector."""


class ThreadCore:
    """Starts at once. ``deliver`` is called in the running event loop."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        make_executor: MakeExecutor,
        deliver: Deliver,
        shutdown_timeout: float,
    ) -> None:
        self._deliver = deliver
        self._shutdown_timeout = shutdown_timeout
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._told = False  # the event loop is about to take what is in the outbox
        self._ended = asyncio.Event()
        self._core = EngineCore(config, tokenizer, make_executor, self._emit)
        self._thread = threading.Thread(target=self._run, name="lightvllm-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        self._core.post(command)

    async def close(self, timeout: float) -> None:
        self._core.post(Stop())
        for limit in (timeout, FORCED_SECONDS):
            try:
                await asyncio.wait_for(self._ended.wait(), limit)
                break
            except TimeoutError:
                await asyncio.to_thread(self._core.force)
        self._take()
        self._thread.join(0 if not self._ended.is_set() else FORCED_SECONDS)  # it has said that it is about to return

    def abandon(self) -> None:
        self._core.post(Stop())
        if threading.current_thread() is self._thread:  # the collector may run anywhere
            return
        self._thread.join(self._shutdown_timeout)
        if self._thread.is_alive():
            self._core.force()
            self._thread.join(FORCED_SECONDS)

    def _run(self) -> None:
        self._core.run()
        self._in_loop(self._ended.set)

    def _emit(self, event: Event) -> None:
        self._outbox.put(event)
        if not self._told:  # it may have just been reset, in which case _take has not looked yet: no event is missed
            self._told = True
            self._in_loop(self._take)

    def _in_loop(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the event loop is closed: nobody will ever take anything
            self._core.post(Stop())

    def _take(self) -> None:
        self._told = False
        if events := self._outbox.take():
            self._deliver(events)

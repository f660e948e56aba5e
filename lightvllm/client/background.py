"""An event loop in a thread of its own: what the client does is written once, as coroutines, and asked for from
synchronous code and from any other loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, TypeVar

from lightvllm.errors import Shutdown

T = TypeVar("T")

Produce = Callable[[Callable[[T], None]], Coroutine[Any, Any, None]]
"""A coroutine function that hands its results, one by one, to the function that it is given."""

_CLOSE_SECONDS = 5.0
_CLOSED = "the client has been closed; make a new one"


class Background:
    """The loop. Its thread starts with the first call, and is a daemon: it holds up no interpreter's exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()  # the collector may come in while it is held
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._closed:
                coroutine.close()
                raise Shutdown(_CLOSED)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. What interrupts the waiting (Ctrl-C) cancels it."""
        future = self._start(coroutine)
        try:
            return future.result()
        except CancelledError:
            raise Shutdown(_CLOSED) from None
        finally:
            future.cancel()

    async def acall(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The same, awaited in any loop. Cancelling it cancels the coroutine."""
        future = self._start(coroutine)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closed and (task := asyncio.current_task()) is not None and not task.cancelling():
                raise Shutdown(_CLOSED) from None
            raise

    def iterate(self, produce: Produce[T]) -> Generator[T, None, None]:
        """What ``produce`` hands over, until it ends or raises. Closing the generator cancels it."""
        feed = _Feed(produce)
        try:
            while not isinstance(item := self.call(feed.next()), _End):
                yield item
        finally:
            self._cancel(feed)

    async def aiterate(self, produce: Produce[T]) -> AsyncGenerator[T, None]:
        """The same in any loop."""
        feed = _Feed(produce)
        try:
            while not isinstance(item := await self.acall(feed.next()), _End):
                yield item
        finally:
            self._cancel(feed)

    def _cancel(self, feed: _Feed[T]) -> None:
        """Does not wait: the collector may run it in any thread, the loop's own among them."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(feed.cancel)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what runs, run ``last`` and end the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_wind_up(last), loop).add_done_callback(
                lambda _: loop.call_soon_threadsafe(loop.stop)
            )
            if thread is not threading.current_thread():  # a finalizer may run anywhere
                thread.join(_CLOSE_SECONDS)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _wind_up(last: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    if last is not None:
        await last()


class _End:
    """Follows the last item."""


class _Feed(Generic[T]):
    """A task of the loop, and what it has handed over and nobody has taken. All methods run in the loop.

    It is not held up by a slow taker, so that the time that it is allowed is the server's alone.
    """

    def __init__(self, produce: Produce[T]) -> None:
        self._produce = produce
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def next(self) -> T | _End:
        if self._task is None:
            self._task = asyncio.create_task(self._produce(self._items.put_nowait))
            self._task.add_done_callback(self._ended)
        item = await self._items.get()
        if isinstance(item, _End):
            await self._task  # raises what it has raised
        return item

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # seen, also where nobody asks for more
        self._items.put_nowait(_End())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

"""``run``: from a bound socket to nothing left; serves from the first moment, and ends in order.

Listening comes first, so that probes and the status page see the model being loaded. A first signal (SIGINT, SIGTERM)
has readiness say no and new requests refused, while those that run may finish; a second one ends those too; a third
ends the process where it stands. Knows the engine by ``EngineClient``, and the terminal not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from lightvllm.engine.protocol import EngineClient
from lightvllm.errors import LightvllmError
from lightvllm.server.app import attach_engine
from lightvllm.server.lifecycle import Lifecycle
from lightvllm.server.listen import ListenSettings, closing, guarded_protocol

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
StartEngine = Callable[[Progress], Awaitable[EngineClient]]

END_TIMEOUT = 30.0
"""Seconds that the engine's and the workers' end may take, and that of a start that is called off."""

CONNECTIONS_TIMEOUT = 2
"""Seconds that connections may take to end once nothing is left to be answered."""


def run(
    app: FastAPI,
    listener: socket.socket,
    listen: ListenSettings,
    start_engine: StartEngine,
    *,
    tls: ssl.SSLContext | None = None,
    shutdown_timeout: float = 30.0,
    exit_on_engine_failure: bool = False,
    on_progress: Progress = lambda what: None,
    on_ready: Callable[[EngineClient], None] = lambda engine: None,
    on_stop: Progress = lambda what: None,
) -> int:
    """Serve ``app`` on ``listener`` until a signal comes, and return its number; the socket is closed then.

    Must be called in the main thread, which gets its signal handlers back.

    Args:
        start_engine: makes the engine, and may be cancelled; told in a few words what it waits for.
        shutdown_timeout: seconds that requests may take to finish after the first signal.
        exit_on_engine_failure: end when the engine fails, instead of answering 503 from then on.
        on_progress: told what start-up is waiting for.
        on_ready: called once, when the first request can be answered.
        on_stop: told what the end is waiting for.

    Raises:
        LightvllmError: the engine could not be started, or it has failed and ``exit_on_engine_failure`` is set.
    """

    async def serve() -> int:
        run = _Run(app, on_stop)
        with run.signals():
            return await run.serve(
                _Server(_config(app, listen, tls)),
                listener,
                functools.partial(start_engine, run.tell(on_progress)),
                on_ready,
                shutdown_timeout=shutdown_timeout,
                exit_on_engine_failure=exit_on_engine_failure,
            )

    with closing(listener), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve())


class _Server(uvicorn.Server):
    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()  # signals are ours


class _Run:
    def __init__(self, app: FastAPI, on_stop: Progress) -> None:
        self._app = app
        self._on_stop = on_stop
        self._lifecycle: Lifecycle = app.state.lifecycle
        self._signals: list[int] = []
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    def tell(self, on_progress: Progress) -> Progress:
        def progress(what: str) -> None:
            self._lifecycle.progress = what
            on_progress(what)

        return progress

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        self._lifecycle.stop()
        self._stop.set()
        if len(self._signals) == 2:
            self._on_stop("ending now; once more ends it by force")
            self._stop_now.set()
        elif len(self._signals) > 2:
            os._exit(128 + number)

    async def serve(
        self,
        server: uvicorn.Server,
        listener: socket.socket,
        start_engine: Callable[[], Awaitable[EngineClient]],
        on_ready: Callable[[EngineClient], None],
        *,
        shutdown_timeout: float,
        exit_on_engine_failure: bool,
    ) -> int:
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="http server")
        starting = asyncio.create_task(_as_coroutine(start_engine), name="engine start")
        engine: EngineClient | None = None
        try:
            await self._first(starting, serving)
            if not self._stop.is_set():
                engine = await starting
                attach_engine(self._app, engine)
                on_ready(engine)
                failed = asyncio.create_task(_failure(engine), name="engine failure")
                try:
                    await self._first(*([failed] if exit_on_engine_failure else []), serving)
                    if not self._stop.is_set():
                        raise LightvllmError(f"the engine has failed: {await failed}")
                finally:
                    failed.cancel()
                await self._drain(shutdown_timeout)
            return self._signals[0]
        finally:
            self._lifecycle.stop()
            try:
                await _end(starting)
            finally:
                # Requests that still run end with an error, which their clients are told.
                server.should_exit = True
                await serving
                if self._app.state.tracer is not None:
                    await asyncio.to_thread(self._app.state.tracer.shutdown)

    async def _first(self, *tasks: asyncio.Task[Any]) -> None:
        """Wait for one of the tasks or a signal; the last task must not end before."""
        stopping = asyncio.create_task(self._stop.wait(), name="signal")
        try:
            await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if tasks[-1].done():
            await tasks[-1]
            raise LightvllmError("the HTTP server has ended by itself; its log says why")

    async def _drain(self, timeout: float) -> None:
        if not self._lifecycle.num_in_flight:
            return
        self._on_stop(f"finishing {self._lifecycle.num_in_flight} requests, for at most {timeout:g} s")
        waits = [asyncio.create_task(self._lifecycle.idle()), asyncio.create_task(self._stop_now.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if left := self._lifecycle.num_in_flight:
            self._on_stop(f"ending {left} requests that are not finished")


async def _as_coroutine(start: Callable[[], Awaitable[EngineClient]]) -> EngineClient:
    return await start()


async def _failure(engine: EngineClient) -> str:
    """Waits until the engine has failed; why it has."""
    changed = asyncio.Event()
    unlisten = engine.on_change(changed.set)
    try:
        while engine.state != "failed":
            await changed.wait()
            changed.clear()
        return engine.failure or "no reason is known"
    finally:
        unlisten()


async def _end(starting: asyncio.Task[EngineClient]) -> None:
    """End the engine, or its start."""
    try:
        async with asyncio.timeout(END_TIMEOUT):
            if not starting.done():
                starting.cancel()
                await asyncio.wait({starting})
            if not starting.cancelled() and starting.exception() is None:
                await starting.result().shutdown()
    except TimeoutError:
        logger.error("the engine has not ended within %g s", END_TIMEOUT)


def _config(app: FastAPI, listen: ListenSettings, tls: ssl.SSLContext | None) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=guarded_protocol(listen),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",  # starting and stopping are told by the caller, in its words
        access_log=False,
        server_header=False,
        backlog=listen.backlog,
        timeout_keep_alive=listen.keep_alive_timeout,
        timeout_graceful_shutdown=CONNECTIONS_TIMEOUT,
        forwarded_allow_ips=listen.forwarded_allow_ips,
    )
    config.load()
    config.ssl = tls
    return config


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError:  # not on every platform
        return None
    return uvloop.new_event_loop

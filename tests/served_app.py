"""An ASGI application on a real socket, in a thread of the test's process, so that the test can reach into it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from waiting import LIMIT, wait_until


class ServedApp:
    """At ``url`` until ``stop``; ``start`` serves again, at the same port."""

    def __init__(self, app: FastAPI, port: int = 0) -> None:
        self.app = app
        self.port = port
        self.start()

    def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, args=(listener,), name="served app", daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started, "the server listens")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner() as runner, listener:
            self._loop = runner.get_loop()
            runner.run(self._server.serve(sockets=[listener]))

    def call(self, function: Callable[[], Any]) -> Any:
        """``function()``, in the server's event loop."""

        async def called() -> Any:
            value = function()
            return await value if asyncio.iscoroutine(value) else value

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(LIMIT)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[ServedApp]:
    server = ServedApp(app)
    try:
        yield server
    finally:
        server.stop()

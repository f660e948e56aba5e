"""A replica for the router's tests, byte by byte, which can misbehave in every way; and a router around such."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
from aiohttp import web
from waiting import LIMIT

from lightvllm.keys import ApiKeys
from lightvllm.router.app import ROUTER, Router, create_app
from lightvllm.router.settings import RouterSettings
from lightvllm.router.sources import Source, StaticList
from lightvllm.router.upstream import Upstream

QUICK = {
    "health_interval": 0.05,
    "healthy_after": 1,
    "max_ejection": 0.05,
    "connect_timeout": 1.0,
    "header_timeout": 10.0,
    "idle_timeout": 10.0,
    "hold_timeout": 20.0,
}
"""Settings with which a test need not wait."""


async def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition()``."""
    deadline = time.monotonic() + LIMIT
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {LIMIT:g} s: {what}"
        await asyncio.sleep(0.005)
    return value


class FakeReplica:
    """Serves ``models`` on loopback.

    Attributes:
        mode: how it answers POST: "stream", "json", "echo", or a way to misbehave (``_answer``).
        health: the status of /health; None never answers.
        seen: (path, headers, body) of every POST.
        open: POSTs that are being answered; ``left``: those whose client went away before.
        sent: bytes of events.
        events: of a stream, or ``answers`` makes them from the body; ``gate`` lets them out one by one if it is set.
    """

    def __init__(self, *models: str, mode: str = "stream", name: str = "") -> None:
        self.models, self.mode, self.name = models or ("m",), mode, name
        self.health: int | None = 200
        self.load: dict[str, Any] | None = None
        self.metrics: str | None = None
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.open = self.left = self.sent = 0
        self.events = [f'data: {{"i": {i}, "from": "{name}"}}\n\n'.encode() for i in range(5)] + [b"data: [DONE]\n\n"]
        self.answers: Callable[[bytes], list[bytes]] | None = None
        self.gate: asyncio.Semaphore | None = None
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> FakeReplica:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """As if it were killed: connections are reset, new ones refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            _reset(writer)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._request(reader, writer):
                    pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head[1:] if line}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if method == "GET":
            return await self._get(path, writer)
        self.seen.append((path, headers, body))
        self.open += 1
        answering = asyncio.create_task(self._answer(writer, headers, body))
        watching = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() or answering.exception() is not None:
                self.left += 1
                return False
            return answering.result()
        finally:
            self.open -= 1
            for task in (answering, watching):
                task.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> bool:
        if path == "/health" and self.health is None:
            await asyncio.Event().wait()
        content: Any = {"data": [{"id": model, "object": "model", "owned_by": self.name} for model in self.models]}
        status = 200
        if path == "/health":
            status, content = self.health or 200, {}
        elif path == "/load":
            status, content = (200, self.load) if self.load is not None else (404, {})
        elif path == "/metrics":
            status, content = (200, self.metrics) if self.metrics is not None else (404, {})
        text = content if isinstance(content, str) else json.dumps(content)
        writer.write(_head(status, f"Content-Length: {len(text)}") + text.encode())
        await writer.drain()
        return True

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict[str, str], body: bytes) -> bool:
        """Whether the connection can be used again."""
        match self.mode:
            case "stream" | "reset_mid" | "close_mid" | "stall_mid" | "tear":
                writer.write(_head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked"))
                for number, event in enumerate(self.events if self.answers is None else self.answers(body)):
                    if self.gate is not None:
                        await self.gate.acquire()
                    if number == 2 and self.mode != "stream":
                        return await self._break(writer, event)
                    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                    await writer.drain()
                    self.sent += len(event)
                writer.write(b"0\r\n\r\n")
            case "json" | "echo":
                text = json.dumps({"from": self.name}).encode() if self.mode == "json" else body
                writer.write(_head(200, "Content-Type: application/json", f"Content-Length: {len(text)}") + text)
            case "disconnect":
                return False
            case "reset":
                _reset(writer)
                return False
            case "silent":
                await asyncio.Event().wait()
            case "headers_only":
                writer.write(_head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked"))
                await writer.drain()
                return False
            case "short":
                writer.write(_head(200, "Content-Type: application/json", "Content-Length: 100") + b'{"cut')
                return False
            case "giant_header":
                writer.write(_head(200, "X-Giant: " + "x" * 100_000, "Content-Length: 0"))
                return False
            case "garbage":
                writer.write(b"\x00\xff this is no HTTP\r\n\r\n")
                return False
            case "429":
                writer.write(_head(429, "Retry-After: 1", "Content-Length: 4") + b"busy")
            case "429 without":
                writer.write(_head(429, "Content-Length: 4") + b"busy")
            case status:
                writer.write(_head(int(status), "Content-Length: 5") + b"error")
        await writer.drain()
        return True

    async def _break(self, writer: asyncio.StreamWriter, event: bytes) -> bool:
        if self.mode == "tear":
            half = event[: len(event) // 2]
            writer.write(b"%x\r\n%b\r\n" % (len(half), half))
            await writer.drain()
        elif self.mode == "stall_mid":
            await asyncio.Event().wait()
        elif self.mode == "reset_mid":
            _reset(writer)
        return False


def _head(status: int, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Running:
    """A router that runs, and a client of it."""

    def __init__(self, router: Router, url: str, client: aiohttp.ClientSession) -> None:
        self.router, self.url, self.client = router, url, client

    async def healthy(self, count: int) -> None:
        await until(lambda: sum(replica.usable for replica in self.router.pool) == count, f"{count} replicas")

    def ask(self, model: str = "m", text: str = "hello", **more: Any) -> Any:
        """The request's context manager."""
        content = {"model": model, "messages": [{"role": "user", "content": text}]}
        return self.client.post(self.url + "/v1/chat/completions", json=content, **more)

    async def metric(self, sample: str) -> float:
        async with self.client.get(self.url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample))


@contextlib.asynccontextmanager
async def replicas(*modes: str, **options: Any) -> AsyncIterator[list[FakeReplica]]:
    """One for each mode, with names "0", "1", …"""
    started = [await FakeReplica(mode=mode, name=str(n), **options).start() for n, mode in enumerate(modes)]
    try:
        yield started
    finally:
        for replica in started:
            await replica.stop()


@contextlib.asynccontextmanager
async def routing(
    backends: list[FakeReplica] | list[Source],
    keys: ApiKeys | None = None,
    backend_key: str | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """A router in front of replicas (which serve "m") or of what sources say."""
    used = RouterSettings(**{**QUICK, **settings})
    sources: list[Any] = list(backends)
    if not sources or isinstance(sources[0], FakeReplica):
        sources = [StaticList([f"m={replica.url}" for replica in sources])]
    app = create_app(used, sources, keys, Upstream(used, backend_key))
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0, lingering_time=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LIMIT)) as client:
            yield Running(app[ROUTER], f"http://127.0.0.1:{runner.addresses[0][1]}", client)
    finally:
        await runner.cleanup()

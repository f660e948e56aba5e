"""What the router costs: requests to a replica directly and through ``lightvllm router``, interleaved in one run.

    python benchmarks/router.py [--rounds 20] [--requests 100] [--streams 32] [--chunks 100] [--json FILE]

The replica is a process that does next to nothing, so that what is left is the way: it answers a request that is no
stream at once, and writes a stream's events a fixed time apart, each with the time at which it was written. Every round
has both ways run, in turns as to which comes first. Figures are medians over the rounds of each round's p50 and p99,
ratios are medians of the rounds' ratios; the router's processor time is that of its process, by the operating system.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

_LIMIT = 120.0  # seconds that any wait may take
_REQUEST = '{"model": "m", "stream": %s, "messages": [{"role": "user", "content": "%s"}]}'


# --------------------------------------------------------------------------------------------------- the replica


async def replica(gap: float, chunks: int) -> None:
    """Serve until killed; prints its port."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    found = head.startswith((b"GET /health", b"GET /v1/models"))
                    _json(writer, b'{"data": [{"id": "m"}]}', 200 if found else 404)
                    continue
                size = int(re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
                body = await reader.readexactly(size)
                if b'"stream": true' in body:
                    await _stream(writer, gap, chunks)
                else:
                    _json(writer, b'{"choices": [{"message": {"content": "%b"}}]}' % (b"x" * 400), 200)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _json(writer: asyncio.StreamWriter, body: bytes, status: int) -> None:
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    writer.write(head + body)


async def _stream(writer: asyncio.StreamWriter, gap: float, chunks: int) -> None:
    writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    due = time.monotonic()
    for _ in range(chunks):
        event = b'data: {"t": %020d, "pad": "%b"}\n\n' % (time.monotonic_ns(), b"x" * 150)
        writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()
        due += gap
        if (left := due - time.monotonic()) > 0:
            await asyncio.sleep(left)
    writer.write(b"0\r\n\r\n")
    await writer.drain()


# ---------------------------------------------------------------------------------------------------- the client


class Client:
    """Keeps connections to one address and speaks just enough HTTP, so that it costs little itself."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, number: int) -> float:
        """Seconds that one request took which is no stream."""
        async with self._connection() as (reader, writer):
            began = time.perf_counter()
            self._send(writer, "false", number)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(int(re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)[1]))  # type: ignore[index]
            return time.perf_counter() - began

    async def stream(self, number: int) -> list[float]:
        """Of each event, the seconds from being written to being read."""
        late: list[float] = []
        async with self._connection() as (reader, writer):
            self._send(writer, "true", number)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            while size := int(await reader.readuntil(b"\r\n"), 16):
                chunk = (await reader.readexactly(size + 2))[:-2]
                now = time.monotonic_ns()
                late += [(now - int(at)) / 1e9 for at in re.findall(rb'"t": (\d+)', chunk)]
            await reader.readexactly(2)
        return late

    @contextlib.asynccontextmanager
    async def _connection(self) -> Any:
        pair = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        yield pair
        self._idle.append(pair)

    def _send(self, writer: asyncio.StreamWriter, stream: str, number: int) -> None:
        body = (_REQUEST % (stream, f"conversation {number}")).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


# ---------------------------------------------------------------------------------------------------- the rounds


@dataclass
class Part:
    """One kind of measurement: each round's figures, in seconds, by way."""

    title: str
    p50: dict[str, list[float]]
    p99: dict[str, list[float]]
    processor: list[float]  # of the router, per unit

    @classmethod
    def named(cls, title: str) -> Part:
        return cls(title, {"direct": [], "router": []}, {"direct": [], "router": []}, [])

    def add(self, way: str, seconds: list[float]) -> None:
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        self.p50[way].append(cuts[49])
        self.p99[way].append(cuts[98])

    def row(self) -> dict[str, Any]:
        micro = {
            f"{way} {name}": statistics.median(values[way]) * 1e6
            for name, values in (("p50", self.p50), ("p99", self.p99))
            for way in ("direct", "router")
        }
        ratios = {
            f"{name} ratio": statistics.median(r / d for r, d in zip(values["router"], values["direct"], strict=True))
            for name, values in (("p50", self.p50), ("p99", self.p99))
        }
        return {"what": self.title, **micro, **ratios, "router's processor": statistics.median(self.processor) * 1e6}


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stdout is not None
        started.stdout.close()


def port_of(started: subprocess.Popen[str]) -> int:
    assert started.stdout is not None
    line = started.stdout.readline()
    if not (found := re.search(r"(\d+)\s*$", line)):
        raise SystemExit(f"a process did not start: it said {line!r}")
    return int(found[1])


async def measure(
    ports: dict[str, int], router: psutil.Process, rounds: int, requests: int, streams: int
) -> list[Part]:
    clients = {way: Client(port) for way, port in ports.items()}
    alone, together, events = map(
        Part.named,
        ("a request, one at a time", f"a request, {streams} at a time", f"an event, {streams} streams at a time"),
    )

    async def one_by_one(client: Client) -> list[float]:
        return [await client.ask(number) for number in range(requests)]

    async def at_once(client: Client) -> list[float]:
        async def some(first: int) -> list[float]:
            return [await client.ask(first + number) for number in range(max(1, requests // 8))]

        return [s for part in await asyncio.gather(*(some(n * requests) for n in range(streams))) for s in part]

    async def streaming(client: Client) -> list[float]:
        return [s for part in await asyncio.gather(*map(client.stream, range(streams))) for s in part]

    work: list[tuple[Part, Callable[[Client], Awaitable[list[float]]]]] = [
        (alone, one_by_one),
        (together, at_once),
        (events, streaming),
    ]
    await wait_ready(clients["router"])
    for number in range(-1, rounds):  # the first is for warming up
        for part, run in work:
            for way in ("direct", "router") if number % 2 else ("router", "direct"):
                before = sum(router.cpu_times()[:2])
                seconds = await asyncio.wait_for(run(clients[way]), _LIMIT)
                if number >= 0:
                    part.add(way, seconds)
                    if way == "router":
                        part.processor.append((sum(router.cpu_times()[:2]) - before) / len(seconds))
    for client in clients.values():
        await client.close()
    return [part for part, _ in work]


async def wait_ready(client: Client) -> None:
    """Until the router has found its replica well: it holds the request for so long."""
    await asyncio.wait_for(client.ask(0), _LIMIT)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every figure is a median over them.")] = 20,
    requests: Annotated[int, typer.Option(min=8, help="Requests of one burst.")] = 100,
    streams: Annotated[int, typer.Option(min=1, help="Clients at a time.")] = 32,
    chunks: Annotated[int, typer.Option(min=1, help="Events of a stream.")] = 100,
    gap: Annotated[float, typer.Option(min=0, help="Seconds between two events of a stream.")] = 0.02,
    router_option: Annotated[
        list[str] | None, typer.Option(help="Given to the router, such as --router-option=--affinity-bytes=0.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
    child: Annotated[bool, typer.Option("--replica", hidden=True)] = False,
) -> None:
    """Compare direct requests with those through the router."""
    if child:
        asyncio.run(replica(gap, chunks))
        return
    own = (sys.executable, __file__, "--replica", "--chunks", str(chunks), "--gap", str(gap))
    with process(*own) as upstream:
        direct = port_of(upstream)
        command = [sys.executable, "-c", "from lightvllm.cli.main import run; run()", "router", "--port", "0"]
        command += ["--backend", f"m=http://127.0.0.1:{direct}", "--log-level", "warning", *(router_option or ())]
        with process(*command) as routed:
            ports = {"direct": direct, "router": port_of(routed)}
            parts = asyncio.run(measure(ports, psutil.Process(routed.pid), rounds, requests, streams))
    rows = [part.row() for part in parts]
    table = Table(title="microseconds; ratios: through the router to direct")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if "ratio" in k else f"{v:.0f}" if k != "what" else v for k, v in row.items()))
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)

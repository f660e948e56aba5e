"""Contenders of ``carriers.py`` over gRPC: the stream ``Session`` as both ends use it, each with one thing exchanged.

Calls and replies are encoded by ``wire.py``. What ``open_contender`` is told names the one thing that is otherwise; the
workers are bare, as in ``rpc_frames.py``.

As a script it is one worker: ``rpc_streams.py SPEC``. It listens on a Unix socket in a folder that only its owner can
enter, prints the address, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
from rpc_frames import LIMIT, WORKER_SECONDS, Gathering, checked, size_reply

from lightvllm.backends.k8s import wire
from lightvllm.messages import Buffer
from lightvllm.proto import worker_pb2 as pb

SPEC: dict[str, Any] = {
    "server": "handler",  # or generator: it yields the replies; thread: it has the main thread make them; or aio
    "messages": "once",  # bytes, encoded once per call; or each: once per worker; or classes: left to gRPC
    "piece": wire.PIECE_BYTES,
}
"""The chosen way; ``open_contender`` is given what differs from it."""

_PATH = f"/{wire.SERVICE}/Session"
_THREADS = 8  # as the worker server has
_END_SECONDS = 5.0


class _Driver:
    """Calls to all workers, one at a time, sent and read as a session does it."""

    def __init__(self, stack: contextlib.ExitStack, addresses: list[str], messages: str) -> None:
        self._classes = messages == "classes"
        self._gathering = Gathering(len(addresses))
        self._queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in addresses]
        shared = wire.CallEncoder()
        self._encoders = [wire.CallEncoder() if messages == "each" else shared for _ in addresses]
        self._threads = []
        self._closing = False
        channels = [wire.open_channel(address, None, LIMIT) for address in addresses]
        for channel in channels:
            stack.callback(channel.close)
        for channel in channels:
            grpc.channel_ready_future(channel).result(WORKER_SECONDS)
        for rank, channel in enumerate(channels):
            open_session = (
                channel.stream_stream(_PATH, pb.Call.SerializeToString, pb.Reply.FromString)
                if self._classes
                else wire.stub(channel, "Session")
            )
            stream = open_session(iter(self._queues[rank].get, None))
            self._threads.append(threading.Thread(target=self._read, args=(rank, stream), daemon=True))
            self._threads[-1].start()

    def call(self, payload: bytes) -> list[Buffer]:
        number, future = self._gathering.begin()
        if self._classes:
            message = pb.Call(sequence_number=number, method="echo", payload=payload)
            for messages in self._queues:
                messages.put(message)
        else:
            for messages, encoder in zip(self._queues, self._encoders, strict=True):
                for piece in encoder.encode(number, "echo", payload):
                    messages.put(piece)
        concurrent.futures.wait((future,), WORKER_SECONDS)
        return self._gathering.replies(future)

    def _read(self, rank: int, stream: Any) -> None:
        try:
            for number, payload in _plain_replies(stream) if self._classes else wire.whole_replies(stream, LIMIT):
                self._gathering.replied(rank, number, payload)
            reason = "it closed the session"
        except grpc.RpcError:
            reason = f"the stream broke ({stream.details()})"
        except ConnectionError as error:
            reason = str(error)
        if not self._closing:
            self._gathering.broke(rank, reason)

    def close(self) -> None:
        self._closing = True
        for messages in self._queues:
            messages.put(None)
        for thread in self._threads:  # each reads until its worker has ended the stream
            thread.join(_END_SECONDS)


def _plain_replies(replies: Iterable[Any]) -> Iterator[tuple[int, Buffer]]:
    for reply in replies:
        yield reply.sequence_number, reply.payload


@contextlib.contextmanager
def open_contender(given: dict[str, Any]) -> Iterator[Any]:
    """``given``: ``world_size``, ``folder``, which is private, and what differs from ``SPEC``."""
    from rpc_child import Contender

    spec = SPEC | given
    wire.PIECE_BYTES = spec["piece"]
    with contextlib.ExitStack() as stack:
        workers = [_start_worker(stack, spec) for _ in range(spec["world_size"])]
        driver = _Driver(stack, [_address(worker) for worker in workers], spec["messages"])
        stack.callback(driver.close)
        prepare = checked(driver.call, spec["world_size"])
        prepare(b"")
        yield Contender(prepare, [worker.pid for worker in workers])


def _start_worker(stack: contextlib.ExitStack, spec: dict[str, Any]) -> subprocess.Popen[bytes]:
    worker = subprocess.Popen(
        [sys.executable, __file__, json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    stack.callback(_end, worker)
    return worker


def _end(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.close()
    worker.stdout.close()
    try:
        worker.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _address(worker: subprocess.Popen[bytes]) -> str:
    """Of its one line."""
    assert worker.stdout is not None
    ready, _, _ = select.select([worker.stdout], [], [], WORKER_SECONDS)
    line = worker.stdout.readline().decode().strip() if ready else ""
    if not line:
        raise RuntimeError(f"a worker gave no address within {WORKER_SECONDS:.0f} s, or ended")
    return line


# ---------------------------------------------------------------------------------------------- a worker


def _serve(spec: dict[str, Any], address: str) -> None:
    calls: queue.SimpleQueue[tuple[Buffer, Future[bytes]]] = queue.SimpleQueue()

    def in_handler(messages: Iterator[bytes], context: Any, send: Callable[[bytes | None], None]) -> None:
        for number, _, payload in wire.whole_calls(messages, LIMIT):
            for message in wire.encode_reply(number, size_reply(payload)):
                send(message)
        send(None)

    def as_generator(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for number, _, payload in wire.whole_calls(messages, LIMIT):
            yield from wire.encode_reply(number, size_reply(payload))

    def in_another_thread(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for number, _, payload in wire.whole_calls(messages, LIMIT):
            done: Future[bytes] = Future()
            calls.put((payload, done))
            yield from wire.encode_reply(number, done.result())

    def with_classes(messages: Iterator[Any], context: Any) -> Iterator[Any]:
        for call in messages:
            yield pb.Reply(sequence_number=call.sequence_number, payload=size_reply(call.payload))

    if spec["messages"] == "classes":
        handlers = grpc.method_handlers_generic_handler(wire.SERVICE, {"Session": _handler_with_classes(with_classes)})
    else:
        ways = {"handler": wire.with_sender(in_handler), "generator": as_generator, "thread": in_another_thread}
        handlers = wire.handlers({"Session": ways[spec["server"]]})
    server = grpc.server(ThreadPoolExecutor(_THREADS), [handlers], options=wire.server_options(address, LIMIT))
    wire.bind(server, address, None)
    server.start()
    print(address, flush=True)
    while True:
        payload, done = calls.get()
        done.set_result(size_reply(payload))


def _handler_with_classes(behaviour: Callable[..., Any]) -> Any:
    return grpc.stream_stream_rpc_method_handler(behaviour, pb.Call.FromString, pb.Reply.SerializeToString)


async def _serve_aio(address: str) -> None:
    async def in_handler(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for data in messages:
            call = pb.Call.FromString(data)
            if call.total_bytes:
                raise ValueError(f"a payload of {call.total_bytes} bytes came in pieces, expected a whole one")
            for message in wire.encode_reply(call.sequence_number, size_reply(call.payload)):
                yield message

    server = grpc.aio.server(options=wire.server_options(address, LIMIT))
    server.add_generic_rpc_handlers((wire.handlers({"Session": in_handler}),))
    wire.bind(server, address, None)
    await server.start()
    print(address, flush=True)
    await server.wait_for_termination()


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _work(spec: dict[str, Any]) -> None:
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    address = f"unix:{os.path.join(spec['folder'], f'stream-{os.getpid()}')}"
    if spec["server"] == "aio":
        asyncio.run(_serve_aio(address))
    else:
        _serve(spec, address)


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))

"""Floors for ``rpc.py``: blocking sockets (Unix, TCP, TCP with mutual TLS) and gRPC unary calls, nothing on top.

A message over a socket is ``HEADER`` bytes and the payload, a reply ``HEADER`` bytes; both ends know the lengths. No
serialisation, no threads, no time-outs. gRPC's messages are bytes as well, over Unix sockets.

As a script it is one worker: ``rpc_floor.py CARRIER FOLDER``, which prints its address and ends with its standard
input. A connection is served once it has shown the token in FOLDER.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

HEADER = 16
_TOKEN = 32
_METHOD = "/lightvllm.benchmarks.Floor/Echo"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_START_SECONDS = 60.0


@contextlib.contextmanager
def open_contender(spec: dict[str, Any]) -> Iterator[Any]:
    """``carrier``: unix, tcp, tls or grpc; ``folder``: private, with ``token`` and, for tls, the certificates."""
    from rpc_child import Contender

    carrier, folder = spec["carrier"], Path(spec["folder"])
    with contextlib.ExitStack() as stack:
        workers = [_start_worker(stack, carrier, folder) for _ in range(spec["world_size"])]
        addresses = [_address(worker) for worker in workers]
        pids = [worker.pid for worker in workers]
        if carrier == "grpc":
            yield Contender(_unary_calls(stack, addresses), pids)
        else:
            with _Sockets(carrier, folder, addresses) as sockets:
                yield Contender(sockets.prepare, pids)


def _start_worker(stack: contextlib.ExitStack, carrier: str, folder: Path) -> subprocess.Popen[bytes]:
    worker = subprocess.Popen(
        [sys.executable, __file__, carrier, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    stack.callback(_end, worker)
    return worker


def _end(worker: subprocess.Popen[bytes]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.close()
    worker.stdout.close()
    try:
        worker.wait(5)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _address(worker: subprocess.Popen[bytes]) -> str:
    import select

    assert worker.stdout is not None
    ready, _, _ = select.select([worker.stdout], [], [], _START_SECONDS)
    line = worker.stdout.readline().decode().strip() if ready else ""
    if not line:
        raise RuntimeError(f"a worker gave no address within {_START_SECONDS:.0f} s, or ended")
    return line


# ---------------------------------------------------------------------------------------------- sockets


class _Sockets:
    """Connections to all workers, made anew for each length of message."""

    def __init__(self, carrier: str, folder: Path, addresses: list[str]) -> None:
        self._carrier, self._folder, self._addresses = carrier, folder, addresses
        self._connections: list[socket.socket] = []

    def __enter__(self) -> _Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()

    def prepare(self, payload: bytes) -> Any:
        self.__exit__()
        message = bytes(HEADER) + payload
        self._connections = [self._connect(address, len(message)) for address in self._addresses]
        sends = [connection.sendall for connection in self._connections]
        receives = [connection.recv_into for connection in self._connections]
        reply = bytearray(HEADER)
        view = memoryview(reply)
        replies = [None] * len(sends)

        def call() -> list[None]:
            for send in sends:
                send(message)
            for receive in receives:
                got = receive(reply)
                while got < HEADER:
                    more = receive(view[got:])
                    if not more:
                        raise ConnectionError("a worker closed its connection")
                    got += more
            return replies

        return call

    def _connect(self, address: str, length: int) -> socket.socket:
        connection: socket.socket
        if self._carrier == "unix":
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(address)
        else:
            host, _, port = address.rpartition(":")
            connection = socket.create_connection((host, int(port)), _START_SECONDS)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._carrier == "tls":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(self._folder / "ca.pem")
            context.load_cert_chain(self._folder / "driver-cert.pem", self._folder / "driver-key.pem")
            connection = context.wrap_socket(connection, server_hostname=address.rpartition(":")[0])
        connection.sendall(_token(self._folder) + length.to_bytes(8, "big"))
        return connection


def _token(folder: Path) -> bytes:
    return (folder / "token").read_bytes()[:_TOKEN]


def _serve_sockets(carrier: str, folder: Path) -> None:
    """One connection after another."""
    if carrier == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / f"floor-{os.getpid()}"))
        address = listener.getsockname()
    else:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*listener.getsockname())
    context = None
    if carrier == "tls":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / "worker-cert.pem", folder / "worker-key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    listener.listen()
    print(address, flush=True)
    token = _token(folder)
    while True:
        connection, _ = listener.accept()
        if carrier != "unix":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            _serve(connection, token)
        connection.close()


def _serve(connection: socket.socket, token: bytes) -> None:
    hello = bytearray(_TOKEN + 8)
    if not _receive(connection, memoryview(hello)) or not hmac.compare_digest(hello[:_TOKEN], token):
        return
    message = memoryview(bytearray(int.from_bytes(hello[_TOKEN:], "big")))
    reply = bytes(HEADER)
    while _receive(connection, message):
        connection.sendall(reply)


def _receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill ``into``; False at the end of the stream."""
    got, length = connection.recv_into(into), len(into)
    while got < length:
        more = connection.recv_into(into[got:])
        if not more:
            return False
        got += more
    return True


# ------------------------------------------------------------------------------------------------ gRPC


def _unary_calls(stack: contextlib.ExitStack, addresses: list[str]) -> Any:
    import grpc

    channels = [stack.enter_context(grpc.insecure_channel(address, _UNLIMITED)) for address in addresses]
    for channel in channels:
        grpc.channel_ready_future(channel).result(_START_SECONDS)
    methods = [channel.unary_unary(_METHOD, None, None) for channel in channels]

    def prepare(payload: bytes) -> Any:
        replies = [None] * len(methods)
        message = bytes(HEADER) + payload

        def call() -> list[None]:
            calls = [method.future(message) for method in methods]
            for future in calls:
                if len(future.result()) != HEADER:
                    raise RuntimeError("a worker's reply has another length")
            return replies

        return call

    return prepare


def _serve_grpc(folder: Path) -> None:
    import grpc

    address = f"unix:{folder / f'floor-{os.getpid()}'}"
    reply = bytes(HEADER)
    handler = grpc.method_handlers_generic_handler(
        _METHOD.split("/")[1], {"Echo": grpc.unary_unary_rpc_method_handler(lambda request, context: reply)}
    )
    server = grpc.server(futures.ThreadPoolExecutor(1), [handler], options=_UNLIMITED)
    server.add_insecure_port(address)  # in a folder that only its owner can enter
    server.start()
    print(address, flush=True)
    server.wait_for_termination()


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    if sys.argv[1] == "grpc":
        _serve_grpc(Path(sys.argv[2]))
    else:
        _serve_sockets(sys.argv[1], Path(sys.argv[2]))

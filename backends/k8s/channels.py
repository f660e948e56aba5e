"""Edges of a compiled graph that were given a transport by name: gRPC streams and shared files, as between the stages
of a pipeline (``lightvllm/transfer``). Each edge, from a node to a worker that uses it, is a channel of its own.

What travels is one block of bytes per result, which costs a copy at both ends; ``edges.py`` is the backend's own way.
The transports are named here and not imported: they need torch, which the driver does not have to have.

Used by ``programs.py``, in a worker.
"""

from __future__ import annotations

import contextlib
import importlib
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightvllm.backends.k8s.edges import OVERHEAD_BYTES, Parts
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout
from lightvllm.messages import Buffer, StageCredentials

TRANSPORTS = ("grpc", "shared")

_ALIGNMENT = 64  # of a tensor's memory in a block
_COUNT = struct.Struct("<Q")


class Channels:
    """One worker's channels of one graph.

    One thread sends, takes and closes.

    Args:
        credentials: the worker's; with a certificate where the workers are on several hosts.
        limit: bytes of the largest result.
        window: executions that may be in flight.
        timeout: seconds to wait for a result.
    """

    def __init__(self, credentials: StageCredentials, limit: int, window: int, timeout: float) -> None:
        self._credentials = credentials
        self._limit, self._window, self._timeout = limit, window, timeout
        self._inlets: dict[int, Any] = {}
        self._outlets: dict[tuple[int, str], Any] = {}

    def listen(self, node: int, transport: str, mine: int, producer: int, host: str) -> str:
        """Be ready for the results of ``node``; the address at which.

        ``mine``, ``producer``: numbers of the two workers in the graph; ``host``: where to listen, with a certificate.
        """
        limit = self._limit + self._limit // 256 + OVERHEAD_BYTES  # the padding of large tensors among it
        inlet: Any
        if transport == "shared":
            shared = importlib.import_module("lightvllm.transfer.shared")
            # The name of its folder is the graph's and this edge's.
            inlet = shared.SharedInlet(shared.default_directory(), f"{self._credentials.group}-{node}", mine, limit)
        else:
            inlet = importlib.import_module("lightvllm.transfer.push").PushInlet(
                host if self._credentials.cert else "127.0.0.1",
                self._credentials,
                _name(node, mine),
                producer,
                self._window,
                limit,
            )
        self._inlets[node] = inlet
        address: str = inlet.address
        return address

    def connect(self, node: int, peer: str, transport: str, theirs: int, address: str, timeout: float) -> None:
        """Reach ``peer``, whose number is ``theirs``, for the results of ``node``."""
        outlet: Any
        if transport == "shared":
            shared = importlib.import_module("lightvllm.transfer.shared")
            try:
                outlet = shared.SharedOutlet(address, self._window)
            except ConfigError:
                raise ConfigError(
                    f"transport 'shared' needs workers on one host; {Path(address).parent} of {peer} is not to be seen "
                    "here: use 'auto' or 'grpc'"
                ) from None
        else:
            outlet = importlib.import_module("lightvllm.transfer.push").PushOutlet(
                address, self._credentials, _name(node, theirs), theirs, self._window, timeout
            )
        self._outlets[node, peer] = outlet

    def send(self, peers: Sequence[str], execution: int, node: int, parts: Parts) -> None:
        """Send a result of ``node`` to ``peers``. Its memory may be changed when this returns."""
        torch = importlib.import_module("torch")
        stage = importlib.import_module("lightvllm.transfer.stage")
        block = torch.frombuffer(_join(parts), dtype=torch.uint8)
        header = stage.Header(0, execution, execution, "uint8", tuple(block.shape))
        for peer in peers:
            # The driver learns of a dead peer by its own session, and a live one by its end of the channel.
            with contextlib.suppress(LightvllmError):
                self._outlets[node, peer].put(header, block, time.monotonic() + self._timeout)

    def take(self, execution: int, node: int, producer: str) -> Parts:
        """The result of ``node``. Raises LightvllmError if the channel is broken, or when the time is up."""
        deadline = time.monotonic() + self._timeout
        tensors = importlib.import_module("lightvllm.transfer.tensors")
        while True:
            try:
                batch = self._inlets[node].take(deadline)
            except LightvllmError as error:
                raise LightvllmError(f"the connection to worker {producer} is lost: {error}") from None
            if batch is None:
                raise RpcTimeout(f"worker {producer} has sent no result within {self._timeout:g} s (step_timeout)")
            if batch.header.tag == execution:
                return _split(tensors.buffer_of(batch.tensor))
            if batch.header.tag > execution:
                raise LightvllmError(
                    f"worker {producer} sent a result of execution {batch.header.tag}, expected {execution}"
                )

    def close(self) -> None:
        """Idempotent."""
        for end in (*self._outlets.values(), *self._inlets.values()):
            end.close()
        self._outlets.clear()
        self._inlets.clear()


def _name(node: int, consumer: int) -> str:
    return f"node-{node}-to-{consumer}"


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _join(parts: Parts) -> bytearray:
    """The parts behind their count and sizes, each aligned."""
    head = _COUNT.pack(len(parts)) + struct.pack(f"<{len(parts)}Q", *map(len, parts))
    block = bytearray(_padded(len(head)) + sum(_padded(len(part)) for part in parts))
    at = 0
    for piece in (head, *parts):
        block[at : at + len(piece)] = piece
        at += _padded(len(piece))
    return block


def _split(block: memoryview) -> Parts:
    """What ``_join`` has joined; no copies but of the first part."""
    if len(block) < _COUNT.size or len(block) < _COUNT.size + 8 * _COUNT.unpack_from(block)[0]:
        raise LightvllmError(f"a block of {len(block)} bytes came that holds no result")
    (count,) = _COUNT.unpack_from(block)
    sizes = struct.unpack_from(f"<{count}Q", block, _COUNT.size)
    at = _padded(_COUNT.size + 8 * count)
    if not count or at + sum(map(_padded, sizes)) != len(block):
        raise LightvllmError(f"a block of {len(block)} bytes came for a result of {sum(sizes)}")
    parts: list[Buffer] = []
    for size in sizes:
        parts.append(block[at : at + size])
        at += _padded(size)
    return [bytes(parts[0]), *parts[1:]]

"""``pp_transport="torch"``: batches between two ranks of a torch.distributed process group.

A batch is a header of fixed size over gloo, and the tensor's bytes over gloo (CPUs) or NCCL (GPUs). A small tensor on a
CPU comes inside the header, which spares it gloo's second meeting of sender and receiver. A thread waits for the next
header; gloo waits as long as it is told to, so that an idle worker neither times out nor looks. NCCL is asked
for a tensor only when its header has come: its receives occupy the GPU and are timed by its watchdog from the moment
they are posted. Headers come first, because NCCL's first call waits until the other side makes its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from lightvllm.errors import LightvllmError
from lightvllm.transfer import tensors
from lightvllm.transfer.stage import Batch, Header, Mailbox

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_MAGIC = 0x4C56_5050_0001  # "LVPP", version 1
_CLOSING = -2  # in place of the number of dimensions: the sender has closed
_FAILED = -1  # the step has failed at the sender
_HEADER_NUMBERS = 6 + tensors.MAX_DIMENSIONS
_HEADER_BYTES = 128  # what the numbers take, and room for the alignment of what follows
_INLINE_BYTES = 16 * 2**10  # of the largest tensor that comes inside the header
_HEADER_TAG, _BODY_TAG, _BREAK_TAG = 1, 2, 3
_FOREVER = timedelta(days=10_000)
_JOIN_SECONDS = 5.0


class PointToPoint(Protocol):
    """What gloo's and NCCL's groups have in common."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> dist.Work: ...
    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> dist.Work: ...


def _numbers(header: Header, dimensions: int) -> torch.Tensor:
    import torch

    dtype = tensors.DTYPES.index(header.dtype) if header.dtype else 0
    shape = [*header.shape, *[0] * (tensors.MAX_DIMENSIONS - len(header.shape))]
    return torch.tensor([_MAGIC, header.epoch, header.sequence, header.tag, dtype, dimensions, *shape])


def _message(inline: bool) -> torch.Tensor:
    """Of the one size that all headers of a channel have."""
    import torch

    return torch.zeros(_HEADER_BYTES + (_INLINE_BYTES if inline else 0), dtype=torch.uint8)


def _numbers_in(message: torch.Tensor) -> torch.Tensor:
    import torch

    return message[: 8 * _HEADER_NUMBERS].view(torch.int64)


def _header(numbers: list[int]) -> Header | None:
    """None says that the sender has closed."""
    magic, epoch, sequence, tag, dtype, dimensions = numbers[:6]
    if magic != _MAGIC or not (_CLOSING <= dimensions <= tensors.MAX_DIMENSIONS and 0 <= dtype < len(tensors.DTYPES)):
        raise LightvllmError("a malformed header came; do all workers run the same lightvllm?")
    if dimensions == _CLOSING:
        return None
    if dimensions == _FAILED:
        return Header(epoch, sequence, tag)
    return Header(epoch, sequence, tag, tensors.DTYPES[dtype], tuple(numbers[6 : 6 + dimensions]))


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class GroupOutlet:
    """The sending end. ``headers`` is a gloo group, ``bodies`` the same one or an NCCL group; ``peer`` a rank of both.

    A failed or timed-out send breaks a gloo group: the workers must form a new one.
    """

    def __init__(self, headers: PointToPoint, bodies: PointToPoint, peer: int, capacity: int) -> None:
        self._headers, self._bodies, self._peer, self._capacity = headers, bodies, peer, capacity
        self._sending: deque[tuple[list[dist.Work], list[torch.Tensor]]] = deque()  # what is under way stays allocated
        self._broken: str | None = None
        self._closed = False

    def put(self, header: Header, x: torch.Tensor | None, deadline: float) -> bool:
        if self._closed or self._broken is not None:
            raise LightvllmError(self._broken or "this worker has closed its stage transport")
        if len(header.shape) > tensors.MAX_DIMENSIONS:
            raise LightvllmError(f"a tensor of {len(header.shape)} dimensions; expected at most 8")
        try:
            while len(self._sending) >= self._capacity:
                left = max(1, math.ceil(1000 * (deadline - time.monotonic())))
                for work in self._sending[0][0]:
                    work.wait(timedelta(milliseconds=left))
                self._sending.popleft()
            self._send(header, x)
        except RuntimeError as error:  # all that gloo and NCCL raise
            self._broken = _reason(error)
            if time.monotonic() >= deadline:
                return False
            raise LightvllmError(self._broken) from error
        return True

    def _send(self, header: Header, x: torch.Tensor | None) -> None:
        head = _message(self._headers is self._bodies)
        _numbers_in(head).copy_(_numbers(header, _FAILED if x is None else len(header.shape)))
        body = None if x is None or not x.numel() else tensors.flat_bytes(x.contiguous())
        if body is not None and _HEADER_BYTES + body.numel() <= head.numel():
            head[_HEADER_BYTES : _HEADER_BYTES + body.numel()] = body
            body = None
        works, parts = [self._headers.send([head], self._peer, _HEADER_TAG)], [head]
        if body is not None:
            works.append(self._bodies.send([body], self._peer, _BODY_TAG))
            parts.append(body)
        self._sending.append((works, parts))

    def close(self) -> None:
        """Tell the receiver, if it still listens; what it has not taken is forgotten."""
        if self._closed:
            return
        self._closed = True
        if self._broken is None:
            try:
                head = _message(self._headers is self._bodies)
                _numbers_in(head).copy_(_numbers(Header(0, 0, 0), _CLOSING))
                self._sending.append(([self._headers.send([head], self._peer, _HEADER_TAG)], [head]))
            except RuntimeError as error:  # it has gone, and need not be told
                self._broken = _reason(error)


class GroupInlet:
    """The receiving end, with a thread. ``timeout``: seconds in which a tensor must follow its header."""

    def __init__(
        self,
        headers: PointToPoint,
        bodies: PointToPoint,
        peer: int,
        capacity: int,
        limit: int,
        device: torch.device,
        timeout: float,
    ) -> None:
        self._headers, self._peer = headers, peer
        self._mailbox = Mailbox(capacity)
        self._closing = threading.Lock()
        self._thread = threading.Thread(
            target=_receive,
            args=(headers, bodies, peer, self._mailbox, limit, device, timedelta(seconds=timeout)),
            name="lightvllm-stage-receiver",
            daemon=True,
        )
        self._thread.start()

    def take(self, deadline: float) -> Batch | None:
        return self._mailbox.take(deadline)

    def close(self) -> None:
        """Ends the thread, for which it breaks the gloo group: its only way to end a wait."""
        import torch

        with self._closing:
            self._mailbox.close()
            if self._thread.is_alive():
                try:
                    work = self._headers.recv([torch.zeros(1)], self._peer, _BREAK_TAG)
                    work.wait(timedelta(milliseconds=1))
                except RuntimeError:  # the time-out that was asked for, or the group has been broken before
                    pass
            self._thread.join(_JOIN_SECONDS)


def _receive(
    headers: PointToPoint,
    bodies: PointToPoint,
    peer: int,
    mailbox: Mailbox,
    limit: int,
    device: torch.device,
    timeout: timedelta,
) -> None:
    """Fill ``mailbox`` until either side closes."""
    import torch

    try:
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        while True:
            head = _message(headers is bodies)
            headers.recv([head], peer, _HEADER_TAG).wait(_FOREVER)
            header = _header(_numbers_in(head).tolist())
            if header is None:
                return mailbox.end("it has closed its stage transport")
            batch = Batch(header, None)
            if header.dtype:
                size = tensors.check_size(header.shape, header.dtype, limit)
                if _HEADER_BYTES + size <= head.numel():
                    flat = head[_HEADER_BYTES : _HEADER_BYTES + size].view(tensors.torch_dtype(header.dtype))
                    batch = Batch(header, flat.view(header.shape))
                else:
                    with torch.cuda.stream(stream):
                        batch = _body(header, bodies, peer, device, timeout)
            if not mailbox.put(batch):
                return None
    except RuntimeError as error:  # all that gloo and NCCL raise; a peer that died shows here
        return mailbox.end(_reason(error))
    except LightvllmError as error:
        return mailbox.end(str(error))


def _body(header: Header, bodies: PointToPoint, peer: int, device: torch.device, timeout: timedelta) -> Batch:
    import torch

    x = torch.empty(header.shape, dtype=tensors.torch_dtype(header.dtype), device=device)
    if x.numel():
        bodies.recv([tensors.flat_bytes(x)], peer, _BODY_TAG).wait(timeout)
    if device.type != "cuda":
        return Batch(header, x)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return Batch(header, x, ready)

"""Hidden states from a pipeline stage to the next: what every transport has in common, and the choice of one.

A worker's ``StageTransport`` has an inlet, if there is a stage before its own, and an outlet, if there is one behind.
Batches go through a channel in order, each with a ``Header``. What a batch is for is checked when it is taken: a tensor
of another step, shape or dtype is an error and never a step's input. A channel's *epoch* is the number of ``reset``
calls on either end (each rank of a group makes the same ones); what an earlier epoch has left in the channel is
dropped.

A transport moves batches and knows none of these rules:

* ``group.py``  torch.distributed: gloo on CPUs; on GPUs NCCL, with gloo for the headers
* ``push.py``   gRPC, ``LLMWorker.PushTensors``
* ``shared.py`` files in a directory that both hosts see

None of them knows which backend has started the workers. Any module below ``lightvllm.worker`` may be imported here,
none that imports torch at its top; the drivers' side may import ``credentials.py`` only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.messages import StageCredentials, WorkerInit
from lightvllm.transfer import tensors

if TYPE_CHECKING:
    import torch

    from lightvllm.transfer.group import PointToPoint

CONNECT_TIMEOUT = 60.0
"""Seconds to wait for the next stage's listener."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    """What a batch is.

    Attributes:
        epoch: resets of the sender before it.
        sequence: 1, 2, 3, … within a channel.
        tag: the step's number.
        dtype: one of ``tensors.DTYPES``; ``""`` if the step has failed at the sender and there is no tensor.
        shape: of the tensor.
    """

    epoch: int
    sequence: int
    tag: int
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Batch(NamedTuple):
    """A header and its tensor: in host memory, or on the device, where it is complete after ``ready``."""

    header: Header
    tensor: torch.Tensor | None
    ready: torch.cuda.Event | None = None


class Inlet(Protocol):
    """The receiving end of a channel."""

    def take(self, deadline: float) -> Batch | None:
        """The next batch, or None at ``deadline`` (of ``time.monotonic``). LightvllmError if none can come any more."""

    def close(self) -> None:
        """Ends its thread, listener and files. Idempotent."""


class Outlet(Protocol):
    """The sending end of a channel."""

    def put(self, header: Header, x: torch.Tensor | None, deadline: float) -> bool:
        """Take over a batch, or return False at ``deadline``. It waits only while the receiver is as many batches
        behind as the channel holds. LightvllmError if none can be sent any more."""

    def close(self) -> None:
        """Ends its thread, connection and files. Idempotent."""


class Mailbox:
    """A bounded queue between the thread that receives and the one that computes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._batches: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._end: str | None = None
        self._closed = False

    def put(self, batch: Batch) -> bool:
        """Waits while the mailbox is full; False if it has been closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._batches) < self._capacity)
            if not self._closed:
                self._batches.append(batch)
                self._changed.notify_all()
            return not self._closed

    def take(self, deadline: float) -> Batch | None:
        """See ``Inlet.take``."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._batches or self._end is not None or self._closed, max(0.0, deadline - time.monotonic())
            )
            if self._batches and not self._closed:
                self._changed.notify_all()
                return self._batches.popleft()
            if self._end is not None or self._closed:
                raise LightvllmError(self._end or "this worker has closed its stage transport")
            return None

    def end(self, reason: str) -> None:
        """Nothing more comes: once what has come is taken, ``take`` raises. The first reason stays."""
        with self._changed:
            if self._end is None:
                self._end = reason
            self._changed.notify_all()

    def close(self) -> None:
        """Drop what has come and wake whoever waits."""
        with self._changed:
            self._closed = True
            self._batches.clear()
            self._changed.notify_all()


class StageTransport:
    """One worker's neighbours in the pipeline. One thread uses it, but ``close`` may be called from any.

    Args:
        name: of the transport, for messages.
        device: where received tensors shall be.
        timeout: seconds that a step waits for its tensors, or for room to send (``collective_timeout``).
        inlet, previous_rank: of the stage before, if there is one.
        outlet, next_rank: of the stage behind, if there is one.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        timeout: float,
        *,
        inlet: Inlet | None = None,
        previous_rank: int | None = None,
        outlet: Outlet | None = None,
        next_rank: int | None = None,
    ) -> None:
        self.name = name
        self._device = device
        self._timeout = timeout
        self._inlet, self._previous = inlet, f"the previous stage (rank {previous_rank}, pp_transport={name})"
        self._outlet, self._next = outlet, f"the next stage (rank {next_rank}, pp_transport={name})"
        self._epoch = 0
        self._sent = 0
        self._taken = 0

    def send(self, x: torch.Tensor, tag: int) -> None:
        """Hand ``x`` to the next stage for the step ``tag``; ``x`` must not be changed afterwards.

        Returns before it has arrived, unless the next stage is as many batches behind as there are stages.
        Raises LightvllmError when the next stage has gone, or has taken nothing for ``timeout`` seconds.
        """
        self._put(Header(self._epoch, self._sent + 1, tag, tensors.dtype_name(x.dtype), tuple(x.shape)), x)

    def send_failure(self, tag: int) -> None:
        """Let the next stage know that it waits in vain: its ``receive`` raises. Raises as ``send`` does."""
        self._put(Header(self._epoch, self._sent + 1, tag), None)

    def _put(self, header: Header, x: torch.Tensor | None) -> None:
        if self._outlet is None:
            raise LightvllmError(f"step {header.tag}: there is no next stage to send to")
        try:
            taken = self._outlet.put(header, x, time.monotonic() + self._timeout)
        except LightvllmError as error:
            raise LightvllmError(f"step {header.tag}: sending to {self._next} failed: {error}") from error
        if not taken:
            raise LightvllmError(
                f"step {header.tag}: {self._next} has not taken what was sent before within {self._timeout:g} s "
                "(collective_timeout)"
            )
        self._sent = header.sequence

    def receive(self, shape: Sequence[int], dtype: torch.dtype, tag: int) -> torch.Tensor:
        """The tensor that the previous stage has sent for the step ``tag``, on this worker's device.

        Raises LightvllmError when what comes is for another step or has another shape or dtype, when the step has
        failed there, when the previous stage has gone, or when nothing comes for ``timeout`` seconds.
        """
        if self._inlet is None:
            raise LightvllmError(f"step {tag}: there is no previous stage to receive from")
        deadline = time.monotonic() + self._timeout
        dropped = 0
        while True:
            try:
                batch = self._inlet.take(deadline)
            except LightvllmError as error:
                raise LightvllmError(f"step {tag}: receiving from {self._previous} failed: {error}") from error
            if batch is None:
                stale = f" ({dropped} batches came from before the last reset)" if dropped else ""
                raise LightvllmError(
                    f"step {tag}: no hidden states came from {self._previous} within {self._timeout:g} s "
                    f"(collective_timeout){stale}"
                )
            if batch.header.sequence != self._taken + 1:
                raise LightvllmError(
                    f"step {tag}: batch {batch.header.sequence} came from {self._previous} after batch {self._taken}; "
                    "one was lost or came twice"
                )
            self._taken += 1
            if batch.header.epoch >= self._epoch:
                return self._checked(batch, shape, tensors.dtype_name(dtype), tag)
            dropped += 1

    def _checked(self, batch: Batch, shape: Sequence[int], dtype: str, tag: int) -> torch.Tensor:
        header = batch.header
        if header.epoch > self._epoch:
            raise LightvllmError(
                f"step {tag}: {self._previous} has been reset {header.epoch} times, this worker {self._epoch} times; "
                "reset all ranks alike"
            )
        if header.tag != tag:
            raise LightvllmError(f"step {tag}: {self._previous} sent the hidden states of step {header.tag}")
        if batch.tensor is None:
            raise LightvllmError(f"step {tag}: the step has failed at {self._previous}; its own error says why")
        if (header.dtype, header.shape) != (dtype, tuple(shape)):
            raise LightvllmError(
                f"step {tag}: {self._previous} sent {header.dtype} {list(header.shape)}; expected {dtype} {list(shape)}"
            )
        if batch.ready is None:
            return tensors.to_device(batch.tensor, self._device)
        import torch

        current = torch.cuda.current_stream(self._device)
        current.wait_event(batch.ready)
        batch.tensor.record_stream(current)
        return batch.tensor

    def reset(self) -> None:
        """Let nothing that has been sent so far be taken any more. Every rank of the group must do it, as often."""
        self._epoch += 1

    def close(self) -> None:
        """End threads, listeners, connections and files. Idempotent."""
        if self._outlet is not None:
            self._outlet.close()
        if self._inlet is not None:
            self._inlet.close()


class StageConnector:
    """From a worker's ``WorkerInit`` to its ``StageTransport``; owns what it opens.

    ``open`` on every rank, then the ranks' process groups, then ``connect`` on every rank with what ``open`` returned
    on the rank that it is to send to.
    """

    def __init__(self, init: WorkerInit, device: torch.device) -> None:
        """Raises ConfigError for a transport that cannot be used here; MissingExtra if a package is not installed."""
        layout, model = init.config.parallel, init.config.model
        self._init = init
        self._layout = layout
        self._device = device
        self._stage = init.rank // layout.tensor_parallel_size
        self._local = init.local_world_size == init.world_size
        self._limit = init.config.scheduler.max_num_batched_tokens * model.hidden_size * model.dtype_bytes
        self._inlet: Inlet | None = None
        self._transport: StageTransport | None = None
        if layout.pp_transport == "grpc":
            from lightvllm.transfer import push  # noqa: F401  MissingExtra now, not when the weights are loaded
        if layout.pp_transport == "shared" and layout.pp_shared_dir is None and not self._local:
            raise ConfigError(
                "pp_transport='shared' needs a directory that all hosts share, because the workers are on several; "
                "give --pp-shared-dir"
            )

    @property
    def _is_last(self) -> bool:
        return self._stage == self._layout.pipeline_parallel_size - 1

    @property
    def _credentials(self) -> StageCredentials:
        if self._init.stage_credentials is None:
            raise LightvllmError("the worker has got no stage_credentials; init_worker must bring them")
        return self._init.stage_credentials

    def open(self, host: str) -> str:
        """Be ready for the stage before; the address at which, or ``""`` where none is needed.

        ``host``: this host's address as the others see it; used if they are on other hosts.
        """
        self.close()
        if self._stage == 0 or self._layout.pp_transport == "torch":
            return ""
        rank = self._init.rank
        if self._layout.pp_transport == "shared":
            from lightvllm.transfer.shared import SharedInlet, default_directory

            directory = self._layout.pp_shared_dir
            shared = SharedInlet(
                Path(directory) if directory else default_directory(), self._credentials.group, rank, self._limit
            )
            self._inlet = shared
            return shared.address
        from lightvllm.transfer.push import PushInlet, channel_name

        pushed = PushInlet(
            "127.0.0.1" if self._local else host,
            self._credentials,
            channel_name(rank, self._layout.tensor_parallel_size),
            rank - self._layout.tensor_parallel_size,
            self._layout.pipeline_parallel_size,
            self._limit,
            pinned=self._device.type == "cuda",
        )
        self._inlet = pushed
        return pushed.address

    def connect(self, next_address: str, groups: tuple[PointToPoint, PointToPoint] | None) -> StageTransport:
        """Connect to the stage behind, if there is one. ``groups``: see ``ParallelContext.stage_groups``."""
        layout, rank = self._layout, self._init.rank
        capacity, timeout = layout.pipeline_parallel_size, layout.collective_timeout
        next_rank = None if self._is_last else rank + layout.tensor_parallel_size
        outlet: Outlet | None = None
        if layout.pp_transport == "torch":
            if groups is None:
                raise LightvllmError("there are no process groups for the stages; call init_device first")
            from lightvllm.transfer.group import GroupInlet, GroupOutlet

            if self._stage > 0:
                self._inlet = GroupInlet(*groups, self._stage - 1, capacity, self._limit, self._device, timeout=timeout)
            if next_rank is not None:
                outlet = GroupOutlet(*groups, self._stage + 1, capacity)
        elif next_rank is not None and layout.pp_transport == "shared":
            from lightvllm.transfer.shared import SharedOutlet

            outlet = SharedOutlet(next_address, capacity)
        elif next_rank is not None:
            from lightvllm.transfer.push import PushOutlet, channel_name

            channel = channel_name(next_rank, layout.tensor_parallel_size)
            outlet = PushOutlet(next_address, self._credentials, channel, next_rank, capacity, CONNECT_TIMEOUT)
        self._transport = StageTransport(
            layout.pp_transport,
            self._device,
            timeout,
            inlet=self._inlet,
            previous_rank=rank - layout.tensor_parallel_size if self._stage else None,
            outlet=outlet,
            next_rank=next_rank,
        )
        return self._transport

    def close(self) -> None:
        """Close the transport, or as much of it as there is. Idempotent."""
        if self._transport is not None:
            self._transport.close()
        elif self._inlet is not None:
            self._inlet.close()
        self._transport = self._inlet = None

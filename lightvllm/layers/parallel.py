"""A worker's place in the layout, and the collectives that its layers use.

A ``ParallelContext`` is handed to the layers that need it: it holds its own process groups and touches no global
one, so several may live in one process. Gloo carries tensors on CPUs, NCCL on GPUs. A world of one has no group.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.layers.memory import Memory
from lightvllm.transfer.group import PointToPoint

CONNECT_TIMEOUT = 120.0
"""Seconds to wait for the other workers of a group when it is formed."""
HOST_ENV = "LIGHTVLLM_HOST_IP"
"""Names the address at which other hosts reach this one, where the guess is wrong."""


@contextmanager
def _peers(doing: str) -> Iterator[None]:
    """Turns torch's account of a peer that did not come, or has gone, into ours."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LightvllmError(
            f"{doing} failed, because another worker of the group did not take part: {reason}"
        ) from error


class _Group(PointToPoint, Protocol):
    """What gloo's and NCCL's groups have in common (torch types neither); a call blocks in ``Work.wait``."""

    def allreduce(self, tensors: list[Tensor], /) -> dist.Work: ...
    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions, /) -> dist.Work: ...
    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: dist.GatherOptions, /
    ) -> dist.Work: ...


def host_address() -> str:
    """This host's address as other hosts see it: ``$LIGHTVLLM_HOST_IP``, or the outgoing interface's (loopback if
    there is none)."""
    asked = os.environ.get(HOST_ENV)
    if asked:
        return asked
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737): chooses a route, sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def open_store(host: str, world_size: int) -> tuple[TCPStore, str]:
    """A rendezvous on a free port of ``host``, IPv4 or IPv6, and nowhere else; returns it and its ``"host:port"``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} for the workers' rendezvous ({error}); set {HOST_ENV} to this host's address"
        ) from None
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=CONNECT_TIMEOUT),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, f"{host}:{port}"


def join_store(rendezvous: str, world_size: int) -> TCPStore:
    """Connect to a rendezvous that rank 0 has opened."""
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"rendezvous={rendezvous!r}; expected 'host:port' as open_rendezvous returned it")
    limit = timedelta(seconds=CONNECT_TIMEOUT)
    with _peers(f"the meeting at {rendezvous}"):
        return TCPStore(host, int(port), world_size, is_master=False, timeout=limit, wait_for_workers=False)


class ParallelContext:
    """Rank = pipeline rank × tp_size + tensor rank.

    Collectives block; a peer that does not come within the group's time-out, or whose connection breaks, raises
    LightvllmError with gloo's or NCCL's reason.

    Attributes:
        memory: where the layers of this rank put their weights.
        stage_groups: of the equal tensor ranks of all stages, for headers (gloo) and for tensors (gloo or NCCL); None
            where hidden states go another way.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int = 0,
        tp_size: int = 1,
        pp_size: int = 1,
        tp_group: _Group | None = None,
        stage_groups: tuple[PointToPoint, PointToPoint] | None = None,
    ) -> None:
        self.device = device
        self.memory = Memory(device)
        self.tp_size, self.pp_size = tp_size, pp_size
        self.pp_rank, self.tp_rank = divmod(rank, tp_size)
        self._tp_group = tp_group
        self.stage_groups = stage_groups

    @classmethod
    def connect(
        cls,
        device: torch.device,
        rank: int,
        tp_size: int,
        pp_size: int,
        store: Store,
        timeout: float,
        local: bool,
        stages: bool = True,
    ) -> ParallelContext:
        """Join the groups of ``rank``: its stage's tensor ranks and, if ``stages``, the equal ranks of all stages.

        ``timeout`` in seconds is for each collective; ``local`` says that all workers are on this host.
        """
        context = cls(device, rank, tp_size, pp_size)

        def group(name: str, on: torch.device, group_rank: int, size: int) -> _Group:
            return _process_group(on, PrefixStore(name, store), group_rank, size, timeout, local)

        with _peers("the meeting"):
            if tp_size > 1:
                context._tp_group = group(f"tp{context.pp_rank}", device, context.tp_rank, tp_size)
            if pp_size > 1 and stages:
                name = f"pp{context.tp_rank}"
                headers = group(name, torch.device("cpu"), context.pp_rank, pp_size)
                gpu = device.type == "cuda"
                bodies = group(f"{name}-gpu", device, context.pp_rank, pp_size) if gpu else headers
                context.stage_groups = (headers, bodies)
        return context

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor ranks, in place; returns ``x``."""
        if self._tp_group is not None:
            with _peers("the sum over the tensor ranks"):
                self._tp_group.allreduce([x]).wait()
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Tensor rank 0's ``x`` on every tensor rank, in place; returns ``x``."""
        if self._tp_group is not None:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            with _peers("the sharing of sampled tokens"):
                self._tp_group.broadcast([x], options).wait()
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        """Concatenate x [R, N] of all tensor ranks along the last dimension, on tensor rank 0; None elsewhere."""
        if self._tp_group is None:
            return x
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.tp_size)] if self.tp_rank == 0 else []
        with _peers("the gathering of logits"):
            self._tp_group.gather([parts] if parts else [], [x.contiguous()], options).wait()
        return torch.cat(parts, dim=-1) if parts else None


def _process_group(device: torch.device, store: Store, rank: int, size: int, timeout: float, local: bool) -> _Group:
    limit = timedelta(seconds=timeout)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return cast(_Group, dist.ProcessGroupNCCL(store, rank, size, options))
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return cast(_Group, dist.ProcessGroupGloo(store, rank, size, limit))
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._timeout = limit
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1" if local else host_address())]
    return cast(_Group, dist.ProcessGroupGloo(store, rank, size, gloo))

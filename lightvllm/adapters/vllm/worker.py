"""The worker's side: one rank of vLLM in a worker of ours. Hosted by every backend under the name ``WORKER_CLASS``.

Holds vLLM's own ``WorkerWrapperBase`` and does to it what ``WorkerProc`` of vLLM's multiprocessing executor does
(``vllm/v1/executor/multiproc_executor.py``, version 0.32). Importing this module imports neither vLLM nor torch:
``prepare`` sets the environment first.

The calls come in this order: ``describe``, ``prepare``, ``open_meeting`` (rank 0), ``construct``, ``join_groups``,
``load_weights``, then ``run`` for whatever vLLM calls; ``close`` at the end.
None of them has the name of one of ``messages.TYPED_METHODS``, whose arguments are the lightvllm engine's.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lightvllm.adapters.vllm.versions import Versions, local_versions
from lightvllm.messages import Deferred


class WorkerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What ``construct`` is told.

    Attributes:
        vllm_config: vLLM's ``VllmConfig``.
        rank: among the engine's workers, 0 to tp × pp × pcp - 1.
        local_rank: index of the worker's device among those that it sees.
        init_method: where the ranks meet, as ``torch.distributed.init_process_group`` takes it.
    """

    vllm_config: Any
    rank: int
    local_rank: int
    init_method: str


class VllmWorker:
    """One rank. Its methods run one at a time, in one thread."""

    def __init__(self) -> None:
        self._wrapper: Any = None
        self._rank = -1
        self._store: Any = None
        self._logger = logging.getLogger(__name__)  # vLLM's, as soon as it has been imported
        self._late = threading.local()

    def describe(self) -> Versions:
        """What runs here."""
        return local_versions()

    def prepare(self, env: Mapping[str, str], sharing: int) -> None:
        """Set what depends on where the workers have been placed: visible devices, OpenMP's threads.

        ``sharing``: how many workers divide this host's CPUs among them until they have loaded; 0 where ``env`` says
        all, or each is to do as its own environment says.
        """
        os.environ.update(env)
        if sharing and "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cpus() // sharing))
            os.environ["VLLM_OMP_NUM_THREADS_SET_BY_VLLM"] = "1"  # from then on vLLM's worker makes do with one

    def open_meeting(self, local: bool, world_size: int) -> str:
        """Rank 0: open the place where the ranks meet, on loopback if all of them are on this host; its init method.

        The port is bound here and stays bound, so that nobody can take it before the ranks come: torch finds the store
        that this process has at that port already.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]
        from vllm.utils.network_utils import get_distributed_init_method, get_ip, get_loopback_ip

        from lightvllm.errors import ConfigError

        host = get_loopback_ip() if local else get_ip()
        try:
            self._store = _listening_store(TCPStore, host, world_size)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} for the workers' rendezvous ({error}); set VLLM_HOST_IP on rank 0's host to "
                "an address of it that the others reach"
            ) from None
        return str(get_distributed_init_method(host, self._store.port))

    def construct(self, start: WorkerStart) -> None:
        """Construct vLLM's worker; its configuration has come with ``start``."""
        from vllm.logger import configure_logging, init_logger
        from vllm.platforms.interface import set_assigned_physical_gpu_ids
        from vllm.tracing import maybe_init_worker_tracer
        from vllm.v1.executor.multiproc_executor import WorkerProc
        from vllm.v1.executor.vllm_net_devices import set_worker_net_device
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        config = start.vllm_config
        if logging_config := getattr(config, "logging_config", None):
            configure_logging(logging_config)
        if (gpu_ids := config.parallel_config.assigned_physical_gpu_ids) is not None:
            set_assigned_physical_gpu_ids(gpu_ids)
        set_worker_net_device(start.local_rank, config)
        maybe_init_worker_tracer(
            instrumenting_module_name="vllm.worker", process_kind="worker", process_name=f"Worker_{start.rank}"
        )
        self._rank = start.rank
        self._logger = init_logger(f"vllm.{__name__}")
        wrapper = WorkerWrapperBase(rpc_rank=0, global_rank=start.rank)
        with self._telling("construct"):
            wrapper.init_worker(
                [
                    {
                        "vllm_config": config,
                        "local_rank": start.local_rank,
                        "rank": start.rank,
                        "distributed_init_method": start.init_method,
                        "is_driver_worker": start.rank % config.parallel_config.tensor_parallel_size == 0,
                        "shared_worker_lock": None,
                    }
                ]
            )
        WorkerProc.setup_proc_title_and_log_prefix(enable_ep=config.parallel_config.enable_expert_parallel)
        self._wrapper = wrapper

    def join_groups(self) -> None:
        """Take the device and join the process groups; returns when all ranks have come."""
        from vllm.v1.executor.multiproc_executor import WorkerProc

        with self._telling("join_groups"):
            self._wrapper.init_device()
        config = self._wrapper.vllm_config
        WorkerProc.setup_proc_title_and_log_prefix(enable_ep=config.parallel_config.enable_expert_parallel)

    def load_weights(self) -> None:
        """Load the weights. Called when ``join_groups`` has returned on all ranks."""
        from vllm import envs
        from vllm.platforms import current_platform

        _unlink_cpu_buffers(os.environ.get("VLLM_DIST_IDENT"))
        _unlink_broadcast_rings()
        with self._telling("load_weights"):
            if envs.VLLM_ELASTIC_EP_SCALE_UP_LAUNCH:
                self._wrapper.elastic_ep_execute("load_model")
            else:
                self._wrapper.load_model()
        current_platform.update_block_size_for_backend(self._wrapper.vllm_config)
        envs.enable_envs_cache()

    def run(
        self,
        method: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reply_rank: int | None,
    ) -> Any:
        """Call a method of vLLM's worker, or a callable with it as the first argument.

        With ``reply_rank``, the other ranks answer None, whatever came out; their exceptions are told all the same.
        """
        from vllm.v1.outputs import AsyncModelRunnerOutput

        with self._telling(method):
            function = (
                getattr(self._wrapper, method) if isinstance(method, str) else functools.partial(method, self._wrapper)
            )
            output = function(*args, **kwargs)
        if reply_rank is not None and reply_rank != self._rank:
            return None
        if isinstance(output, AsyncModelRunnerOutput):
            return Deferred(functools.partial(self._finish, output))
        return output

    def run_pickled(self, call: bytes, reply_rank: int | None) -> Any:
        """``run`` of what ``pickle`` made of ``(method, args, kwargs)``."""
        method, args, kwargs = pickle.loads(call)  # noqa: S301  this connection has proved who it is
        return self.run(method, args, kwargs, reply_rank)

    @contextlib.contextmanager
    def _telling(self, what: str | Callable[..., Any]) -> Iterator[None]:
        """Log what is raised with its traceback, as vLLM's own workers do: the driver is told one line of it."""
        try:
            yield
        except Exception:
            name = what if isinstance(what, str) else getattr(what, "__name__", type(what).__name__)
            self._logger.exception("rank %d failed in %s", self._rank, name)
            raise

    def _finish(self, output: Any) -> Any:
        """What an ``AsyncModelRunnerOutput`` comes to. In a thread of its own, which must be told the device: without
        that, CUDA calls would make a context on device 0."""
        from vllm.platforms import current_platform

        if not getattr(self._late, "has_device", False):
            device = getattr(self._wrapper.worker, "device", None)
            if device is not None:
                current_platform.set_device(device)
            self._late.has_device = True
        with self._telling(type(output).__name__):
            return output.get_output()

    def close(self) -> None:
        """Give back the device, the process groups and their shared memory."""
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        wrapper, self._wrapper = self._wrapper, None
        if wrapper is None:
            return
        with contextlib.ExitStack() as stack:
            stack.callback(destroy_distributed_environment)
            stack.callback(destroy_model_parallel)
            wrapper.shutdown()


def usable_cpus(cgroup: str = "/sys/fs/cgroup") -> int:
    """CPUs that this process may run on, within its container's quota, which torch does not know of."""
    cpus = len(os.sched_getaffinity(0))
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # of version 2, and of version 1
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (int(n) for name in files for n in Path(cgroup, name).read_text().split())
            if quota > 0:
                cpus = min(cpus, max(1, quota // period))
    return cpus


def _unlink_cpu_buffers(ident: str | None) -> None:
    """Take the names from the memory that the ranks of this host share on CPUs, 4 MiB for each rank and group.

    vLLM 0.32 leaves those files behind, even after an orderly end. By now all ranks have opened them; without names,
    the memory is free when the last rank has gone, however it went. Without ``ident`` there are none.
    """
    if ident:
        for path in glob.glob(f"/dev/shm/{glob.escape(ident)}-*-cpushm_*"):  # noqa: S108  where shared memory is
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                os.unlink(path)


def _unlink_broadcast_rings() -> None:
    """Likewise for the memory through which the first rank of a tensor-parallel group sends objects to the others.

    Its maker removes it at an orderly end only. Python's resource tracker, which does so for one that was killed, is in
    the worker's process group and ended with it.
    """
    from vllm.distributed import parallel_state

    for reference in parallel_state._groups.values():
        queue = getattr(reference(), "mq_broadcaster", None)
        ring = getattr(queue, "buffer", None)  # None where all readers are on other hosts
        if ring is not None and ring.is_creator:
            ring.shared_memory.unlink()
            ring.is_creator = False  # it has no name any more to be removed


def _listening_store(store_class: Any, host: str, world_size: int) -> Any:
    """A ``TCPStore`` on a free port of ``host`` and nowhere else, which later ones in this process share."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return store_class(
        host,
        port,
        world_size=world_size,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )

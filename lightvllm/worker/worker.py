"""The worker: one rank of a model, called by name through ``messages.invoke``.

The calls come in this order: ``init_worker``, ``open_rendezvous`` (rank 0 of several), ``init_device``,
``load_model``, ``get_kv_cache_spec``, ``determine_available_memory``, ``initialize_from_config``,
``compile_or_warm_up_model``, and then ``execute_model`` for every step. ``init_worker`` may be called again, to form
a new group; it drops everything. One call runs at a time.
"""

from __future__ import annotations

import os
from typing import TypeVar

import psutil
import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from lightvllm import kernels
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.layers.attention import AttentionBackend, attention_backend
from lightvllm.layers.parallel import ParallelContext, host_address, join_store, open_store
from lightvllm.messages import CacheSpec, StepInput, StepOutput, WorkerInfo, WorkerInit
from lightvllm.worker.model_runner import ModelRunner

DEFAULT_CPU_CACHE_BYTES = 1 << 30
"""KV cache of a worker on a CPU at most, unless ``CacheConfig.memory_bytes`` says otherwise."""

T = TypeVar("T")


class Worker:
    """See the module's docstring for the order of calls; each method's types are in ``messages.TYPED_METHODS``."""

    def __init__(self) -> None:
        self._init: WorkerInit | None = None
        self._store: Store | None = None
        self._device = torch.device("cpu")
        self._threads = 1
        self._attention: AttentionBackend | None = None
        self._parallel: ParallelContext | None = None
        self._runner: ModelRunner | None = None

    def init_worker(self, init: WorkerInit) -> None:
        """Take up a rank: choose the device, the threads, the kernels and the attention backend.

        Raises ConfigError when this machine has not got what the configuration asks for.
        """
        self._runner = self._parallel = self._store = self._attention = None
        config = init.config.device
        self._device = _choose_device(config.device, init.device_index)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        cores = len(os.sched_getaffinity(0))
        self._threads = config.threads or max(1, cores // init.local_world_size)
        kernels.use(config.kernels)
        kernels.set_num_threads(self._threads)
        self._attention = attention_backend(config.attention_backend, self._device)
        self._init = init

    def open_rendezvous(self) -> str:
        """Rank 0: open the place where the ranks meet; its ``"host:port"``, on loopback if all are on this host."""
        init = self._known(self._init, "init_worker")
        local = init.local_world_size == init.world_size
        self._store, address = open_store("127.0.0.1" if local else host_address(), init.world_size)
        return address

    def init_device(self, rendezvous: str) -> None:
        """Join the process groups; ``rendezvous`` is ``""`` for a world of one. Returns when all peers have come."""
        init = self._known(self._init, "init_worker")
        layout = init.config.parallel
        if init.world_size == 1:
            self._parallel = ParallelContext(self._device)
            return
        store = self._store if self._store is not None else join_store(rendezvous, init.world_size)
        self._store = store
        self._parallel = ParallelContext.connect(
            self._device,
            init.rank,
            layout.tensor_parallel_size,
            layout.pipeline_parallel_size,
            store,
            layout.collective_timeout,
            local=init.local_world_size == init.world_size,
        )

    def load_model(self) -> WorkerInfo:
        """Load this rank's part of the weights."""
        init = self._known(self._init, "init_worker")
        attention = self._known(self._attention, "init_worker")
        self._runner = None  # never two copies
        self._runner = ModelRunner(init.config, self._known(self._parallel, "init_device"), attention)
        return WorkerInfo(
            rank=init.rank,
            device=str(self._device),
            threads=self._threads,
            attention_backend=attention.name,
            kernels="compiled" if kernels.compiled() else "reference",
            parameter_bytes=self._runner.parameter_bytes,
        )

    def get_kv_cache_spec(self) -> CacheSpec:
        return CacheSpec(bytes_per_block=self._known(self._runner, "load_model").bytes_per_block)

    def determine_available_memory(self) -> int:
        """Bytes that this worker can give to the KV cache.

        ``CacheConfig.memory_bytes`` if it is set. Else on a CPU the least of: what ``max_num_seqs`` sequences of
        ``max_model_len`` tokens fill, 1 GiB, and this worker's share of half the memory that is free. Else on a GPU
        ``gpu_memory_utilization`` of it, less what is in use and what the largest step needs.
        """
        init, runner = self._known(self._init, "init_worker"), self._known(self._runner, "load_model")
        config = init.config
        if config.cache.memory_bytes is not None:
            return config.cache.memory_bytes
        if self._device.type == "cpu":
            blocks_per_sequence = -(-config.model.max_model_len // config.cache.block_size)
            most = config.scheduler.max_num_seqs * blocks_per_sequence * runner.bytes_per_block
            free = psutil.virtual_memory().available // 2 // init.local_world_size
            return min(most, DEFAULT_CPU_CACHE_BYTES, free)
        runner.profile()
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        # What the allocator still holds from the profile run is what a step needs besides the cache.
        available = int(total * config.device.gpu_memory_utilization) - (total - free)
        if available <= 0:
            raise ConfigError(
                f"{self._device} has no memory left for the KV cache: {(total - free) >> 20} of {total >> 20} MiB are "
                f"in use, gpu_memory_utilization={config.device.gpu_memory_utilization}; raise it, or free memory"
            )
        return available

    def initialize_from_config(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        self._known(self._runner, "load_model").allocate_cache(num_blocks)

    def compile_or_warm_up_model(self) -> None:
        """Run a tiny step; every rank must be called, as for a step."""
        self._known(self._runner, "load_model").warm_up()

    def execute_model(self, step: StepInput) -> StepOutput | None:
        """One step; the result on the output rank, None on the others."""
        return self._known(self._runner, "load_model").execute(step)

    def reset_sequences(self) -> None:
        """Forget all sequences; the weights and the cache stay."""
        self._known(self._runner, "load_model").reset_sequences()

    def set_return_logits(self, wanted: bool) -> None:
        """Override ``EngineConfig.return_logits`` from the next step on, so that what is timed need not send them."""
        self._known(self._runner, "load_model").return_logits = wanted

    def check_health(self) -> None:
        """Returns if the worker answers and its device does."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @staticmethod
    def _known(value: T | None, before: str) -> T:
        if value is None:
            raise LightvllmError(f"the worker is not ready for this call; call {before} first")
        return value


def _choose_device(asked: str, index: int) -> torch.device:
    count = torch.cuda.device_count()
    if asked == "cpu" or (asked == "auto" and count == 0):
        return torch.device("cpu")
    if index >= count:
        raise ConfigError(
            f"device={asked!r} needs CUDA device number {index} on this node, but the worker sees {count}; "
            "use device='cpu', or start fewer workers on this node"
        )
    return torch.device("cuda", index)

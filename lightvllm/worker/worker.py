"""The worker: one rank of a model, called by name through ``messages.invoke``.

The calls come in this order: ``init_worker``, ``open_rendezvous`` (rank 0, where there are process groups),
``open_stage_transport`` (of several stages), ``init_device``, ``connect_stage_transport`` (of several stages),
``load_model``, ``get_kv_cache_spec``, ``determine_available_memory``, ``initialize_from_config``,
``compile_or_warm_up_model``, and then ``execute_model`` for every step; ``close_stage_transport`` at the end.
``init_worker`` may be called again, to form a new group; it drops everything. One call runs at a time.
"""

from __future__ import annotations

import os
import weakref
from typing import TypeVar

import psutil
import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from lightvllm import kernels, logs
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.layers.attention import AttentionBackend, attention_backend
from lightvllm.layers.parallel import ParallelContext, host_address, join_store, open_store
from lightvllm.messages import CacheSpec, StepInput, StepOutput, WorkerInfo, WorkerInit
from lightvllm.messages import Tensor as TensorMessage
from lightvllm.transfer import tensors
from lightvllm.transfer.stage import StageConnector, StageTransport
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
        self._connector: StageConnector | None = None
        self._stages: StageTransport | None = None
        self._end_stages: weakref.finalize[..., Worker] | None = None
        self._runner: ModelRunner | None = None

    def init_worker(self, init: WorkerInit) -> None:
        """Take up a rank: choose the device, the threads, the kernels and the attention backend.

        Raises ConfigError when this machine has not got what the configuration asks for.
        """
        logs.add_fields(rank=init.rank)
        self.close_stage_transport()
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
        if init.config.parallel.pipeline_parallel_size > 1:
            self._connector = StageConnector(init, self._device)
            self._end_stages = weakref.finalize(self, self._connector.close)  # also at the interpreter's exit
        self._init = init

    def open_rendezvous(self) -> str:
        """Rank 0: open the place where the ranks meet; its ``"host:port"``, on loopback if all are on this host."""
        init = self._known(self._init, "init_worker")
        local = init.local_world_size == init.world_size
        self._store, address = open_store("127.0.0.1" if local else host_address(), init.world_size)
        return address

    def open_stage_transport(self) -> str:
        """Be ready for hidden states from the stage before; the address at which, ``""`` where none is needed."""
        connector = self._known(self._connector, "init_worker, with several pipeline stages,")
        return connector.open(host_address())

    def init_device(self, rendezvous: str) -> None:
        """Join the process groups; ``rendezvous`` is ``""`` where there are none. Returns when all peers have come."""
        init = self._known(self._init, "init_worker")
        layout = init.config.parallel
        if not layout.needs_process_groups:
            self._parallel = ParallelContext(
                self._device, init.rank, layout.tensor_parallel_size, layout.pipeline_parallel_size
            )
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
            stages=layout.pp_transport == "torch",
        )

    def connect_stage_transport(self, next_address: str) -> None:
        """Connect to the stage behind, at what ``open_stage_transport`` returned there; ``""`` in the last stage."""
        connector = self._known(self._connector, "init_worker, with several pipeline stages,")
        self._stages = connector.connect(next_address, self._known(self._parallel, "init_device").stage_groups)

    def close_stage_transport(self) -> None:
        """End its threads, listeners, connections and files. Steps cannot be run any more where there are several
        stages."""
        self._connector = self._stages = None
        if self._end_stages is not None:
            self._end_stages()

    def load_model(self) -> WorkerInfo:
        """Load this rank's part of the weights."""
        init = self._known(self._init, "init_worker")
        attention = self._known(self._attention, "init_worker")
        self._runner = None  # never two copies
        parallel = self._known(self._parallel, "init_device")
        if init.config.parallel.pipeline_parallel_size > 1:
            self._known(self._stages, "connect_stage_transport")
        self._runner = ModelRunner(init.config, parallel, attention, self._stages)
        return WorkerInfo(
            rank=init.rank,
            device=str(self._device),
            threads=self._threads,
            attention_backend=attention.name,
            kernels="compiled" if kernels.compiled() else "reference",
            parameter_bytes=self._runner.parameter_bytes,
            pp_transport=self._stages.name if self._stages else "",
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

    def execute_stage(
        self, step: StepInput, hidden: list[TensorMessage]
    ) -> tuple[StepOutput | None, list[TensorMessage]]:
        """One step of this rank's stage alone, whose input and output the caller carries.

        Takes what the stage before returned, nothing in the first one; returns the result as ``execute_model`` does,
        and the hidden states [num_tokens, hidden_size] for the stage behind, nothing in the last one. All tensor ranks
        of a stage must be called, with the same arguments, in one stage after the other.
        """
        runner = self._known(self._runner, "load_model")
        output, states = runner.execute_stage(step, [tensors.from_message(one) for one in hidden])
        return output, [tensors.to_message(one) for one in states]

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

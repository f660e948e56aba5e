"""From configuration to an executor that is ready for its first step, for the lightvllm engine's own workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import wait

from lightvllm.backends.base import Backend, Placement, Progress
from lightvllm.config import EngineConfig, ExecutorConfig
from lightvllm.errors import ConfigError, Shutdown
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.executors.ranks import device_indices, local_ranks
from lightvllm.messages import CacheSpec, WorkerInfo, WorkerInit, encode_call
from lightvllm.transfer.credentials import make_credentials

WORKER_CLASS = "lightvllm.worker:Worker"
CLOSE_TIMEOUT = 1.0
"""Seconds that workers get to close the stages' transports before they are ended."""


class EngineExecutor(DistributedExecutor):
    """A ``DistributedExecutor`` whose workers run a lightvllm model.

    Attributes:
        worker_infos: what each rank said after loading, in rank order.
        num_kv_blocks: blocks of KV cache, the same on every rank.
        start_seconds: time from the start of placement until now ready.
    """

    _has_stages = False
    worker_infos: list[WorkerInfo]
    num_kv_blocks: int
    start_seconds: float

    def start(self, config: EngineConfig, progress: Progress) -> None:
        """Tell each worker who it is, form the process groups, load the weights, make the KV cache, warm up."""
        ranks, layout = range(self.world_size), config.parallel
        places = local_ranks(self.workers)
        credentials = make_credentials(layout, local=all(on_node == self.world_size for _, on_node in places))
        init = {
            rank: [
                WorkerInit(
                    rank=rank,
                    local_rank=local_rank,
                    local_world_size=local_world_size,
                    device_index=device_index,
                    world_size=self.world_size,
                    config=config,
                    stage_credentials=credential,
                )
            ]
            for rank, (local_rank, local_world_size), device_index, credential in zip(
                ranks, places, device_indices(self.workers), credentials, strict=True
            )
        }
        self.scatter_rpc("init_worker", init)
        rendezvous = ""
        if layout.needs_process_groups:
            progress("forming the process groups")
            (rendezvous,) = self.scatter_rpc("open_rendezvous", {0: []})
        if layout.pipeline_parallel_size == 1:
            self.collective_rpc("init_device", args=(rendezvous,))
        else:
            progress("connecting the pipeline's stages")
            self._has_stages = True
            addresses: list[str] = self.collective_rpc("open_stage_transport")
            self.collective_rpc("init_device", args=(rendezvous,))
            behind = addresses[layout.tensor_parallel_size :] + [""] * layout.tensor_parallel_size
            self.scatter_rpc("connect_stage_transport", {rank: [behind[rank]] for rank in ranks})

        def loaded(done: int, of: int) -> None:
            progress(f"loading weights: {done} of {of} ranks done")

        loaded(0, self.world_size)
        self.worker_infos = self.scatter_rpc("load_model", {rank: [] for rank in ranks}, on_reply=loaded)
        progress("making the KV cache")
        self.num_kv_blocks = self._num_kv_blocks(config)
        self.initialize_from_config(self.num_kv_blocks)

    def shutdown(self) -> None:
        """See ``DistributedExecutor.shutdown``. Workers that still answer remove their stages' files and sockets first:
        not every backend lets a worker end by itself."""
        self._fail(Shutdown("the executor has been shut down"))
        if self._has_stages:
            self._has_stages = False
            method, payload = encode_call("close_stage_transport", (), None)
            wait([self.backend.call(worker, method, payload) for worker in self.workers], CLOSE_TIMEOUT)
        super().shutdown()

    def _num_kv_blocks(self, config: EngineConfig) -> int:
        """Blocks that every rank has room for; the workers refuse a cache too small for one sequence of full length."""
        if config.cache.num_blocks is not None:
            return config.cache.num_blocks
        specs: list[CacheSpec] = self.get_kv_cache_specs()
        memory = self.determine_available_memory()
        return min(available // spec.bytes_per_block for available, spec in zip(memory, specs, strict=True))


def make_executor(executor: ExecutorConfig, engine: EngineConfig, progress: Progress | None = None) -> EngineExecutor:
    """Place the workers, have them load the model and make their caches.

    Blocks until the first step can be run. On any failure, KeyboardInterrupt included, whatever was started has been
    ended again before the exception leaves.

    Raises:
        ConfigError: the backend cannot run this layout here, or a worker refused the model.
        PlacementError: not all workers could be placed in time.
        WorkerDied, WorkerError, RpcTimeout: a worker failed while it was starting.
    """
    started = time.monotonic()
    tell: Progress = progress or (lambda _: None)
    parallel = engine.parallel
    backend = _BACKENDS[executor.name](executor, engine)
    placement = Placement(
        world_size=parallel.world_size,
        worker_class=WORKER_CLASS,
        gpus_per_worker=1 if engine.device.device == "cuda" else 0,
        strategy=executor.strategy,
        env=executor.env,
    )
    tell(f"starting {parallel.world_size} worker{'s' * (parallel.world_size > 1)} ({executor.name})")
    made = EngineExecutor(
        backend,
        placement,
        parallel,
        start_timeout=executor.start_timeout,
        rpc_timeout=executor.rpc_timeout,
        step_timeout=executor.step_timeout,
        progress=tell,
    )
    try:
        made.start(engine, tell)
    except BaseException:
        made.shutdown()
        raise
    made.start_seconds = time.monotonic() - started
    return made


def _uniproc(executor: ExecutorConfig, engine: EngineConfig) -> Backend:
    if engine.parallel.world_size > 1:
        raise ConfigError(
            f"executor='uniproc' runs one worker, but tensor_parallel_size={engine.parallel.tensor_parallel_size} × "
            f"pipeline_parallel_size={engine.parallel.pipeline_parallel_size} needs {engine.parallel.world_size}; "
            "use executor='k8s' or 'ray'"
        )
    from lightvllm.backends.inprocess import InProcessBackend

    return InProcessBackend()


def _ray(executor: ExecutorConfig, engine: EngineConfig) -> Backend:
    from lightvllm.backends.ray.backend import RayBackend

    return RayBackend(address=executor.ray_address)


def _k8s(executor: ExecutorConfig, engine: EngineConfig) -> Backend:
    from lightvllm.backends.k8s.backend import KubernetesBackend

    return KubernetesBackend(
        workers=executor.k8s_workers,
        service=executor.k8s_service,
        pod_prefix=executor.k8s_pod_prefix,
        gpus_per_pod=executor.k8s_gpus_per_pod,
        token_file=executor.k8s_token_file,
        tls_cert=executor.k8s_tls_cert,
        tls_key=executor.k8s_tls_key,
        tls_ca=executor.k8s_tls_ca,
        transport=executor.k8s_transport,
    )


_BACKENDS: dict[str, Callable[[ExecutorConfig, EngineConfig], Backend]] = {
    "uniproc": _uniproc,
    "ray": _ray,
    "k8s": _k8s,
}

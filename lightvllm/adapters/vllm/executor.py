"""vLLM's ``Executor`` over ours: unmodified vLLM on any backend of lightvllm.

``--distributed-executor-backend lightvllm.adapters.vllm.KubernetesExecutor`` (or ``RayExecutor``), or the class given
to ``LLM(...)``. It follows the contract of vLLM 0.32 (``vllm/v1/executor/abstract.py``, ``vllm/v1/engine/core.py``):
what the base class makes of ``collective_rpc`` is left to it, so that only start, steps, failure and end are here.
Where the workers are and what they get from this process's environment is told by ``settings.py`` and
``environment.py``.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import multiprocessing
import os
import pickle
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import vllm.envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_torch_threads_for_runtime
from vllm.v1.executor.abstract import Executor, FailureCallback
from vllm.v1.executor.multiproc_executor import set_multiprocessing_worker_envs

from lightvllm.adapters.vllm import environment, versions
from lightvllm.adapters.vllm.devices import shared_devices
from lightvllm.adapters.vllm.futures import Aggregated, fail_with
from lightvllm.adapters.vllm.meeting import check_meeting
from lightvllm.adapters.vllm.settings import AdapterSettings, first_pod_of_engine, load_settings, workers_of_engine
from lightvllm.adapters.vllm.worker import WorkerStart
from lightvllm.backends.base import Backend, Placement, WorkerRef
from lightvllm.config import ParallelConfig
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.executors.distributed import HEALTH_TIMEOUT, DistributedExecutor
from lightvllm.executors.ranks import local_ranks

# Below vLLM's own logger, whose handlers and format it so shares.
logger = init_logger(f"vllm.{__name__}")

WORKER_CLASS = "lightvllm.adapters.vllm.worker:VllmWorker"
MAX_MESSAGE_BYTES = 2**36
"""For calls and replies, images in a step and weights in a call among them: vLLM's own executors have no limit. Servers
that were started with ``lightvllm worker`` have one of their own, which counts then."""
STEPS = frozenset(("execute_model", "sample_tokens"))

_NONE: Future[None] = Future()
_NONE.set_result(None)


class _BackendExecutor(Executor):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What both executors share. Made by vLLM, in the process of its engine core.

    Attributes:
        executor: ours, with the workers' addresses, ranks and backend.
    """

    supports_pp = True
    # vLLM's own meaning of it is "I shall have a placement group made by vLLM", which neither of ours needs.
    uses_ray = False
    executor: DistributedExecutor

    _backend_name: Literal["k8s", "ray"]

    def _init_executor(self) -> None:
        """Place the workers, have them form their groups and load the model.

        Raises:
            ConfigError: what was asked for cannot be done here.
            PlacementError: not all workers could be placed in time, or they run other versions than this process.
            WorkerDied, WorkerError, RpcTimeout: a worker failed while it was starting. Nothing is left of the others.
        """
        self._closing = threading.Lock()
        self._closed = False
        self._step_failed = False
        self._callbacks: list[FailureCallback] = []
        self._executed: Future[Any] = Future()
        try:
            self._start()
        except LightvllmError as error:
            # vLLM shows a traceback of two processes; this is the line to read.
            logger.error("%s: %s", type(self).__name__, error)
            raise

    def _start(self) -> None:
        parallel = self.parallel_config
        self.settings = settings = load_settings(self.vllm_config.additional_config, os.environ, self._backend_name)
        _check_supported(self.vllm_config)
        self.output_rank = parallel.world_size - parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
        self._is_plain = _is_plain(self.vllm_config)
        if warning := versions.warn_unless_supported(versions.local_versions().vllm):
            logger.warning(warning)
        backend, self._is_local = self._make_backend(settings)
        self.executor = DistributedExecutor(
            backend,
            self._placement(settings),
            ParallelConfig(
                tensor_parallel_size=parallel.tensor_parallel_size * parallel.prefill_context_parallel_size,
                pipeline_parallel_size=parallel.pipeline_parallel_size,
            ),
            start_timeout=settings.start_timeout,
            rpc_timeout=settings.rpc_timeout,
            step_timeout=vllm.envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            shutdown_timeout=settings.shutdown_timeout,
            progress=lambda text: logger.info("%s", text),
        )
        # Not through self: this executor's end must not wait for the collector.
        self._finalizer = weakref.finalize(self, self.executor.shutdown)
        try:
            self._bring_up()
        except BaseException:
            self.executor.shutdown()
            raise
        failed = weakref.WeakMethod(self._failed)
        self.executor.register_failure_callback(lambda: (alive := failed()) and alive())
        _when_parent_ends(weakref.WeakMethod(self._orphaned))

    @abstractmethod
    def _make_backend(self, settings: AdapterSettings) -> tuple[Backend, bool]:
        """The backend, and whether the workers will be children of this process on this machine."""

    def _placement(self, settings: AdapterSettings) -> Placement:
        # Local workers see the GPUs that this process sees, as those of vLLM's multiprocessing executor do, and take
        # theirs by local rank; vLLM itself says if there are too few.
        deals_gpus = current_platform.is_cuda_alike() and not self._is_local
        return Placement(
            world_size=self.parallel_config.world_size,
            worker_class=WORKER_CLASS,
            gpus_per_worker=int(deals_gpus),
            # A bundle of vLLM's own Ray executors holds a GPU and no CPU, and clusters are made for that.
            cpus_per_worker=int(not deals_gpus),
            strategy=settings.strategy,
            env={}
            if self._is_local
            else environment.for_workers(os.environ, vllm.envs.environment_variables, settings),
            env_overrides=settings.env,
        )

    def _bring_up(self) -> None:
        executor, ranks = self.executor, range(self.parallel_config.world_size)
        described: list[versions.Versions] = executor.collective_rpc("describe", self.settings.start_timeout)
        names = [f"{worker.id} (rank {rank})" for rank, worker in enumerate(executor.workers)]
        versions.check(versions.local_versions(), dict(zip(names, described, strict=True)))
        parallel = self.parallel_config
        if parallel.data_parallel_size > 1:  # it is 1 where engines work each for itself
            node, address = executor.backend.driver_node, parallel.data_parallel_master_ip
            check_meeting(executor.workers, node, address, parallel.data_parallel_rank)

        one_node = len({worker.node for worker in executor.workers}) == 1
        devices = [rank for rank, _ in local_ranks(executor.workers)]
        env: list[dict[str, str]] = [{} for _ in ranks]
        if self._is_local:
            env = _openmp(self.vllm_config, len(ranks))
        elif current_platform.is_cuda_alike():
            devices, visible = shared_devices(executor.workers, dealt=self._backend_name == "ray")
            # On ROCm vLLM wants the two to be the same, and Ray sets the second.
            variables = ("CUDA_VISIBLE_DEVICES", *(("HIP_VISIBLE_DEVICES",) * current_platform.is_rocm()))
            env = [{} if seen is None else dict.fromkeys(variables, seen) for seen in visible]
        # What vLLM does for its own workers, except on CPUs; those started here have it from this process.
        divides = not self._is_local and not current_platform.is_cpu()
        sharing = [here if divides else 0 for _, here in local_ranks(executor.workers)]
        executor.scatter_rpc("prepare", {rank: [env[rank], sharing[rank]] for rank in ranks})

        (meeting,) = executor.scatter_rpc("open_meeting", {0: [one_node, len(ranks)]})
        config = self.vllm_config if self._is_local else _config_for_other_hosts(self.vllm_config)
        starts = {
            rank: [
                WorkerStart(
                    vllm_config=config,
                    rank=rank,
                    local_rank=devices[rank],
                    init_method=_on_node(meeting, executor.workers[rank]),
                )
            ]
            for rank in ranks
        }
        executor.scatter_rpc("construct", starts)
        logger.info("%d worker%s: forming the process groups", len(ranks), "s" * (len(ranks) > 1))
        executor.collective_rpc("join_groups")
        executor.scatter_rpc(
            "load_weights",
            {rank: [] for rank in ranks},
            on_reply=lambda done, of: logger.info("%d of %d ranks have loaded their weights", done, of),
        )
        # This process only schedules; torch's threads would take the workers' cores.
        set_torch_threads_for_runtime()

    # ------------------------------------------------------------------------------------------------- calls

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        kv_output_aggregator: Any = None,
        ec_output_aggregator: Any = None,
    ) -> Any:
        """See ``lightvllm.executors.base.Executor.collective_rpc``.

        With an aggregator all ranks reply, and the aggregators make one output of theirs: ``unique_reply_rank``'s.
        """
        aggregators = [each for each in (kv_output_aggregator, ec_output_aggregator) if each is not None]
        reply_rank = None if aggregators else unique_reply_rank
        future = self._send(method, timeout, tuple(args), dict(kwargs or {}), reply_rank)
        if aggregators:
            future = Aggregated(future, aggregators, unique_reply_rank or 0)
        return future if non_block else future.result()

    def _send(
        self,
        method: str | Callable[..., Any],
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reply_rank: int | None,
    ) -> Future[Any]:
        if not (isinstance(method, str) and method in STEPS) or any(map(_brings_tensors, args)):
            # The arguments may be a user's own, too: a lambda for apply_model, weights.
            name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
            return self.executor.begin_rpc("run", (method, args, kwargs, reply_rank), timeout, reply_rank, name)
        # vLLM's own objects need nothing that cloudpickle adds, and pickle takes a third of the time.
        call = pickle.dumps((method, args, kwargs), pickle.HIGHEST_PROTOCOL)
        return self.executor.begin_rpc("run_pickled", (call, reply_rank), timeout, reply_rank, method)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step; the output rank's result, or a Future of it. None where sampling is a call of its own.

        vLLM's plain step waits for that None before it sends the second half, and the workers would wait meanwhile. So
        it is told at once, and the second half looks at what the first has really come to.
        """
        self._executed = future = self._step("execute_model", scheduler_output)
        if not non_block:
            return future.result()
        return _NONE if self._is_plain and scheduler_output.total_num_scheduled_tokens else future

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The second half of a step. Fails as soon as any rank has failed in the first half.

        vLLM waits for this half alone where it has sent both, and the ranks that have not failed may sit in a
        collective for ever.
        """
        future = self._step("sample_tokens", grammar_output)
        self._executed.add_done_callback(functools.partial(fail_with, self.executor, future))
        if non_block:
            return future
        output = future.result()
        return self._executed.result() if output is None else output

    def _step(self, method: str, argument: Any) -> Future[Any]:
        future: Future[Any] = self.collective_rpc(
            method,
            self.executor.step_timeout,
            (argument,),
            non_block=True,
            unique_reply_rank=self.output_rank,
            kv_output_aggregator=self.kv_output_aggregator,
            ec_output_aggregator=self.ec_output_aggregator,
        )
        future.add_done_callback(self._look_at)
        return future

    def _look_at(self, step: Future[Any]) -> None:
        self._step_failed |= step.exception() is not None

    def execute_dummy_batch(self) -> None:
        """A step without requests, which data-parallel engines take for the others' sake."""
        self.collective_rpc("execute_dummy_batch", self.executor.step_timeout, unique_reply_rank=self.output_rank)

    def take_draft_token_ids(self) -> Any:
        """The draft tokens of the last step, from the rank that has them."""
        return self.collective_rpc(
            "take_draft_token_ids", self.executor.step_timeout, unique_reply_rank=self.output_rank
        )

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    # ----------------------------------------------------------------------------------------------- failure

    @property
    def is_failed(self) -> bool:
        """True once a worker is gone; every further call raises WorkerDied."""
        return self.executor.is_failed

    def register_failure_callback(self, callback: FailureCallback) -> None:
        """Have ``callback`` called when a worker is gone, at once if one is already; or this process's parent."""
        self._callbacks.append(callback)
        self.executor.register_failure_callback(callback)

    def check_health(self) -> None:
        """Raise unless every worker answers."""
        self.collective_rpc("check_health", HEALTH_TIMEOUT)

    def _failed(self) -> None:
        logger.error("%s: %s; the other workers are ended", type(self).__name__, self.executor.failure)
        # In a thread: this is called where the death was noticed, and vLLM's own callback is not to wait for it.
        threading.Thread(target=self.executor.shutdown, name="lightvllm-end-group", daemon=True).start()

    def _orphaned(self) -> None:
        """vLLM's engine core does not notice the end of the process that started it, and would go on for ever."""
        logger.error("%s: the process that started this engine is gone; the engine ends", type(self).__name__)
        self.executor.shutdown()
        for callback in self._callbacks:
            callback()

    # ---------------------------------------------------------------------------------------------- shutdown

    def shutdown(self) -> None:
        """End the workers and leave nothing behind. Idempotent."""
        executor = getattr(self, "executor", None)
        if executor is None:
            return
        with self._closing:
            first, self._closed = not self._closed, True
        # After a failed step the ranks that have not failed may sit in a collective, and would not answer.
        if first and executor.failure is None and not self._step_failed:
            self._close_workers(executor)
        executor.shutdown()

    def _close_workers(self, executor: DistributedExecutor) -> None:
        try:
            executor.collective_rpc("close", vllm.envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS)
        except LightvllmError as error:
            logger.warning("a worker did not close in an orderly way and is ended: %s", error)


def _when_parent_ends(call: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Have ``call`` called when the process that has started this one by multiprocessing ends, if one has."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        if (alive := call()) is not None:
            alive()

    threading.Thread(target=watch, name="lightvllm-parent", daemon=True).start()


def _brings_tensors(step: Any) -> bool:
    """Whether images or the like come with a step. By plain pickle torch sends them as files, which takes many times
    as long."""
    new = getattr(step, "scheduled_new_reqs", ())
    return any(request.mm_features or request.prompt_embeds is not None for request in new)


def _is_plain(config: Any) -> bool:
    """Whether vLLM takes its steps one at a time (``EngineCore.step``), and the first half of one that has scheduled
    tokens comes to None or an error."""
    return bool(
        config.max_concurrent_batches == 1
        and config.model_config.runner_type != "pooling"
        and not config.is_mm_encoder_only
        and config.kv_transfer_config is None
        and config.ec_transfer_config is None
    )


class KubernetesExecutor(_BackendExecutor):
    """Workers behind authenticated gRPC: local processes, or ``lightvllm worker`` servers, see ``settings.py``.

    With ``k8s_service`` each data-parallel engine has pods of its own, one engine's after another's.
    """

    _backend_name = "k8s"

    def _make_backend(self, settings: AdapterSettings) -> tuple[Backend, bool]:
        from lightvllm.backends.k8s.backend import KubernetesBackend

        parallel = self.parallel_config
        if not settings.k8s_workers and settings.k8s_service is None:
            set_multiprocessing_worker_envs(parallel.local_world_size * max(1, parallel.data_parallel_size_local))
            local = KubernetesBackend(
                transport=settings.k8s_transport,
                max_message_bytes=MAX_MESSAGE_BYTES,
                show_output=settings.show_worker_output,
            )
            return local, True
        backend = KubernetesBackend(
            workers=workers_of_engine(
                settings.k8s_workers,
                parallel.world_size,
                parallel.data_parallel_index,
                parallel.data_parallel_rank_local,
                parallel.data_parallel_size,
                parallel.data_parallel_size_local,
                settings.k8s_gpus_per_pod,
            ),
            service=settings.k8s_service,
            pod_prefix=settings.k8s_pod_prefix,
            first_pod=first_pod_of_engine(parallel.world_size, parallel.data_parallel_index, settings.k8s_gpus_per_pod),
            gpus_per_pod=settings.k8s_gpus_per_pod,
            token_file=settings.k8s_token_file,
            tls_cert=settings.k8s_tls_cert,
            tls_key=settings.k8s_tls_key,
            tls_ca=settings.k8s_tls_ca,
            transport=settings.k8s_transport,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        return backend, False


class RayExecutor(_BackendExecutor):
    """Workers in Ray actors, one in each bundle of a placement group."""

    _backend_name = "ray"

    def _make_backend(self, settings: AdapterSettings) -> tuple[Backend, bool]:
        from lightvllm.backends.ray.backend import RayBackend
        from lightvllm.backends.ray.cluster import LocalClusterConfig

        _check_ray(self.parallel_config)
        local = LocalClusterConfig(log_to_driver=settings.show_worker_output)
        return RayBackend(address=settings.ray_address, local_cluster=local), False


def _check_supported(config: Any) -> None:
    """Refuse what vLLM offers and these executors do not, rather than ignore it."""
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        raise ConfigError(
            f"vLLM's platform here is {current_platform.device_name!r}; these executors place workers on CPUs and on "
            "CUDA or ROCm GPUs"
        )
    if getattr(config.parallel_config, "numa_bind", False):
        raise ConfigError(
            "numa_bind=True: these executors do not bind workers to NUMA nodes; start them bound (numactl … lightvllm "
            "worker), or leave it out"
        )
    multimodal = getattr(config.model_config, "multimodal_config", None)
    if getattr(multimodal, "mm_processor_cache_type", None) == "shm":
        raise ConfigError(
            "mm_processor_cache_type='shm' needs a lock that all workers inherit from one process; use 'lru'"
        )
    parallel, ec = config.parallel_config, getattr(config, "ec_transfer_config", None)
    per_stage = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
    if getattr(ec, "ec_connector", None) == "ECCPUConnector" and per_stage > 1:
        # It waits until all ranks have read an embedding where the executor is called 'mp'; else for the first of them.
        raise ConfigError(
            f"ECCPUConnector with {per_stage} ranks in a stage gives memory back while ranks still read it, except "
            "under vLLM's own 'mp'; use tensor_parallel_size=1, or another connector"
        )


def _check_ray(parallel: Any) -> None:
    """Refuse what tells vLLM's own Ray executors where to place workers; this one makes a group of its own."""
    given = [name for name in ("placement_group", "ray_runtime_env") if getattr(parallel, name, None) is not None]
    given += [name for name in ("VLLM_RAY_BUNDLE_INDICES", "VLLM_RAY_PER_WORKER_GPUS") if os.environ.get(name)]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: for vLLM's own Ray executors; RayExecutor makes a placement group of its own, with "
            "one GPU to a worker, and takes variables for workers from LIGHTVLLM_ENV; leave it out"
        )


def _openmp(config: Any, world_size: int) -> list[dict[str, str]]:
    """OpenMP's variables for each local worker on a CPU, as vLLM's multiprocessing executor sets them."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    manager = OMPProcessManager(config)
    variables = []
    for rank in range(world_size):
        before = dict(os.environ)
        with manager.configure_omp_envs(rank=rank, local_rank=rank):
            variables.append({name: value for name, value in os.environ.items() if before.get(name) != value})
    return variables


def _config_for_other_hosts(config: Any) -> Any:
    """A copy for workers that share no machine with this process.

    vLLM takes GPUs of one machine to be shared among its data-parallel engines, and shifts local ranks by the engine's
    number; a pod or actor holds the workers of one engine alone. The same goes for GPU numbers of this machine.
    """
    config = copy.copy(config)
    parallel = config.parallel_config = copy.copy(config.parallel_config)
    given = parallel.data_parallel_backend != "ray" and current_platform.is_cuda_alike()  # else vLLM sets them itself
    if given and parallel.assigned_physical_gpu_ids is not None:
        logger.warning(
            "GPUs %s of this host (--device-ids) mean nothing to workers elsewhere, which take those that they see; "
            "start the workers with CUDA_VISIBLE_DEVICES instead",
            parallel.assigned_physical_gpu_ids,
        )
    parallel.assigned_physical_gpu_ids = None
    if parallel.data_parallel_rank_local is not None or parallel.data_parallel_size > 1:
        parallel.data_parallel_rank_local = 0
    return config


def _on_node(meeting: str, worker: WorkerRef) -> str:
    """The init method with a mark that the workers of one node, in one group, share; torch itself ignores it.

    By what follows its last colon vLLM's CPU communicator names shared memory. Ranks with the same name are taken to
    share it, and end with an error where they do not; and another group may have had this port.
    """
    if not current_platform.is_cpu():
        return meeting
    return f"{meeting}?node={hashlib.sha256(worker.node.encode()).hexdigest()[:8]}"

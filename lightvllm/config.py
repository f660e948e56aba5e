"""What is to be run, checked before anything is started. Frozen, typed, and sent to the workers as it is.

Knows no torch. Everything that can be refused by arithmetic alone (a layout that does not divide the heads, blocks of
no tokens) is refused here, with what would work; what a model's folder alone decides, in ``model_config.py``.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from lightvllm.errors import ConfigError
from lightvllm.model_config import ModelConfig as ModelConfig

PipelineTransport = Literal["torch", "grpc", "shared"]
PIPELINE_TRANSPORTS: tuple[str, ...] = ("torch", "grpc", "shared")


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The layout: rank = pipeline rank × tensor_parallel_size + tensor rank.

    Attributes:
        collective_timeout: seconds that a worker waits for its peers in one collective operation, or for a step's
            hidden states.
        pp_transport: how hidden states go from a stage to the next: ``"torch"`` (torch.distributed: gloo on CPUs, NCCL
            on GPUs), ``"grpc"``, or ``"shared"`` (files in a shared directory).
        pp_shared_dir: that directory, under one path for all workers; None takes a tmpfs, for workers on one host.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    collective_timeout: float = 300.0
    pp_transport: PipelineTransport = "torch"
    pp_shared_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; use 1 or more")
        if not (math.isfinite(self.collective_timeout) and self.collective_timeout > 0):
            raise ConfigError(f"collective_timeout={self.collective_timeout}; use a positive number of seconds")
        if self.pp_transport not in PIPELINE_TRANSPORTS:
            raise ConfigError(
                f"pp_transport={self.pp_transport!r} is unknown; use one of {', '.join(PIPELINE_TRANSPORTS)}"
            )
        if self.pp_shared_dir is not None and self.pp_transport != "shared":
            raise ConfigError(
                f"pp_shared_dir is given, but pp_transport={self.pp_transport!r}; use pp_transport='shared', or leave "
                "the directory out"
            )

    @property
    def needs_process_groups(self) -> bool:
        """Whether any worker has a peer that it talks to by torch.distributed."""
        return self.tensor_parallel_size > 1 or (self.pipeline_parallel_size > 1 and self.pp_transport == "torch")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def output_rank(self) -> int:
        """The rank whose reply holds a step's result: tensor rank 0 of the last pipeline stage."""
        return self.world_size - self.tensor_parallel_size

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError, naming the sizes that would work, unless the model can be split so.

        Query heads are dealt out evenly; KV heads too, or each is copied to the ranks that share it. The
        intermediate size must divide as well. The vocabulary need not: it is padded.
        """
        tp, pp = self.tensor_parallel_size, self.pipeline_parallel_size
        fits = [n for n in range(1, model.num_attention_heads + 1) if _tp_fits(model, n)]
        if tp not in fits:
            raise ConfigError(
                f"tensor_parallel_size={tp} cannot split this model (num_attention_heads={model.num_attention_heads}, "
                f"num_key_value_heads={model.num_key_value_heads}, intermediate_size={model.intermediate_size}); "
                f"use {_one_of(fits)}"
            )
        if pp > model.num_hidden_layers:
            raise ConfigError(
                f"pipeline_parallel_size={pp} is more than the model's {model.num_hidden_layers} layers; "
                "use fewer stages"
            )


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV cache.

    Attributes:
        block_size: tokens per block.
        num_blocks: blocks in all; None derives it from ``memory_bytes``.
        memory_bytes: bytes of KV cache per worker; None takes a default (see ``Worker.determine_available_memory``).
        enable_prefix_caching: share full blocks of equal prefixes.
    """

    block_size: int = 16
    num_blocks: int | None = None
    memory_bytes: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size={self.block_size}; use a power of two, such as 16")
        for name in ("num_blocks", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}; use 1 or more, or leave it out")


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Continuous batching: limits of one step.

    Attributes:
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: tokens computed in one step at most; longer prompts are prefilled in chunks.
        async_scheduling: plan and send a step while the one before runs, whose tokens are not known yet; None does so
            where there is one pipeline stage. (Several stages have steps in flight anyway.)
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    async_scheduling: bool | None = None

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs={self.max_num_seqs}; use 1 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "each running sequence needs one token a step; raise the first or lower the second"
            )


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker computes on.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``; ``"auto"`` is CUDA where the worker sees a device.
        threads: CPU threads per worker; 0 shares the cores of the machine out evenly. Results are compared bit for
            bit only between runs with equal thread counts.
        attention_backend: ``"naive"``, ``"sdpa"``, ``"paged"``, or ``"auto"``.
        kernels: ``"auto"`` uses compiled kernels where they can be built, ``"compiled"`` is an error where they
            cannot, ``"reference"`` uses torch's own operations only.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    attention_backend: Literal["auto", "naive", "sdpa", "paged"] = "auto"
    kernels: Literal["auto", "compiled", "reference"] = "auto"
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"threads={self.threads}; use 1 or more, or 0 to share the cores out")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization}; use a fraction in (0, 1]")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that the engine and its workers need to know; the executor's own settings are in ``ExecutorConfig``."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    device: DeviceConfig = DeviceConfig()
    seed: int = 0
    return_logits: bool = False

    def __post_init__(self) -> None:
        self.parallel.check(self.model)
        if self.scheduler.async_scheduling and self.parallel.pipeline_parallel_size > 1:
            raise ConfigError(
                f"async_scheduling=True with pipeline_parallel_size={self.parallel.pipeline_parallel_size}: several "
                "stages have several steps in flight anyway; leave async_scheduling out, or use one stage"
            )

    @property
    def async_scheduling(self) -> bool:
        """Whether a step is planned before the tokens of the one before are known."""
        if self.scheduler.async_scheduling is None:
            return self.parallel.pipeline_parallel_size == 1
        return self.scheduler.async_scheduling


KubernetesTransport = Literal["auto", "grpc", "direct"]
KUBERNETES_TRANSPORTS: tuple[str, ...] = ("auto", "grpc", "direct")
RUNNING_WORKERS = "k8s_workers or k8s_service, neither of which is given"
"""What an option is for that makes no sense with worker processes started here; for messages."""
ExecutorName = Literal["uniproc", "ray", "k8s"]
EXECUTOR_NAMES: tuple[str, ...] = ("uniproc", "ray", "k8s")


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the workers run and how long to wait for them.

    Attributes:
        name: ``"uniproc"`` (this process), ``"ray"`` or ``"k8s"``.
        ray_address: a running Ray cluster (``"auto"`` or ``"host:port"``); None starts a small local one.
        k8s_workers: addresses of ``lightvllm worker`` servers, ``"host:port"``, in rank order. Neither these nor
            ``k8s_service``: local worker processes are started.
        k8s_service: the headless Service of a StatefulSet whose pods run ``lightvllm worker``, found by DNS:
            ``NAME[.NAMESPACE[.svc[.DOMAIN]]][:PORT]``. Ranks go by a pod's index.
        k8s_pod_prefix: the StatefulSet's name; None takes the Service's without ``-headless``.
        k8s_gpus_per_pod: workers behind each of those addresses, or in each pod, at as many consecutive ports
            (``lightvllm worker --workers``); ranks go pod by pod, port by port.
        k8s_token_file: file with the token that those servers were started with.
        k8s_tls_cert, k8s_tls_key, k8s_tls_ca: PEM files for mutual TLS with them: the driver's certificate, its key,
            and the CA that signed the servers'. Needed for addresses that are not loopback.
        k8s_transport: what carries calls to the workers: ``"grpc"`` (a stream), ``"direct"`` (a socket beside it, which
            is faster), or ``"auto"``: direct where it can be opened, else grpc.
        strategy: placement of the workers over nodes (Ray's names).
        start_timeout: seconds until every worker must answer.
        rpc_timeout: seconds until every worker must have answered a control call, loading included.
        step_timeout: seconds until a step must have been answered.
    """

    name: ExecutorName = "uniproc"
    ray_address: str | None = None
    k8s_workers: tuple[str, ...] = ()
    k8s_service: str | None = None
    k8s_pod_prefix: str | None = None
    k8s_gpus_per_pod: int = 1
    k8s_token_file: str | None = None
    k8s_tls_cert: str | None = None
    k8s_tls_key: str | None = None
    k8s_tls_ca: str | None = None
    k8s_transport: KubernetesTransport = "auto"
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    start_timeout: float = 120.0
    rpc_timeout: float = 600.0
    step_timeout: float = 300.0
    env: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.name not in EXECUTOR_NAMES:
            raise ConfigError(f"executor={self.name!r} is unknown; use one of {', '.join(EXECUTOR_NAMES)}")
        if self.k8s_workers and self.name != "k8s":
            raise ConfigError(f"k8s_workers are given, but executor={self.name!r}; use executor='k8s'")
        if self.k8s_service is not None and self.name != "k8s":
            raise ConfigError(
                f"k8s_service={self.k8s_service!r} is given, but executor={self.name!r}; use executor='k8s'"
            )
        if self.k8s_workers and self.k8s_service is not None:
            raise ConfigError(f"k8s_workers and k8s_service={self.k8s_service!r} are both given; keep one")
        if self.k8s_pod_prefix is not None and self.k8s_service is None:
            raise ConfigError(
                f"k8s_pod_prefix={self.k8s_pod_prefix!r} is for k8s_service, which is not given; leave it out"
            )
        if self.k8s_gpus_per_pod < 1:
            raise ConfigError(f"k8s_gpus_per_pod={self.k8s_gpus_per_pod}; use 1 or more")
        if self.k8s_gpus_per_pod != 1 and not self.k8s_workers and self.k8s_service is None:
            raise ConfigError(f"k8s_gpus_per_pod={self.k8s_gpus_per_pod} is for {RUNNING_WORKERS}; leave it out")
        if self.k8s_transport not in KUBERNETES_TRANSPORTS:
            raise ConfigError(
                f"k8s_transport={self.k8s_transport!r} is unknown; use one of {', '.join(KUBERNETES_TRANSPORTS)}"
            )
        if self.k8s_transport != "auto" and self.name != "k8s":
            raise ConfigError(
                f"k8s_transport={self.k8s_transport!r} is given, but executor={self.name!r}; use executor='k8s'"
            )
        if self.ray_address and self.name != "ray":
            raise ConfigError(f"ray_address is given, but executor={self.name!r}; use executor='ray'")
        for field in ("start_timeout", "rpc_timeout", "step_timeout"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field}={value}; use a positive number of seconds")


def stage_layers(num_layers: int, pp_size: int, pp_rank: int) -> range:
    """The layers of a pipeline stage: an equal share each, and one more for the earliest stages if a remainder is
    left, because the last stage has the output head as well."""
    share, remainder = divmod(num_layers, pp_size)
    start = pp_rank * share + min(pp_rank, remainder)
    return range(start, start + share + (pp_rank < remainder))


def _tp_fits(model: ModelConfig, tp: int) -> bool:
    kv = model.num_key_value_heads
    return model.num_attention_heads % tp == 0 and model.intermediate_size % tp == 0 and (kv % tp == 0 or tp % kv == 0)


def _one_of(numbers: list[int]) -> str:
    *most, last = [str(n) for n in numbers]
    return f"{', '.join(most)} or {last}" if most else last

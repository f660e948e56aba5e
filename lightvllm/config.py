"""What is to be run, checked before anything is started. Frozen, typed, and sent to the workers as it is.

Knows no torch. The architecture is read from a Hugging Face ``config.json``; everything that can be refused
by arithmetic alone (an unknown architecture, a layout that does not divide the heads, a context that is too
long) is refused here, with what would work.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from lightvllm.errors import ConfigError
from lightvllm.pooling import Pooling, read_pooling

DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """``rope_type="llama3"``: frequencies stretched by wavelength (transformers' ``_compute_llama3_parameters``).
    ``rope_type="linear"``: positions divided by ``factor``."""

    rope_type: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One LLaMA-family model: where it lies, its shape, and the precision it is run in.

    Attributes:
        path: folder with ``config.json`` and ``*.safetensors``.
        dtype: of weights, activations and KV cache.
        max_model_len: longest prompt plus output, tokens.
        load_format: ``"safetensors"``, or ``"dummy"`` for random weights of the right shapes (tests, benchmarks).
        eos_token_ids: tokens that end a generation.
        pooling: of a model that makes embeddings; None for one that generates.
        normalize: embeddings have length 1.
    """

    path: str
    architecture: str
    dtype: DType
    max_model_len: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    pooling: Pooling | None = None
    normalize: bool = False

    @classmethod
    def from_dir(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        load_format: Literal["safetensors", "dummy"] = "safetensors",
    ) -> ModelConfig:
        """Read ``config.json`` (and ``generation_config.json``) of a Hugging Face model folder.

        A folder with sentence-transformers' ``modules.json`` is a model that makes embeddings, pooled as is said there;
        so is one whose architecture is ``LlamaModel``: the last token's, normalised, as in vLLM, if nothing is said.

        ``dtype="auto"`` takes the checkpoint's own. Raises ConfigError when the folder, the architecture, the
        dtype or the length cannot be used.
        """
        folder = Path(path).expanduser()
        raw = _read_json(folder, "config.json")
        architectures = raw.get("architectures") or []
        architecture = next((a for a in architectures if a in SUPPORTED_ARCHITECTURES), None)
        if architecture is None:
            raise ConfigError(
                f"{folder}: architecture {', '.join(architectures) or '(none named in config.json)'} is not supported; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        for name, expected in (("hidden_act", "silu"),):
            if raw.get(name, expected) != expected:
                raise ConfigError(f"{folder}: {name}={raw[name]!r} is not supported; expected {expected!r}")
        if raw.get("quantization_config"):
            raise ConfigError(f"{folder}: quantised checkpoints are not supported; use the unquantised model")
        if load_format == "safetensors" and not list(folder.glob("*.safetensors")):
            raise ConfigError(f"{folder}: no *.safetensors file; convert the checkpoint to safetensors first")
        headless = architecture == "LlamaModel"
        pooling, normalize = read_pooling(folder, default=("last", True) if headless else (None, False))
        try:
            hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
            context = int(raw.get("max_position_embeddings", 2048))
            rope = raw.get("rope_parameters") or {}
            config = cls(
                path=str(folder),
                architecture=architecture,
                dtype=_dtype(dtype, raw),
                max_model_len=context if max_model_len is None else max_model_len,
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_hidden_layers=int(raw["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
                rope_scaling=_rope_scaling(raw.get("rope_scaling") or rope, folder),
                max_position_embeddings=context,
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
                bos_token_id=raw.get("bos_token_id"),
                eos_token_ids=_eos(folder, raw),
                load_format=load_format,
                pooling=pooling,
                normalize=normalize,
            )
        except KeyError as missing:
            raise ConfigError(f"{folder}/config.json lacks {missing}; is it a complete Hugging Face model?") from None
        if not 1 <= config.max_model_len <= context:
            raise ConfigError(
                f"max_model_len={config.max_model_len} does not fit the model; "
                f"use 1 to {context} (max_position_embeddings)"
            )
        if heads % config.num_key_value_heads:
            raise ConfigError(
                f"{folder}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={config.num_key_value_heads}"
            )
        return config

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether a prompt's computed beginning is enough; a mean needs every token's hidden state."""
        return self.pooling in (None, "last")

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


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
ExecutorName = Literal["uniproc", "ray", "k8s"]
EXECUTOR_NAMES: tuple[str, ...] = ("uniproc", "ray", "k8s")


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the workers run and how long to wait for them.

    Attributes:
        name: ``"uniproc"`` (this process), ``"ray"`` or ``"k8s"``.
        ray_address: a running Ray cluster (``"auto"`` or ``"host:port"``); None starts a small local one.
        k8s_workers: addresses of ``lightvllm worker`` servers, ``"host:port"``, in rank order; empty starts local
            worker processes.
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


def _tp_fits(model: ModelConfig, tp: int) -> bool:
    kv = model.num_key_value_heads
    return model.num_attention_heads % tp == 0 and model.intermediate_size % tp == 0 and (kv % tp == 0 or tp % kv == 0)


def _one_of(numbers: list[int]) -> str:
    *most, last = [str(n) for n in numbers]
    return f"{', '.join(most)} or {last}" if most else last


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model folder; give a local Hugging Face folder or a model's name")
    try:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {name}; expected a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{folder / name}: not valid JSON: {broken}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{folder / name}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _dtype(asked: str, raw: dict[str, Any]) -> DType:
    name = asked
    if asked == "auto":
        name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    for known in ("float32", "bfloat16", "float16"):
        if name == known:
            return known
    raise ConfigError(f"dtype={name!r} is not supported; use {', '.join(DTYPE_BYTES)} or auto")


def _rope_scaling(raw: dict[str, Any], folder: Path) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type")
    if kind in (None, "default"):
        return None
    try:
        return msgspec.convert({k: v for k, v in raw.items() if k != "type"} | {"rope_type": kind}, RopeScaling)
    except msgspec.ValidationError as wrong:
        raise ConfigError(
            f"{folder}: rope_scaling {raw} is not supported ({wrong}); supported: llama3, linear"
        ) from None


def _eos(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = _read_json(folder, "generation_config.json") if (folder / "generation_config.json").exists() else {}
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)

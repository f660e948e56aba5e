"""The options of ``LLM`` and ``AsyncLLM``, and the configuration that they make.

``Options`` declares each with its type and default; ``LLM.__init__`` lists the same ones, for its readers. Options are
checked here and nowhere else. Reads the model's folder (from the hub, if that is where it is); starts nothing.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import msgspec

from lightvllm.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ExecutorConfig,
    ExecutorName,
    KubernetesTransport,
    ModelConfig,
    ParallelConfig,
    PipelineTransport,
    SchedulerConfig,
)
from lightvllm.errors import ConfigError

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {f"{p}{i}b": b**n for n, p in enumerate("kmgt", 1) for i, b in (("", 1000), ("i", 1024))}


class Configured(NamedTuple):
    """What the options of a model come to. ``path`` is its folder."""

    engine: EngineConfig
    executor: ExecutorConfig
    path: Path


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Every option but the model; ``LLM`` says what each means. Made by ``check``."""

    executor: ExecutorName = "uniproc"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pp_transport: PipelineTransport = "torch"
    pp_shared_dir: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    skip_tokenizer_init: bool = False
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory: int | str | None = None
    enable_prefix_caching: bool = True
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    async_scheduling: bool | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    attention_backend: Literal["auto", "naive", "sdpa", "paged"] = "auto"
    kernels: Literal["auto", "compiled", "reference"] = "auto"
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    return_logits: bool = False
    ray_address: str | None = None
    k8s_workers: Sequence[str] = ()
    k8s_service: str | None = None
    k8s_pod_prefix: str | None = None
    k8s_gpus_per_pod: int = 1
    k8s_token_file: str | None = None
    k8s_tls_cert: str | None = None
    k8s_tls_key: str | None = None
    k8s_tls_ca: str | None = None
    k8s_transport: KubernetesTransport = "auto"
    strategy: Strategy = "PACK"
    start_timeout: float = 120.0
    rpc_timeout: float = 600.0
    step_timeout: float = 300.0
    env: Mapping[str, str] | None = None

    @classmethod
    def check(cls, given: Mapping[str, Any], beside: Sequence[str] = ()) -> Self:
        """The options given by name.

        ``beside``: names that the caller takes besides, for its message. Raises ConfigError for an unknown name, with
        the one that may have been meant, and for a value of a wrong type.
        """
        hints = typing.get_type_hints(cls)
        for name, value in given.items():
            if name not in cls.__struct_fields__:
                known = ["model", *cls.__struct_fields__, *beside]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ConfigError(f"unknown option {name}; {hint}known: {', '.join(known)}")
            check_type(name, value, hints[name])
        return cls(**given)

    def configure(self, model: str | os.PathLike[str]) -> Configured:
        """The configuration for ``model`` (a folder, a known name or a hub id).

        Raises ConfigError for what cannot be met.
        """
        from lightvllm.hub import resolve

        path = resolve(os.fspath(model))
        engine = EngineConfig(
            model=ModelConfig.from_dir(
                path, dtype=self.dtype, max_model_len=self.max_model_len, load_format=self.load_format
            ),
            parallel=ParallelConfig(
                tensor_parallel_size=self.tensor_parallel_size,
                pipeline_parallel_size=self.pipeline_parallel_size,
                pp_transport=self.pp_transport,
                pp_shared_dir=self.pp_shared_dir,
            ),
            cache=CacheConfig(
                block_size=self.block_size,
                num_blocks=self.num_kv_blocks,
                memory_bytes=_bytes("kv_cache_memory", self.kv_cache_memory),
                enable_prefix_caching=self.enable_prefix_caching,
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                async_scheduling=self.async_scheduling,
            ),
            device=DeviceConfig(
                device=self.device,
                threads=self.threads,
                attention_backend=self.attention_backend,
                kernels=self.kernels,
                gpu_memory_utilization=self.gpu_memory_utilization,
            ),
            seed=self.seed,
            return_logits=self.return_logits,
        )
        executor = ExecutorConfig(
            name=self.executor,
            ray_address=self.ray_address,
            k8s_workers=tuple(self.k8s_workers),
            k8s_service=self.k8s_service,
            k8s_pod_prefix=self.k8s_pod_prefix,
            k8s_gpus_per_pod=self.k8s_gpus_per_pod,
            k8s_token_file=self.k8s_token_file,
            k8s_tls_cert=self.k8s_tls_cert,
            k8s_tls_key=self.k8s_tls_key,
            k8s_tls_ca=self.k8s_tls_ca,
            k8s_transport=self.k8s_transport,
            strategy=self.strategy,
            start_timeout=self.start_timeout,
            rpc_timeout=self.rpc_timeout,
            step_timeout=self.step_timeout,
            env=dict(self.env or {}),
        )
        return Configured(engine, executor, path)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError, saying what is allowed, unless ``value`` is of the type that ``hint`` says."""
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        literal = typing.get_origin(hint) is Literal
        choices = " or ".join(map(repr, typing.get_args(hint)))
        allowed = choices if literal else f"a value of type {_type_name(hint)}"
        raise ConfigError(f"{name}={value!r} is not allowed; use {allowed}") from None


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("collections.abc.", "")


def _bytes(name: str, size: int | str | None) -> int | None:
    """``"1.5GiB"`` as a number of bytes."""
    if not isinstance(size, str):
        return size
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ConfigError(f"{name}={size!r} is no size; use a number of bytes, or one with a unit such as '2GiB'")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])

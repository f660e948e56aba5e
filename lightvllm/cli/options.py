"""Options that several sub-commands share, each declared once.

``EngineOptions`` is a dataclass whose fields are typer options; ``@with_engine_options()`` puts them on a command that
has a parameter ``engine: EngineOptions``. Knows no engine: the values go to ``LLM`` by name.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lightvllm.errors import ConfigError

Executor = StrEnum("Executor", ["uniproc", "ray", "k8s"])
DType = StrEnum("DType", ["auto", "float32", "bfloat16", "float16"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
AttentionBackend = StrEnum("AttentionBackend", ["auto", "naive", "sdpa", "paged"])
KubernetesTransport = StrEnum("KubernetesTransport", ["auto", "grpc", "direct"])
PipelineTransport = StrEnum("PipelineTransport", ["torch", "grpc", "shared"])
Kernels = StrEnum("Kernels", ["auto", "compiled", "reference"])

_UNITS = {"": 1} | {
    prefix + suffix: base**power for power, prefix in enumerate("KMGT", 1) for suffix, base in (("", 1000), ("I", 1024))
}


def read_chat_template(path: Path | None) -> str | None:
    """The text of ``--chat-template``, if there is one. Raises ConfigError if it cannot be read or is no template."""
    if path is None:
        return None
    from lightvllm.engine.tokenizer import compile_chat_template

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read --chat-template {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--chat-template {path} is no text in UTF-8") from None
    try:
        compile_chat_template(text)
    except ConfigError as error:
        raise ConfigError(f"--chat-template {path}: {error}") from None
    return text


def parse_bytes(text: str) -> int:
    """``"1GiB"``, ``"512 MiB"``, ``"2GB"`` or ``"1048576"`` to bytes; a usage error for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size; write it like 1GiB, 512MiB or 1048576")
    return size


Model = Annotated[
    str,
    typer.Argument(help="A model folder (Hugging Face layout), a known model's name, or a hub id.", metavar="MODEL"),
]

_RAY, _K8S, _ENGINE = "Only with --executor ray", "Only with --executor k8s", "Engine"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is run, whichever executor runs it."""

    dtype: Annotated[
        DType, typer.Option(help="Precision of weights, activations and KV cache.", rich_help_panel=_ENGINE)
    ] = DType.auto
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest prompt plus output, tokens.", show_default="the model's", rich_help_panel=_ENGINE
        ),
    ] = None
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes, metavar="SIZE", help="KV cache per worker, such as 1GiB.", rich_help_panel=_ENGINE
        ),
    ] = None
    num_kv_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV cache in blocks, instead of a size.", rich_help_panel=_ENGINE)
    ] = None
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Compute equal beginnings of prompts once.",
            rich_help_panel=_ENGINE,
        ),
    ] = True
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at a time.", rich_help_panel=_ENGINE)] = (
        64
    )
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens computed in one step.", rich_help_panel=_ENGINE)
    ] = 2048
    async_scheduling: Annotated[
        bool | None,
        typer.Option(
            help="Plan and send each step while the one before runs.",
            show_default="on, with one pipeline stage",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    device: Annotated[Device, typer.Option(help="What the workers compute on.", rich_help_panel=_ENGINE)] = Device.auto
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads per worker; 0 shares the cores out.", rich_help_panel=_ENGINE)
    ] = 0
    attention_backend: Annotated[
        AttentionBackend, typer.Option(help="How attention is computed.", rich_help_panel=_ENGINE)
    ] = AttentionBackend.auto
    kernels: Annotated[
        Kernels,
        typer.Option(
            help="Compiled CPU kernels where they can be built, always (or an error), or torch's operations.",
            rich_help_panel=_ENGINE,
        ),
    ] = Kernels.auto
    pp_transport: Annotated[
        PipelineTransport,
        typer.Option(
            help="How hidden states go from one pipeline stage to the next: torch.distributed, gRPC, or files in a "
            "shared directory.",
            rich_help_panel=_ENGINE,
        ),
    ] = PipelineTransport.torch
    pp_shared_dir: Annotated[
        Path | None,
        typer.Option(
            help="That directory, the same on all hosts; with --pp-transport shared.",
            show_default="memory, on one host",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds until every worker must answer.", rich_help_panel=_ENGINE)
    ] = 120.0
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A running Ray cluster, or 'auto'.",
            show_default="starts a local one",
            rich_help_panel=_RAY,
        ),
    ] = None
    k8s_workers: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT,…",
            help="Running 'lightvllm worker' servers, in rank order.",
            show_default="starts local ones",
            rich_help_panel=_K8S,
        ),
    ] = None
    k8s_service: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[.NAMESPACE][:PORT]",
            help="The headless Service of a StatefulSet whose pods run 'lightvllm worker'; found by DNS.",
            rich_help_panel=_K8S,
        ),
    ] = None
    k8s_pod_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="That StatefulSet's name.",
            show_default="the Service's without -headless",
            rich_help_panel=_K8S,
        ),
    ] = None
    k8s_gpus_per_pod: Annotated[
        int,
        typer.Option(
            min=1,
            help="Workers behind each of those addresses, or in each pod, at consecutive ports ('lightvllm worker "
            "--workers').",
            rich_help_panel=_K8S,
        ),
    ] = 1
    k8s_token_file: Annotated[
        Path | None, typer.Option(help="The token that those servers were started with.", rich_help_panel=_K8S)
    ] = None
    k8s_tls_cert: Annotated[
        Path | None, typer.Option(help="This driver's certificate for mutual TLS, PEM.", rich_help_panel=_K8S)
    ] = None
    k8s_tls_key: Annotated[
        Path | None, typer.Option(help="The key of that certificate, PEM.", rich_help_panel=_K8S)
    ] = None
    k8s_tls_ca: Annotated[
        Path | None, typer.Option(help="The CA that signed the servers' certificates, PEM.", rich_help_panel=_K8S)
    ] = None

    k8s_transport: Annotated[
        KubernetesTransport,
        typer.Option(
            help="What carries calls to workers: a gRPC stream, a socket beside it, or the faster that connects.",
            rich_help_panel=_K8S,
        ),
    ] = KubernetesTransport.auto

    def refuse_unused(self, executors: Collection[str]) -> None:
        """Raise ConfigError for an option of an orchestrator that is not used."""
        for field in fields(self):
            owner = field.name.partition("_")[0]
            if owner in ("ray", "k8s") and getattr(self, field.name) != field.default and owner not in executors:
                option = "--" + field.name.replace("_", "-")
                raise ConfigError(f"{option} is given, but executor {owner} is not used; leave it out, or use {owner}")

    def for_executor(self, executor: str, without: Collection[str] = ()) -> dict[str, Any]:
        """Arguments for ``LLM``: what was given or has a default; those of another orchestrator are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.k8s_workers is not None:
            values["k8s_workers"] = tuple(filter(None, map(str.strip, self.k8s_workers.split(","))))
        return {
            name: str(value) if isinstance(value, StrEnum | Path) else value
            for name, value in values.items()
            if value is not None and name not in without and name.partition("_")[0] not in {"ray", "k8s"} - {executor}
        }


def with_engine_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of ``EngineOptions`` as options, in place of its parameter ``engine``.

    ``defaults`` are this command's own, by field.
    """
    return with_options({"engine": EngineOptions}, **defaults)


def with_options(
    groups: Mapping[str, type[Any]], **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of dataclasses as options, in place of the parameters that are to hold them.

    Args:
        groups: the dataclass for each such parameter; its fields are annotated with typer options.
        defaults: this command's own, by field.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [parameter for parameter in signature.parameters.values() if parameter.name not in groups]
        for group in groups.values():
            hints = get_type_hints(group, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(field.name, field.default),
                    annotation=hints[field.name],
                )
                for field in fields(group)
            ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            held = {
                name: group(**{field.name: values.pop(field.name) for field in fields(group)})
                for name, group in groups.items()
            }
            command(**held, **values)

        # typer asks both for what it is to parse, and would follow __wrapped__ to the function inside.
        del with_options.__wrapped__
        with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate

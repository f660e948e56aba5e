"""``lightvllm manifest``: an ``LLMInference`` as YAML, or the objects that it becomes. Talks to no cluster."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightvllm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from lightvllm.operator.planner import Needed

EngineName = StrEnum("EngineName", ["lightvllm", "vllm", "sglang", "custom"])

_API_KEY_ENTRY = "api-key"


def manifest(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE|MODEL",
            help="A YAML file with an LLMInference (- reads standard input), or a model's name or hub id.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Start from a template instead; see: lightvllm templates.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what it becomes: StatefulSets, Services and so on.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="metadata.name.", show_default="made from the model's")] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="metadata.namespace.", show_default="none")
    ] = None,
    engine: Annotated[EngineName | None, typer.Option(help="What serves the model.", show_default="lightvllm")] = None,
    image: Annotated[str | None, typer.Option(help="The container image.", show_default="the engine's")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", help="Workers that share each layer.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option("--pipeline-parallel-size", "-pp", help="Stages that the layers are split into.")
    ] = None,
    gpus_per_pod: Annotated[
        int | None, typer.Option(help="Workers of one pod.", show_default="tensor-parallel-size")
    ] = None,
    gpu_resource: Annotated[
        str | None,
        typer.Option(
            help="The resource that a GPU is asked for by; '' for workers that compute on the CPU.",
            show_default="nvidia.com/gpu",
        ),
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Groups, each of which holds the whole model.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus output, tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that a group runs at a time.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    api_key_secret: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[/ENTRY]",
            help="The Secret with the key that requests must bring.",
            show_default="for a MODEL or template: metadata.name with -api-key, /api-key",
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option("--allow-unauthenticated", help="Serve everybody whom the network lets through, without a key."),
    ] = False,
    service_monitors: Annotated[
        bool,
        typer.Option("--service-monitors", help="With --plan: the cluster has the Prometheus operator's kinds."),
    ] = False,
) -> None:
    """Print an LLMInference, checked, or with --plan the objects that it becomes: for kubectl apply -f -.

    Options win over what FILE says. Secrets are never made up: those that are needed are named in comments, with the
    commands that make them. There is no operator yet, so that a cluster does nothing with an LLMInference by itself;
    what --plan prints needs none.
    """
    try:
        import pydantic  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtra(missing.name or "pydantic", "operator", "lightvllm manifest") from None
    from lightvllm.operator import text
    from lightvllm.operator.planner import SERVICE_MONITOR
    from lightvllm.operator.planner import plan as make_plan
    from lightvllm.operator.planner.secrets import named

    if service_monitors and not plan:
        raise ConfigError("--service-monitors is for --plan; leave it out, or add --plan")
    if allow_unauthenticated and api_key_secret is not None:
        raise ConfigError("--api-key-secret and --allow-unauthenticated are both given; keep one")
    if (target is None) == (template is None):
        raise ConfigError("give either FILE|MODEL or --template NAME; for the names run: lightvllm templates")
    if template is not None:
        from lightvllm.operator import templates

        target, is_file, document = template, False, templates.get(template).document()
    else:
        assert target is not None
        is_file = target == "-" or target.endswith((".yaml", ".yml", ".json")) or Path(target).is_file()
        document = text.read(content(target), called(target)) if is_file else _document(target)
    given = {
        "servedModelName": served_model_name,
        "tensorParallelSize": tensor_parallel_size,
        "pipelineParallelSize": pipeline_parallel_size,
        "gpusPerPod": gpus_per_pod,
        "gpuResource": gpu_resource,
        "replicas": replicas,
        "maxModelLen": max_model_len,
        "maxNumSeqs": max_num_seqs,
    }
    metadata, spec = _object(document, "metadata", target), _object(document, "spec", target)
    metadata.update(_said(name=name, namespace=namespace))
    spec.update(_said(**given))
    if engine is not None or image is not None:
        _object(spec, "engine", target).update(_said(name=engine and engine.value, image=image))
    _set_access(spec, str(metadata.get("name")), api_key_secret, allow_unauthenticated, default=not is_file)
    inference = text.check(document, called(target) if is_file else "the LLMInference")
    memory = "" if template is None else _memory_comment(template, spec)
    if not plan:
        sys.stdout.write(memory + _secrets_comment(named(inference)) + text.dump([document]))
        return
    if inference.spec.autoscaling is not None:
        raise ConfigError(
            "spec.autoscaling scales the LLMInference, which needs an operator in the cluster, and what --plan prints "
            "is for one without; leave autoscaling out and set replicas"
        )
    made = make_plan(inference, {SERVICE_MONITOR} if service_monitors else ())
    left_out = "".join(f"# Left out: {each}\n" for each in made.left_out)
    sys.stdout.write(memory + _secrets_comment(made.needed) + left_out + text.dump(made.objects))


def content(target: str) -> str:
    """The text of a file, or of standard input for ``-``. Raises ConfigError."""
    try:
        return sys.stdin.read() if target == "-" else Path(target).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {target}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{target} is no text in UTF-8") from None


def called(target: str) -> str:
    """How errors call it."""
    return "standard input" if target == "-" else target


def _document(model: str) -> dict[str, Any]:
    """The LLMInference of ``model`` with nothing said but that."""
    name = re.sub(r"[^a-z0-9]+", "-", model.rstrip("/").rpartition("/")[2].lower()).strip("-")
    if not name[:1].isalpha():
        name = f"model-{name}".rstrip("-")
    return {
        "apiVersion": "lightvllm.io/v1",
        "kind": "LLMInference",
        "metadata": {"name": name[:40].rstrip("-")},
        "spec": {"model": model},
    }


def _object(document: dict[str, Any], field: str, target: str) -> dict[str, Any]:
    """The object below ``field``, which is made if it is missing."""
    if document.get(field) is None:
        document[field] = {}
    if not isinstance(document[field], dict):
        raise ConfigError(f"{called(target)}: {field} is {document[field]!r}, expected an object")
    found: dict[str, Any] = document[field]
    return found


def _said(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _set_access(spec: dict[str, Any], name: str, secret: str | None, unauthenticated: bool, *, default: bool) -> None:
    """A key is what a model gets unless somebody says that it needs none."""
    if unauthenticated:
        spec.pop("apiKey", None)
        spec["allowUnauthenticated"] = True
    elif secret is not None or default:
        secret_name, _, entry = (secret or f"{name}-{_API_KEY_ENTRY}").partition("/")
        spec.pop("allowUnauthenticated", None)
        spec["apiKey"] = {"name": secret_name, "key": entry or _API_KEY_ENTRY}


def _memory_comment(name: str, spec: dict[str, Any]) -> str:
    """Whether the template, as options have changed it, fits what it is for. That it does not is no error: there may be
    larger GPUs."""
    from lightvllm.operator import memory, templates

    found = templates.get(name).fit(spec=spec)
    try:
        memory.check(found)
    except ConfigError as why:
        return f"# Not for what the template {name} is for: {why}\n"
    return (
        f"# Fits {found.tensor * found.pipeline} {found.device.kind}(s) of {memory.gib(found.device.memory)}: room for "
        f"{found.tokens:,} tokens; see: lightvllm templates show {name}\n"
    )


def _secrets_comment(secrets: list[Needed]) -> str:
    if not secrets:
        return ""
    lines = ["# Needs these Secrets, which must be made first:"]
    for secret in secrets:
        lines.append(f"#   {secret.name}: {secret.what}")
        lines += [f"#     {command}" for command in secret.commands]
    return "\n".join(lines) + "\n"

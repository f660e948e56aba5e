"""``lightvllm templates``: ready LLMInferences for common models, and whether a model fits. Talks to no cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lightvllm.cli.terminal import stdout
from lightvllm.errors import ConfigError, MissingExtra

app = typer.Typer(
    help="Ready LLMInferences for common models with the arithmetic of their memory; without a command, a list.",
    invoke_without_command=True,
)

GpuMemory = Annotated[float, typer.Option(help="GiB of a GPU, as nvidia-smi says.", min=0.1)]
Utilization = Annotated[
    float,
    typer.Option("--gpu-memory-utilization", help="The part of a GPU's memory that the engine uses.", min=0.01, max=1),
]


@app.callback()
def list_(context: typer.Context) -> None:
    """The templates."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    templates = _templates()
    table = Table("name", "engine", "tp × pp", "each has", "context", "sequences", "what it is", box=None)
    for template in templates.TEMPLATES.values():
        found = template.fit()
        engine = template.spec.get("engine", {}).get("name", "lightvllm")
        device = f"{found.device.memory >> 30} GiB"
        layout, length = f"{found.tensor} × {found.pipeline}", f"{found.model.max_model_len:,}"
        table.add_row(template.name, engine, layout, device, length, str(found.sequences), template.summary)
    stdout().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A template; see: lightvllm templates.")],
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="GiB of other GPUs than those it is for.", min=0.1, show_default="the template's"),
    ] = None,
) -> None:
    """Print a template's LLMInference, and in comments what it needs and how its memory comes about.

    Fails, naming the smallest layout that fits, if it does not fit GPUs of --gpu-memory. What is printed says nothing
    of who may use the model: lightvllm manifest --template NAME adds that.
    """
    from dataclasses import replace

    from lightvllm.operator import memory

    template = _templates().get(name)
    from lightvllm.operator import text  # needs PyYAML

    device = template.device
    if gpu_memory is not None:
        if template.spec.get("gpuResource") == "":
            raise ConfigError(f"template {name} computes on a CPU; leave --gpu-memory out")
        device = replace(device, memory=int(gpu_memory * memory.GIB))
    found = template.fit(device)
    memory.check(found)
    comments = [template.summary, *(f"Needs: {note}" for note in template.notes), "", *memory.lines(found)]
    typer.echo("".join(f"# {line}".rstrip() + "\n" for line in comments) + text.dump([template.document()]), nl=False)


@app.command()
def fit(
    model_folder: Annotated[str, typer.Argument(help="A Hugging Face model folder, a known model or a hub id.")],
    gpu_memory: GpuMemory,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", help="Workers that share each layer.", min=1)
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", help="Stages that the layers are split into.", min=1)
    ] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt plus output, tokens.", min=1, show_default="the model's")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that run at a time.", min=1)] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the model's own.")] = "auto",
    gpu_memory_utilization: Utilization = 0.9,
) -> None:
    """Show the memory of a model's weights and KV cache on each GPU, and how many tokens it holds.

    Fails, naming the smallest layout that fits, if one sequence of --max-model-len tokens has no room. Of the folder
    only config.json is read.
    """
    from lightvllm import hub
    from lightvllm.operator import memory

    model = memory.read(hub.resolve(model_folder), dtype=dtype, max_model_len=max_model_len)
    device = memory.Device(int(gpu_memory * memory.GIB), gpu_memory_utilization)
    found = memory.fit(model, tensor_parallel_size, pipeline_parallel_size, device, max_num_seqs)
    memory.check(found)
    typer.echo("\n".join(memory.lines(found)))


def _templates() -> Any:
    """The catalogue, whose kind is pydantic's."""
    try:
        import pydantic  # noqa: F401
        import yaml  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtra(missing.name or "pydantic", "operator", "lightvllm templates") from None
    from lightvllm.operator import templates

    return templates

"""``lightvllm models``: get the models that lightvllm knows, and see, find or remove them."""

from __future__ import annotations

from typing import Annotated

import typer

from lightvllm.cli.terminal import stdout

app = typer.Typer(help="Get, list and remove models.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A known model; see: lightvllm models list.")]


@app.command("get")
def get_(
    name: Name,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the download.", min=1)] = 1800.0,
) -> None:
    """Download a model, convert it and check it. Does nothing when it is there and whole."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from lightvllm import hub

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task, said = progress.add_task(name, total=None), ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal said
            if what != said and not progress.console.is_terminal:
                progress.console.print(what, highlight=False, soft_wrap=True)
            said = what
            progress.update(task, description=what, completed=done, total=total or None)

        folder, fetched = hub.get(name, report, timeout=timeout)
        progress.update(task, description="done" if fetched else "already there", completed=1, total=1)
    typer.echo(folder)


@app.command("list")
def list_() -> None:
    """The known models, and which of them are here."""
    from rich.table import Table

    from lightvllm import hub

    table = Table("name", "here", "size", "licence", "what it is", box=None)
    for model in hub.KNOWN_MODELS.values():
        here = "yes" if hub.installed(model.name) else "no"
        table.add_row(model.name, here, f"{model.size / 1e6:.0f} MB", model.licence, model.summary)
    stdout().print(table)


@app.command()
def path(name: Name) -> None:
    """Print a model's folder; fails when the model is not here."""
    from lightvllm import hub

    hub.model_dir(name)  # an unknown name is refused here, a folder of that name notwithstanding
    typer.echo(hub.resolve(name))


@app.command("rm")
def remove(name: Name) -> None:
    """Delete a model's folder."""
    from lightvllm import hub

    typer.echo(f"{name}: removed" if hub.remove(name) else f"{name}: was not here")

"""``lightvllm kernels``: compile the CPU kernels ahead of time, and say which kernels run here."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Compile the CPU kernels, or say which kernels run here.", no_args_is_help=True)


@app.command()
def build(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the compiler's command and its output.")] = False,
) -> None:
    """Compile the CPU kernels for this machine, unless the cache has them; print the library's path."""
    from lightvllm.kernels import build

    typer.echo(build.build(verbose=verbose))


@app.command()
def info() -> None:
    """Say which kernels this machine runs, and why; compiles them if need be."""
    from lightvllm import kernels

    chosen = kernels.use("auto")
    typer.echo(f"kernels  {'compiled' if chosen.compiled else 'reference'}")
    typer.echo(f"reason   {chosen.reason}")
    typer.echo(f"library  {chosen.library or '-'}")

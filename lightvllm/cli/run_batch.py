"""``lightvllm run-batch``: answer a file of requests, and go on where an earlier run was broken off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightvllm.cli.options import EngineOptions, Executor, read_chat_template, with_engine_options
from lightvllm.cli.terminal import status
from lightvllm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from lightvllm.server.batch import Counts

_LINE_SECONDS = 10.0
"""Between two lines that tell the progress where there is no terminal."""


@with_engine_options()
def run_batch(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="Requests in OpenAI's batch format, one JSON object per line.")
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUTPUT", help="Where answers are appended; what it answers already is left."),
    ],
    engine: EngineOptions,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model folder, a known model's name, or a hub id.", metavar="MODEL")
    ],
    executor: Annotated[Executor, typer.Option(help="Where the workers run.")] = Executor.uniproc,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Workers that share each layer.")
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages that the layers are split into.")
    ] = 1,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What requests call the model; may be repeated.", show_default="MODEL as given"),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja chat template.", show_default="the model's")
    ] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="How the model writes tool calls.", show_default="by the chat template")
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests that are given to the engine at a time.", show_default="twice --max-num-seqs"
        ),
    ] = None,
    sync_seconds: Annotated[
        float, typer.Option(min=0.01, help="Seconds of answers that a crash of the machine may cost.")
    ] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, although OUTPUT has answers.")] = False,
) -> None:
    """Answer the requests of INPUT with a model, without a server.

    Ctrl-C, or worse, costs only what was running: the same command goes on.
    """
    try:
        import fastapi  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtra(missing.name or "fastapi", "server", "lightvllm run-batch") from None
    from lightvllm.server.batch import Batch
    from lightvllm.server.settings import ServerSettings
    from lightvllm.server.tools import check_format

    check_format(tool_call_parser)
    engine.refuse_unused([executor])
    names = tuple(served_model_name or [model])
    if not all(names):
        raise ConfigError("--served-model-name is empty; give a name, or leave it out")
    settings = ServerSettings(
        served_model_names=names, chat_template=read_chat_template(chat_template), tool_call_parser=tool_call_parser
    )
    with Batch(source, target, names[0], overwrite=overwrite) as batch:
        if batch.counts.before:
            typer.echo(f"{batch.counts.before} of {batch.counts.total} are answered already", err=True)
        if batch.counts.before == batch.counts.total:
            return

        started = time.perf_counter()

        async def answer() -> None:
            nonlocal started
            from lightvllm.engine.async_llm import AsyncLLM

            with status() as progress:
                llm = await AsyncLLM.create(
                    model,
                    executor=executor.value,
                    tensor_parallel_size=tensor_parallel_size,
                    pipeline_parallel_size=pipeline_parallel_size,
                    progress=progress,
                    **engine.for_executor(executor),
                )
            started = time.perf_counter()
            try:
                with shown(batch.counts) as show:
                    await batch.run(
                        llm,
                        settings,
                        max_concurrency=max_concurrency or 2 * engine.max_num_seqs,
                        sync_seconds=sync_seconds,
                        on_progress=show,
                    )
            finally:
                await llm.shutdown()

        try:
            number = asyncio.run(_until_signal(answer))
        finally:
            typer.echo(_summary(batch.counts, time.perf_counter() - started), err=True)
    if number is not None:
        raise typer.Exit(128 + number)


async def _until_signal(work: Callable[[], Awaitable[None]]) -> int | None:
    """Do the work; the number of the signal that ended it. The handlers of ``main`` would raise in whatever runs just
    then, a request among many; here the work is cancelled. A second signal is ignored, a third ends the process."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()
        elif len(received) == 2:
            typer.echo("still shutting down; once more ends it by force", err=True)
        else:
            os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        await asyncio.wait({task})
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    if task.cancelled():
        return received[0]
    task.result()
    return None


@contextlib.contextmanager
def shown(counts: Counts) -> Iterator[Callable[[Counts], None]]:
    """A function that shows the progress on stderr: a bar on a terminal, otherwise a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console.file.write)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(_said(counts), total=counts.total, completed=counts.before)
        yield lambda now: bar.update(task, completed=now.before + now.done, description=_said(now))


def _lines(write: Callable[[str], object]) -> Callable[[Counts], None]:
    told = time.monotonic()

    def show(counts: Counts) -> None:
        nonlocal told
        if time.monotonic() - told >= _LINE_SECONDS:
            told = time.monotonic()
            write(f"{counts.before + counts.done} of {counts.total}{_said(counts)}\n")

    return show


def _said(counts: Counts) -> str:
    return f", {counts.failed} with an error" if counts.failed else ""


def _summary(counts: Counts, seconds: float) -> str:
    answered = counts.before + counts.done
    speed = f"{counts.tokens} tokens, {seconds:.1f} s, {counts.tokens / seconds:.1f} tokens/s"
    rest = "" if answered == counts.total else "; the same command goes on"
    return f"{answered} of {counts.total} are answered{_said(counts)} ({counts.done} now: {speed}){rest}"

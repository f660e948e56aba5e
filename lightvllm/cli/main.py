"""The ``lightvllm`` command: assembles the sub-commands, and turns what ends them into a line and an exit status.

Exit status: 0 done · 1 an error, said in one line on stderr · 2 wrong usage · 130 Ctrl-C · 143 SIGTERM · 141 nobody
reads our output any more. ``--debug`` adds tracebacks and may stand before or after the sub-command.

Importing this module, and so ``--help`` and ``--version``, imports no torch, ray, grpc or transformers: the
sub-commands import what they need when they are called.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from lightvllm.cli import (
    certs,
    convert,
    doctor,
    generate,
    kernels,
    manifest,
    models,
    parity,
    router,
    run_batch,
    serve,
    templates,
    vllm,
    worker,
)
from lightvllm.errors import LightvllmError, WorkerError
from lightvllm.version import __version__

# click's base of all usage errors, which typer exports only by way of its descendants.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: an orderly end like Ctrl-C, with another exit status."""


@contextlib.contextmanager
def _ends_with_status() -> Iterator[None]:
    try:
        yield
    except _Terminated:
        raise typer.Exit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        raise typer.Exit(_no_reader()) from None


class _Group(TyperGroup):
    """Catches what a sub-command raises before typer does, which would give it another exit status."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _ends_with_status():  # --help and --version write to stdout here
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _ends_with_status():
            return super().invoke(ctx)


app = typer.Typer(
    name="lightvllm",
    cls=_Group,
    help="LLM workers under Ray or plain Kubernetes behind one executor, and a small LLaMA engine on top.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("router")(router.router)
app.command("run-batch")(run_batch.run_batch)
app.command("parity")(parity.parity)
app.command("worker")(worker.worker)
app.command("certs")(certs.certs)
app.command("manifest")(manifest.manifest)
app.command("convert")(convert.convert)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(kernels.app, name="kernels")
app.add_typer(templates.app, name="templates")
app.add_typer(vllm.app, name="vllm")


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"lightvllm {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what local workers print.")] = False,
) -> None:
    """Options of the command itself; both have been acted upon when a sub-command starts."""


def main(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status. Everything that goes wrong is said on stderr."""
    before_dashes = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in before_dashes
    given = [a for a in before_dashes if a != "--debug"] + list(arguments[len(before_dashes) :])
    try:
        with _signals():
            status = typer.main.get_command(app).main(args=given, prog_name="lightvllm", standalone_mode=False)
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        return _no_reader()
    except _UsageError as wrong:
        command = wrong.ctx.command_path if getattr(wrong, "ctx", None) else "lightvllm"
        if message := wrong.format_message():
            _say(f"{message.rstrip('.')}; run: {command} --help")
        else:  # no arguments at all: the help has been printed
            return 2
        return int(wrong.exit_code)
    except LightvllmError as error:
        _say(str(error))
        if debug:
            traceback.print_exc()
            if isinstance(error, WorkerError):
                print(error.remote_traceback, file=sys.stderr)  # noqa: T201
        return 1
    except Exception as error:  # noqa: BLE001  a defect of ours: one line too, unless its traceback is asked for
        _say(f"internal error: {type(error).__name__}: {error}" + ("" if debug else "; run with --debug for details"))
        if debug:
            traceback.print_exc()
        return 1


def run() -> NoReturn:
    """The console script."""
    if "--debug" in sys.argv:
        os.environ.setdefault("LIGHTVLLM_DEBUG", "1")  # read where local workers are started
    sys.exit(main(sys.argv[1:]))


def _no_reader() -> int:
    """What is still buffered can no longer be written: let the flush at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _say(message: str) -> None:
    print("error: " + "; ".join(filter(None, map(str.strip, message.splitlines()))), file=sys.stderr)  # noqa: T201


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT start an orderly end. A second one is ignored, so that it cannot cut the end short and leave
    workers behind; the third ends the process at once."""
    received = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received == 1:
            raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if received == 2:
            os.write(2, b"\nstill shutting down; once more ends it by force\n")
            return
        os._exit(128 + number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

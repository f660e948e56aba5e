"""``lightvllm vllm``: what of the environment reaches vLLM's workers, and whether vLLM can use our executors here."""

from __future__ import annotations

import contextlib
import json as json_
import os
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightvllm.cli.doctor import require_executor
from lightvllm.cli.terminal import status, stdout
from lightvllm.errors import ConfigError, LightvllmError

if TYPE_CHECKING:
    from lightvllm.adapters.vllm.environment import Decision

app = typer.Typer(
    help="Unmodified vLLM on our executors: what its workers get, and what is missing.", no_args_is_help=True
)

_NO_VLLM = "vLLM is not installed here"


@app.command()
def env(
    additional_config: Annotated[
        str | None,
        typer.Option(
            metavar="JSON", help='What vLLM is given, such as \'{"lightvllm": {"env_include": ["HF_TOKEN"]}}\'.'
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also the variables that nothing speaks of, which stay.")] = False,
    values: Annotated[bool, typer.Option("--values", help="Show values too, but never those of secrets.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say which of the variables set here would reach workers on other machines, in other pods or under Ray, and why.

    Worker processes that KubernetesExecutor starts on this machine inherit all of them. What a worker's own environment
    has is not overwritten, except by variables given in 'env'.
    """
    from lightvllm.adapters.vllm.environment import decide, registered_by_vllm
    from lightvllm.adapters.vllm.settings import load_settings

    settings = load_settings(_parse(additional_config), os.environ)
    registered = registered_by_vllm()
    decisions = [each for each in decide(os.environ, registered or (), settings) if each.touched or all_]
    shown = {**os.environ, **settings.env} if values else {}
    if json:
        typer.echo(json_.dumps([_as_json(decision, shown) for decision in decisions], indent=2))
    else:
        _print(decisions, shown, values)
    if registered is None:
        typer.echo(f"{_NO_VLLM}: of the names that it registers, only those with a known beginning are told", err=True)


@app.command()
def check(
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what is installed here, and whether vLLM can use our executors; exit status 1 if it can use none.

    Imports vLLM, which takes a while.
    """
    with status() as progress:
        found = examine(progress)
    if json:
        typer.echo(json_.dumps(found, indent=2))
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, version in found["versions"].items():
            table.add_row(name, version or "not installed")
        table.add_row("supported", Text(found["warning"] or "yes"))
        table.add_row("plug-in", Text(found["plugin"]))
        for name, answer in found["executors"].items():
            table.add_row(name, Text(answer))
        stdout().print(table)
    if all(answer != "can be used" for answer in found["executors"].values()):
        raise typer.Exit(1)


def examine(progress: Any = lambda _: None) -> dict[str, Any]:
    """Everything that ``check`` says, as JSON values."""
    import msgspec

    from lightvllm.adapters.vllm.settings import CLASSES
    from lightvllm.adapters.vllm.versions import local_versions, warn_unless_supported

    progress("looking at the installed packages")
    versions = local_versions()
    progress("importing vLLM")
    return {
        "versions": msgspec.structs.asdict(versions),
        "warning": warn_unless_supported(versions.vllm) if versions.vllm else _NO_VLLM,
        "plugin": _plugin(),
        "executors": {name: _why_not(backend, name) or "can be used" for backend, name in CLASSES.items()},
    }


def _plugin() -> str:
    for point in metadata.entry_points(group="vllm.general_plugins"):
        if point.value.startswith("lightvllm.adapters.vllm"):
            chosen = os.environ.get("VLLM_PLUGINS")
            if chosen is not None and point.name not in chosen.split(","):
                return f"registered, but VLLM_PLUGINS={chosen} leaves it out; add {point.name}"
            return "registered"
    return "not registered, which pipelines need where the executor is given by name; run: pip install lightvllm"


def _why_not(backend: str, name: str) -> str | None:
    """Why vLLM cannot use the executor, in one line; None if it can."""
    import lightvllm.adapters.vllm

    try:
        require_executor(backend)
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs what it finds
            getattr(lightvllm.adapters.vllm, name)
    except LightvllmError as error:
        return f"cannot be used: {error}"
    except Exception as error:  # noqa: BLE001  whatever another package's import raises, it is what is to be told
        first = next(iter(str(error).splitlines()), "")
        return f"cannot be used: importing it raises {type(error).__name__}: {first}"
    return None


def _parse(additional_config: str | None) -> object:
    if additional_config is None:
        return {}
    try:
        parsed = json_.loads(additional_config)
    except ValueError as error:
        raise ConfigError(f"--additional-config is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError("--additional-config must be a JSON object, such as '{\"lightvllm\": {}}'")
    return parsed


def _as_json(decision: Decision, shown: dict[str, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": decision.name, "reaches": decision.reaches, "why": decision.why}
    if decision.name in shown:
        fields["value"] = None if decision.secret else shown[decision.name]
    return fields


def _print(decisions: list[Decision], shown: dict[str, str], values: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if not decisions:
        typer.echo("no variable that is set here reaches the workers, and none is kept from them")
        return
    table = Table("variable", "reaches workers", "why", box=None, pad_edge=False)
    if values:
        table.add_column("value", overflow="fold")
    for decision in decisions:
        row = [Text(decision.name), "yes" if decision.reaches else "no", Text(decision.why)]
        if values:
            row.append(Text("(secret)" if decision.secret else shown[decision.name]))
        table.add_row(*row)
    stdout().print(table)

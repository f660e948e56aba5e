"""``lightvllm serve``: OpenAI's API over one model, from the command line or a file of the same options."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightvllm.cli.options import EngineOptions, Executor, Model, with_options
from lightvllm.cli.serve_options import API_KEY_VARIABLE, ListenOptions, LogLevel, ServerOptions
from lightvllm.cli.terminal import status
from lightvllm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from lightvllm.engine.protocol import EngineClient


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the options that are not given."""
    if path is None or context.resilient_parsing:
        return path
    try:
        import yaml
    except ModuleNotFoundError:
        raise MissingExtra("pyyaml", "server", "--config") from None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold a mapping of option names to values, such as 'port: 8000'")
    names = {
        option.lstrip("-"): parameter.name
        for parameter in context.command.params
        for option in [*parameter.opts, *parameter.secondary_opts, parameter.name or ""]
        if parameter.name != "config"
    }
    several = {parameter.name for parameter in context.command.params if getattr(parameter, "multiple", False)}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(str(key))
        if name is None:
            raise ConfigError(f"--config {path}: {key!r} is no option of lightvllm serve; run: lightvllm serve --help")
        if isinstance(value, dict) or (isinstance(value, list) and name not in several):
            raise ConfigError(f"--config {path}: {key} is given {value!r:.60}; expected one value")
        # As text, as the command line gives it; only switches are read from true and false.
        told = [
            item if isinstance(item, bool) else str(item) for item in (value if isinstance(value, list) else [value])
        ]
        defaults[name] = told if name in several else told[0]
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


@with_options({"engine": EngineOptions, "listen": ListenOptions, "server": ServerOptions})
def serve(
    model: Model,
    engine: EngineOptions,
    listen: ListenOptions,
    server: ServerOptions,
    executor: Annotated[Executor, typer.Option(help="Where the workers run.")] = Executor.uniproc,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Workers that share each layer.")
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages that the layers are split into.")
    ] = 1,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of options by name; the command line wins.",
            callback=_read_config,
            is_eager=True,
            show_default=False,
        ),
    ] = None,
    engine_process: Annotated[
        bool,
        typer.Option(
            "--engine-process/--no-engine-process",
            help="Run the engine in a process of its own, so that no request delays its steps.",
        ),
    ] = True,
    max_num_waiting: Annotated[
        int,
        typer.Option(
            min=0, help="Requests that may wait for the engine; more are told to come again.", rich_help_panel="Limits"
        ),
    ] = 1024,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that requests may take to finish after Ctrl-C or SIGTERM.", rich_help_panel="Limits"
        ),
    ] = 30.0,
    exit_on_engine_failure: Annotated[
        bool,
        typer.Option(
            "--exit-on-engine-failure",
            help="End with status 1 when the engine fails, instead of answering 503 from then on.",
        ),
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option(help="The least important lines that are logged.", rich_help_panel="Logs and traces")
    ] = LogLevel.info,
) -> None:
    """Serve MODEL by OpenAI's API until Ctrl-C or SIGTERM.

    Listens at once, and answers 503 until the model is loaded. The first signal lets requests finish, a second ends
    them, a third ends the process by force.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtra(missing.name or "fastapi", "server", "lightvllm serve") from None
    from lightvllm.server.app import create_app
    from lightvllm.server.listen import bind, tls_context, url
    from lightvllm.server.logging import configure_logging
    from lightvllm.server.run import Progress, run

    engine.refuse_unused([executor])
    settings = server.settings(model, os.environ.get(API_KEY_VARIABLE))
    where = listen.settings()
    tls = tls_context(where)
    configure_logging(settings.log_format, log_level.value)  # type: ignore[arg-type]
    app = create_app(None, settings)
    listener = bind(where, authenticated=bool(settings.api_keys) or where.ssl_cert_reqs == 2)
    address = url(listener, tls=tls is not None)
    typer.echo(f"listening on {address}; loading {model}")
    started = time.perf_counter()

    async def start_engine(progress: Progress) -> EngineClient:
        from lightvllm.engine.async_llm import AsyncLLM

        return await AsyncLLM.create(
            model,
            executor=executor.value,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            engine_process=engine_process,
            max_num_waiting=max_num_waiting,
            progress=progress,
            **engine.for_executor(executor),
        )

    def on_ready(client: EngineClient) -> None:
        starting.close()
        layout = f"tensor parallel {tensor_parallel_size}, pipeline parallel {pipeline_parallel_size}"
        seconds = time.perf_counter() - started
        typer.echo(f"ready: {settings.served_model_names[0]} on {address} ({executor}, {layout}, {seconds:.1f} s)")

    with contextlib.ExitStack() as starting:
        number = run(
            app,
            listener,
            where,
            start_engine,
            tls=tls,
            shutdown_timeout=shutdown_timeout,
            exit_on_engine_failure=exit_on_engine_failure,
            on_progress=starting.enter_context(status()),
            on_ready=on_ready,
            on_stop=lambda what: typer.echo(what, err=True),
        )
    raise typer.Exit(128 + number)

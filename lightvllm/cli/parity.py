"""``lightvllm parity``: the same model under several executors and layouts, compared token by token and bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightvllm.cli.options import DType, EngineOptions, Model, with_engine_options
from lightvllm.cli.terminal import status, stdout


@with_engine_options(dtype=DType.float32)
def parity(
    model: Model,
    engine: EngineOptions,
    executors: Annotated[str, typer.Option(help="Which to compare, separated by commas.")] = "uniproc,ray,k8s",
    layouts: Annotated[str, typer.Option(help="TPxPP, separated by commas; uniproc takes part in 1x1.")] = "1x1",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="One prompt per line, or .jsonl with strings or messages.", show_default="8 that are shipped"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens for each prompt at most.")] = 32,
    reference: Annotated[str, typer.Option(help="'transformers', or 'none'.")] = "transformers",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each executor in each layout.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page to this file.")] = None,
) -> None:
    """Run MODEL under several executors and layouts and compare what they say.

    Exit status 1 when anything differs; the first place of each difference is named.
    """
    from lightvllm.cli.doctor import require_executor
    from lightvllm.errors import ConfigError
    from lightvllm.parity import report
    from lightvllm.parity.prompts import default_prompts, read_prompts
    from lightvllm.parity.run import Plan, parse_executors, parse_layouts, run_parity

    chosen = parse_executors(executors)
    for executor in chosen:
        require_executor(executor)
    engine.refuse_unused(chosen)
    for file in filter(None, (json, html)):
        if not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: its folder does not exist; make it, or give another file")
    plan = Plan(
        model=model,
        executors=chosen,
        layouts=parse_layouts(layouts),
        prompts=read_prompts(prompts) if prompts else default_prompts(),
        max_tokens=max_tokens,
        dtype=str(engine.dtype),
        max_model_len=engine.max_model_len,
        reference=reference,
        repeat=repeat,
        threads=engine.threads,
        options={
            executor: engine.for_executor(executor, without=("dtype", "max_model_len", "threads"))
            for executor in chosen
        },
    )
    with status() as progress:
        found = run_parity(plan, progress)
    report.print_report(found, stdout())
    try:
        if json:
            json.write_bytes(report.to_json(found))
        if html:
            html.write_text(report.to_html(found), encoding="utf-8")
    except OSError as failed:
        raise ConfigError(f"cannot write the report: {failed}; give another file") from None
    if not found.identical:
        raise typer.Exit(1)

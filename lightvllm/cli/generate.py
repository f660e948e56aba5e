"""``lightvllm generate``: complete prompts or answer messages, and show the text as it comes."""

from __future__ import annotations

import json as json_
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightvllm.cli.options import EngineOptions, Executor, Model, with_engine_options
from lightvllm.cli.terminal import status
from lightvllm.errors import ConfigError

if TYPE_CHECKING:
    from lightvllm.engine.llm import LLM
    from lightvllm.engine.outputs import RequestOutput
    from lightvllm.parity.prompts import Prompt

_SAMPLING = "Sampling"


@with_engine_options()
def generate(
    model: Model,
    engine: EngineOptions,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to complete; may be given several times.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One prompt per line, .jsonl with strings or messages, or - for stdin.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts to the model as a user's messages.")] = False,
    system: Annotated[str | None, typer.Option(help="The system message; with --chat.")] = None,
    executor: Annotated[Executor, typer.Option(help="Where the workers run.")] = Executor.uniproc,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="Workers that share each layer.")
    ] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages that the layers are split into.")
    ] = 1,
    json: Annotated[bool, typer.Option("--json", help="One JSON object per result instead of text.")] = False,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate at most.", rich_help_panel=_SAMPLING)
    ] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep tokens up to this probability.", rich_help_panel=_SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many tokens; 0 keeps all.", rich_help_panel=_SAMPLING)] = 0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the best.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.", rich_help_panel=_SAMPLING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.", rich_help_panel=_SAMPLING)
    ] = False,
) -> None:
    """Generate text with MODEL.

    Several prompts are computed together and shown one after another. Text goes to stdout, everything else to stderr.
    """
    from lightvllm import LLM, SamplingParams

    prompts = _collect(prompt or [], prompts_file, chat=chat, system=system)
    engine.refuse_unused([executor])
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    with status() as progress:
        llm = LLM(
            model,
            executor=executor.value,  # type: ignore[arg-type]
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            progress=progress,
            **engine.for_executor(executor),
        )
    with llm:
        show = InOrder([p.title for p in prompts], sys.stdout.write, flush=sys.stdout.flush, as_json=json)
        started = time.perf_counter()
        outputs: dict[int, RequestOutput] = {}
        for output in llm.stream(_rendered(prompts, llm), sampling):
            outputs[output.prompt_index] = output
            show(output)
        _summary(list(outputs.values()), time.perf_counter() - started)


class InOrder:
    """Shows streamed outputs in the order of the prompts, although they grow together.

    The first unfinished prompt's text is written as it grows; what later ones have said by then follows when it is
    their turn. With one prompt the text is all there is; with several each has its prompt above it.
    """

    def __init__(
        self,
        titles: list[str],
        write: Callable[[str], object],
        *,
        flush: Callable[[], object] = lambda: None,
        as_json: bool = False,
    ) -> None:
        self._titles = titles
        self._write = write
        self._flush = flush
        self._as_json = as_json
        self._latest: dict[int, RequestOutput] = {}
        self._current = 0
        self._written = -1  # characters of the current prompt's text; -1: not even its head

    def __call__(self, output: RequestOutput) -> None:
        self._latest[output.prompt_index] = output
        while (current := self._latest.get(self._current)) is not None:
            self._show(current)
            if not current.finished:
                break
            self._current += 1
            self._written = -1
        self._flush()

    def _show(self, output: RequestOutput) -> None:
        completion = output.outputs[0]
        if self._as_json:
            if output.finished:
                self._write(json_.dumps(_as_dict(output, self._titles[self._current]), ensure_ascii=False) + "\n")
            return
        if self._written < 0:
            if len(self._titles) > 1:
                gap = "\n" if self._current else ""
                self._write(f"{gap}[{self._current + 1}/{len(self._titles)}] {self._titles[self._current]}\n")
            self._written = 0
        self._write(completion.text[self._written :] + ("\n" if output.finished else ""))
        self._written = len(completion.text)


def _as_dict(output: RequestOutput, title: str) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "index": output.prompt_index,
        "prompt": title,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
    }


def _collect(given: list[str], file: Path | None, *, chat: bool, system: str | None) -> list[Prompt]:
    from lightvllm.parity.prompts import Prompt, read_prompts

    if system is not None and not chat:
        raise ConfigError("--system is given without --chat; add --chat")
    prompts = [Prompt(prompt=text) for text in given]
    prompts += read_prompts(file) if file else []
    if not prompts:
        raise ConfigError("no prompt is given; use -p TEXT or --prompts-file FILE")
    before = [{"role": "system", "content": system}] if system is not None else []
    return [
        Prompt(messages=[*before, {"role": "user", "content": p.prompt}]) if chat and p.prompt is not None else p
        for p in prompts
    ]


def _rendered(prompts: list[Prompt], llm: LLM) -> list[Any]:
    return [p.prompt if p.messages is None else llm.preprocess_chat(p.messages)[0] for p in prompts]


def _summary(outputs: list[RequestOutput], seconds: float) -> None:
    read = sum(len(output.prompt_token_ids) for output in outputs)
    written = sum(len(output.outputs[0].token_ids) for output in outputs)
    typer.echo(
        f"{len(outputs)} prompt{'s' * (len(outputs) != 1)}, {read} tokens in, {written} tokens out, "
        f"{seconds:.1f} s, {written / seconds:.1f} tokens/s",
        err=True,
    )

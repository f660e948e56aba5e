"""Runs what is to be compared: the reference first, then one engine after another, each shut down before the next.

Comparing is ``compare``'s part, showing ``report``'s.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from lightvllm.config import EXECUTOR_NAMES, ModelConfig, ParallelConfig
from lightvllm.engine.llm import LLM
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError
from lightvllm.hub import resolve
from lightvllm.parity.compare import Mismatch, PromptRun, Run, compare
from lightvllm.parity.prompts import Prompt
from lightvllm.parity.record import Decode, Recorder, top_tokens
from lightvllm.parity.reference import NAME, Reference, ask_transformers, largest_difference
from lightvllm.sampling_params import SamplingParams
from lightvllm.version import __version__

REPORT_VERSION = 1
REFERENCES = (NAME, "none")


class Layout(msgspec.Struct, frozen=True):
    """``TPxPP``."""

    tensor_parallel_size: int
    pipeline_parallel_size: int

    def __str__(self) -> str:
        return f"{self.tensor_parallel_size}x{self.pipeline_parallel_size}"

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size, pipeline_parallel_size=self.pipeline_parallel_size
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be compared.

    Attributes:
        model: folder, known name or hub id.
        executors, layouts: every pair of them is run, but uniproc only in 1x1.
        prompts: asked all at once.
        max_tokens: generated for each prompt at most.
        dtype: of every engine and of the reference.
        max_model_len: longest prompt plus output; None takes what the model allows.
        reference: ``"transformers"`` or ``"none"``.
        repeat: runs of each pair.
        threads: CPU threads of each worker; 0 is the cores divided by the layout's number of workers.
        options: further arguments for ``LLM``, by executor.
    """

    model: str
    executors: Sequence[str]
    layouts: Sequence[Layout]
    prompts: Sequence[Prompt]
    max_tokens: int = 32
    dtype: str = "float32"
    max_model_len: int | None = None
    reference: str = NAME
    repeat: int = 1
    threads: int = 0
    options: Mapping[str, Mapping[str, Any]] = {}

    def pairs(self) -> list[tuple[Layout, str]]:
        """What is run, in this order: layout by layout, so that those to be compared stand together."""
        return [(la, ex) for la in self.layouts for ex in self.executors if ex != "uniproc" or str(la) == "1x1"]


class Question(msgspec.Struct, frozen=True):
    """A prompt as the models saw it."""

    title: str
    text: str
    num_tokens: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All there is to show; ``--json`` writes it as it is. ``version`` changes when a field changes its meaning."""

    version: int = REPORT_VERSION
    lightvllm: str = __version__
    created: str
    machine: dict[str, str]
    model: str
    dtype: str
    max_tokens: int
    prompts: list[Question]
    reference: Run | None
    reference_version: str | None
    runs: list[Run]
    mismatches: list[Mismatch]

    @property
    def identical(self) -> bool:
        return not self.mismatches


def parse_layouts(text: str) -> list[Layout]:
    """``"1x1,3x1"``; ConfigError for anything else."""
    layouts = []
    for part in _listed(text, "layouts"):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if not match:
            raise ConfigError(f"layout {part!r} is not TPxPP; write it like 1x1,1x2,3x1")
        layouts.append(Layout(int(match[1]), int(match[2])))
    return layouts


def parse_executors(text: str) -> list[str]:
    """``"uniproc,k8s"``; ConfigError for an unknown name."""
    executors = _listed(text, "executors")
    if unknown := [name for name in executors if name not in EXECUTOR_NAMES]:
        raise ConfigError(f"executors {', '.join(unknown)} are unknown; use {', '.join(EXECUTOR_NAMES)}")
    return executors


def run_parity(
    plan: Plan, progress: Callable[[str], None] = lambda _: None, make_llm: Callable[..., LLM] = LLM
) -> Report:
    """Run everything and compare it.

    Raises ConfigError before anything is started when the plan cannot be run, and whatever an engine raises when it
    cannot be started or fails; that engine has been shut down then.
    """
    folder = resolve(plan.model)
    config = ModelConfig.from_dir(folder, dtype=plan.dtype, max_model_len=plan.max_model_len)
    for layout in plan.layouts:
        layout.parallel.check(config)
    if not plan.pairs():
        raise ConfigError(
            "executor uniproc runs only layout 1x1, which is not among the layouts; add it, or ray or k8s"
        )
    if plan.reference not in REFERENCES:
        raise ConfigError(f"reference={plan.reference!r} is unknown; use {' or '.join(REFERENCES)}")
    tokenizer = Tokenizer.from_dir(folder)
    prompts, ids = _tokenize(plan.prompts, tokenizer)
    for number, tokens in enumerate(map(len, ids), 1):
        if tokens + plan.max_tokens > config.max_model_len:
            raise ConfigError(
                f"prompt {number} has {tokens} tokens, with max_tokens={plan.max_tokens} more than "
                f"max_model_len={config.max_model_len}; give shorter prompts or lower max_tokens"
            )

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    reference = None
    if plan.reference != "none":
        reference = ask_transformers(folder, config.dtype, ids, plan.max_tokens, decode, progress)
    runner = _Runner(plan, ids, decode, reference, progress, make_llm)
    runs = [
        runner.run(layout, executor, repeat)
        for layout, executor in plan.pairs()
        for repeat in range(1, plan.repeat + 1)
    ]
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine={
            "cpu": _cpu(),
            "cores": str(_cores()),
            "python": platform.python_version(),
            "system": platform.system(),
        },
        model=plan.model,
        dtype=config.dtype,
        max_tokens=plan.max_tokens,
        prompts=prompts,
        reference=reference.run if reference else None,
        reference_version=reference.version if reference else None,
        runs=runs,
        mismatches=compare(runs, reference.run if reference else None),
    )


@dataclass(frozen=True)
class _Runner:
    """What all runs of a plan have in common; ``prompts`` are token ids."""

    plan: Plan
    prompts: list[list[int]]
    decode: Decode
    reference: Reference | None
    progress: Callable[[str], None]
    make_llm: Callable[..., LLM]

    def run(self, layout: Layout, executor: str, repeat: int) -> Run:
        """Start an engine, ask twice, shut it down.

        First it is timed, then it sends its logits, whose way to the driver would be in the times. The second time it
        finds the prompts in its prefix cache, so that is compared, too.
        """
        import numpy as np

        plan = self.plan
        name = f"{executor} {layout}" + (f", run {repeat} of {plan.repeat}" if plan.repeat > 1 else "")
        sampling = SamplingParams(temperature=0.0, max_tokens=plan.max_tokens)
        recorder = Recorder()
        with self.make_llm(
            plan.model,
            executor=executor,
            tensor_parallel_size=layout.tensor_parallel_size,
            pipeline_parallel_size=layout.pipeline_parallel_size,
            dtype=plan.dtype,
            max_model_len=plan.max_model_len,
            threads=plan.threads or max(1, _cores() // layout.parallel.world_size),
            return_logits=True,
            async_scheduling=False,  # steps that overlap have no time outside the model to tell
            on_step=recorder,
            progress=lambda what: self.progress(f"{name}: {what}"),
            **plan.options.get(executor, {}),
        ) as llm:
            self.progress(f"{name}: generating, timed")
            llm.executor.collective_rpc("set_return_logits", args=(False,))
            started = time.perf_counter()
            timed = llm.generate(self.prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - started
            outside = [1e6 * (timing.seconds - timing.model_seconds) for timing in llm.engine.timings]
            self.progress(f"{name}: generating, with logits")
            llm.executor.collective_rpc("set_return_logits", args=(True,))
            recorder.listening = True
            outputs = llm.generate(self.prompts, sampling, use_tqdm=False)
            info, start_seconds = llm.executor.worker_infos[llm.executor.output_rank], llm.executor.start_seconds
        answers = [output.outputs[0] for output in outputs]
        # One engine deals out its sequences' ids in the order of asking.
        rows = [recorder.rows[seq_id] for seq_id in sorted(recorder.rows)]
        digests = [recorder.digests[seq_id] for seq_id in sorted(recorder.digests)]
        difference = None
        if self.reference is not None:
            difference = max(
                largest_difference(self.reference, i, answer.token_ids, rows[i]) for i, answer in enumerate(answers)
            )
        return Run(
            executor=executor,
            layout=str(layout),
            repeat=repeat,
            prompts=[
                PromptRun(
                    text=answer.text,
                    token_ids=list(answer.token_ids),
                    finish_reason=answer.finish_reason,
                    step_digests=digests[i],
                    step_tops=[top_tokens(row, self.decode) for row in rows[i]],
                )
                for i, answer in enumerate(answers)
            ],
            timed_token_ids=[list(output.outputs[0].token_ids) for output in timed],
            digest=recorder.digest,
            max_abs_logit_difference=difference,
            threads=info.threads,
            device=info.device,
            attention_backend=info.attention_backend,
            kernels=info.kernels,
            pp_transport=info.pp_transport,
            output_tokens=sum(len(output.outputs[0].token_ids) for output in timed),
            steps=len(outside),
            seconds=seconds,
            outside_us_p50=float(np.percentile(outside, 50)),
            outside_us_p99=float(np.percentile(outside, 99)),
            start_seconds=start_seconds,
        )


def _tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> tuple[list[Question], list[list[int]]]:
    """A model without a chat template sees what was said last as a plain prompt."""
    questions, ids = [], []
    for prompt in prompts:
        chat = prompt.messages is not None and tokenizer.chat_template is not None
        text = tokenizer.apply_chat_template(prompt.messages or []) if chat else prompt.title
        ids.append(tokenizer.encode(text, add_special_tokens=not chat))
        questions.append(Question(prompt.title, text, len(ids[-1])))
    return questions, ids


def _listed(text: str, what: str) -> list[str]:
    """Comma-separated, each once."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ConfigError(f"no {what} are given; name at least one")
    return parts


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

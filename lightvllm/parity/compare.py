"""What the runs said, and where they part. Pure: knows no engine, no torch and no terminal.

Compared are, in this order:

* **tokens**: of every run with those of the reference, or with those of the first run where there is no reference, and
  with what the run itself said when it was timed;
* **logits**: runs of one layout with the first run of that layout, bit for bit, by SHA-256. Layouts are not compared
  with each other: they add the same numbers up in another order.
* **schedule**: the same logits, but computed in other steps.

Each pair of runs and each of these gives one mismatch at most: the first prompt that differs, at its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

Kind = Literal["tokens", "logits", "schedule"]

_T = TypeVar("_T")


class TopToken(msgspec.Struct, frozen=True):
    """A token, its text, and its raw logit."""

    id: int
    text: str
    logit: float

    def __str__(self) -> str:
        return f"{self.id} {self.text!r} {self.logit:.6f}"


class PromptRun(msgspec.Struct, frozen=True, kw_only=True):
    """What was generated for one prompt.

    Attributes:
        step_digests: SHA-256 of the float32 logits of each generated token; empty where they are not known.
        step_tops: the most probable tokens at each step, best first.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    step_digests: list[str] = []
    step_tops: list[list[TopToken]] = []


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's life: started, asked all prompts at once, shut down.

    Attributes:
        executor: its name, or the reference's.
        layout: ``"TPxPP"``.
        repeat: 1 for the first run of this executor and layout.
        prompts: in the order in which they were asked.
        timed_token_ids: for each prompt, what was said while the run was timed; empty if it was not.
        digest: SHA-256 over the float32 logits of every step in order; "" where they are not known.
        max_abs_logit_difference: from the reference, over every step up to where the tokens part; None without one.
        threads: CPU threads of each worker.
        device, attention_backend, kernels, pp_transport: what the workers said that they use.
        output_tokens, steps: how many.
        seconds: from asking to the last token, without logits being sent.
        outside_us_p50, outside_us_p99: microseconds of a step that the output rank did not spend in it.
        start_seconds: until the first step could be run.
    """

    executor: str
    layout: str
    repeat: int = 1
    prompts: list[PromptRun]
    timed_token_ids: list[list[int]] = []
    digest: str = ""
    max_abs_logit_difference: float | None = None
    threads: int = 0
    device: str = ""
    attention_backend: str = ""
    kernels: str = ""
    pp_transport: str = ""
    output_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    outside_us_p50: float = 0.0
    outside_us_p99: float = 0.0
    start_seconds: float = 0.0

    @property
    def name(self) -> str:
        """``"ray 1x2"``, ``"ray 1x2 (run 2)"``."""
        where = f"{self.executor} {self.layout}".strip()
        return where if self.repeat == 1 else f"{where} (run {self.repeat})"

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """Where two runs part: prompt and step count from 0; the tops are what each side held most probable there."""

    kind: Kind
    left: str
    right: str
    prompt: int | None = None
    step: int | None = None
    left_token: int | None = None
    right_token: int | None = None
    left_top: list[TopToken] = []
    right_top: list[TopToken] = []

    def sentence(self) -> str:
        """One line for a person; prompts and steps count from 1 here."""
        if self.kind == "schedule":
            return f"{self.left} and {self.right} computed the same logits, but not in the same steps"
        what = f"the {self.kind} of {self.left} and {self.right} differ at prompt {(self.prompt or 0) + 1}"
        what += f", step {(self.step or 0) + 1}"
        if self.kind == "tokens":
            what += f": {_token(self.left_token)} against {_token(self.right_token)}"
        return what


def compare(runs: Sequence[Run], reference: Run | None = None) -> list[Mismatch]:
    """Every difference, in the order of the runs; an empty list is parity.

    Raises ValueError when runs did not answer the same number of prompts: they cannot be compared then.
    """
    if wrong := [run.name for run in [*runs, *filter(None, [reference])] if len(run.prompts) != len(runs[0].prompts)]:
        raise ValueError(f"{', '.join(wrong)}: not as many prompts as {runs[0].name}")
    mismatches: list[Mismatch] = []
    first_of_layout: dict[str, Run] = {}
    standard = reference or (runs[0] if runs else None)
    for run in runs:
        if standard is not None and run is not standard:
            mismatches += _tokens(standard, run)
        if run.timed_token_ids:
            timed = [PromptRun(text="", token_ids=token_ids) for token_ids in run.timed_token_ids]
            found = _tokens(msgspec.structs.replace(run, prompts=timed), run)
            mismatches += [msgspec.structs.replace(mismatch, left=f"{run.name} (timed)") for mismatch in found]
        first = first_of_layout.setdefault(run.layout, run)
        if first is not run:
            mismatches += _logits(first, run)
    return mismatches


def first_difference(left: Sequence[object], right: Sequence[object]) -> int | None:
    """The first index at which they differ, the shorter one's length if it is a prefix, or None."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return None if len(left) == len(right) else min(len(left), len(right))


def _tokens(left: Run, right: Run) -> list[Mismatch]:
    for prompt, (a, b) in enumerate(zip(left.prompts, right.prompts, strict=True)):
        step = first_difference(a.token_ids, b.token_ids)
        if step is not None:
            return [_mismatch("tokens", left, right, prompt, step)]
    return []


def _logits(left: Run, right: Run) -> list[Mismatch]:
    for prompt, (a, b) in enumerate(zip(left.prompts, right.prompts, strict=True)):
        step = first_difference(a.step_digests, b.step_digests)
        if step is not None:
            return [_mismatch("logits", left, right, prompt, step)]
    if left.digest != right.digest:
        return [Mismatch(kind="schedule", left=left.name, right=right.name)]
    return []


def _mismatch(kind: Kind, left: Run, right: Run, prompt: int, step: int) -> Mismatch:
    a, b = left.prompts[prompt], right.prompts[prompt]
    return Mismatch(
        kind=kind,
        left=left.name,
        right=right.name,
        prompt=prompt,
        step=step,
        left_token=_at(a.token_ids, step),
        right_token=_at(b.token_ids, step),
        left_top=_at(a.step_tops, step) or [],
        right_top=_at(b.step_tops, step) or [],
    )


def _at(values: Sequence[_T], index: int) -> _T | None:
    return values[index] if index < len(values) else None


def _token(token: int | None) -> str:
    return "the end" if token is None else f"token {token}"

"""Prompts from a file, and the eight that parity asks when no file is given.

A ``.jsonl`` file has one JSON value per line: a string, ``{"prompt": "…"}`` or
``{"messages": [{"role": …, "content": …}]}``. Any other file is text with one prompt per line; empty lines are
skipped. ``-`` is standard input, as text.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec

from lightvllm.errors import ConfigError

Message = dict[str, str]


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text as it is, or a conversation for the model's chat template: one of the two is set."""

    prompt: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    messages: list[Message] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")

    @property
    def title(self) -> str:
        """What a reader would call it: the text, or what was said last."""
        return self.prompt if self.prompt is not None else (self.messages or [{}])[-1].get("content", "")


def default_prompts() -> list[Prompt]:
    """The prompts that are shipped with the package."""
    return _parse_jsonl(resources.files(__package__).joinpath("prompts.jsonl").read_text(encoding="utf-8"), "default")


def read_prompts(path: Path) -> list[Prompt]:
    """At least one prompt, or ConfigError saying which line is wrong and why."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failed:
        raise ConfigError(f"cannot read the prompts: {failed}; give a UTF-8 file with one prompt per line") from None
    if path.suffix == ".jsonl":
        prompts = _parse_jsonl(text, str(path))
    else:
        prompts = [Prompt(prompt=line) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: no prompt in it; expected one per line")
    return prompts


def _parse_jsonl(text: str, name: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line, type=str | Prompt)
        except msgspec.MsgspecError as wrong:
            raise ConfigError(
                f'{name}, line {number}: {wrong}; expected a string, {{"prompt": …}} or {{"messages": […]}}'
            ) from None
        prompts.append(Prompt(prompt=value) if isinstance(value, str) else value)
    return prompts

"""Tool calls in what a model writes: ``ToolParser``, the base of the parsers, and ``write_calls``, their inverse.

``feed`` takes the text in pieces of any size and ``finish`` ends it; joined, the results do not depend on where the
pieces were cut, so a stream and a whole answer agree. What looks like a call and turns out to be none is text.
Whitespace beside calls is dropped.

hermes       ``<tool_call>{"name": …, "arguments": …}</tool_call>``, any number (Hermes, Qwen 2.5 and 3)
llama3_json  ``{"name": …, "parameters": …}``, more behind ``;``, perhaps after ``<|python_tag|>`` (Llama 3.1 to 3.3)
mistral      ``[TOOL_CALLS][{"name": …, "arguments": …}, …]``, or ``[TOOL_CALLS]name[ARGS]{…}``
pythonic     ``[name(argument=value), …]`` (Llama 3.2, Llama 4)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import msgspec

ToolFormat = Literal["hermes", "llama3_json", "mistral", "pythonic"]

SPACE = " \t\r\n"


class ToolDelta(msgspec.Struct, frozen=True):
    """News of one call: its id and name first, then pieces of its arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class Parsed(NamedTuple):
    """What a piece of text came to."""

    content: str
    calls: list[ToolDelta]


class ToolParser:
    """Base of the parsers: numbers calls, holds back whitespace that may stand before one.

    Args:
        names: of the functions; a format without a mark of its own takes calls of these only for calls.
        parallel: without it the first call is given on and the others are dropped.
    """

    opening = ""
    """What a call begins with, wherever it stands in the text; empty: only at the text's beginning."""

    def __init__(self, names: Collection[str], parallel: bool = True) -> None:
        self.num_calls = 0
        self._names = frozenset(names)
        self._parallel = parallel
        self._buffer = ""
        self._held = ""
        self._content: list[str] = []
        self._calls: list[ToolDelta] = []
        self._ended = False
        self._after_call = False  # nothing but whitespace stands between the last call and here

    def feed(self, text: str) -> Parsed:
        self._buffer += text
        while self._advance():
            pass
        return self._taken()

    def finish(self) -> Parsed:
        """No text follows."""
        self._ended = True
        while self._advance():
            pass
        self._give_up()
        if self._held and not self.num_calls:
            self._content.append(self._held)
        self._held = ""
        return self._taken()

    def _advance(self) -> bool:
        """Use up some of the buffer; False if more text is needed."""
        raise NotImplementedError

    def _give_up(self) -> None:
        """The text has ended; what is left in the buffer is text, too."""
        self._say(self._buffer)
        self._buffer = ""

    def _taken(self) -> Parsed:
        parsed = Parsed("".join(self._content), self._calls)
        self._content, self._calls = [], []
        return parsed

    def _say(self, text: str) -> None:
        text = self._held + text
        if self._after_call:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        self._held = text[len(body) :]
        if body:
            self._after_call = False
            self._content.append(body)

    def _call(self, name: str) -> None:
        self._held, self._after_call = "", True
        self.num_calls += 1
        if self._parallel or self.num_calls == 1:
            self._calls.append(ToolDelta(self.num_calls - 1, self._new_id(), name, ""))

    def _argue(self, text: str) -> None:
        if text and (self._parallel or self.num_calls == 1):
            self._calls.append(ToolDelta(self.num_calls - 1, None, None, text))

    def _new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _find(self, mark: str) -> bool:
        """Say what stands before ``mark`` and cut both off; False if the mark is not there (yet)."""
        at = self._buffer.find(mark)
        if at >= 0:
            self._say(self._buffer[:at])
            self._buffer = self._buffer[at + len(mark) :]
            return True
        keep = 0 if self._ended else _overlap(self._buffer, mark)
        self._say(self._buffer[: len(self._buffer) - keep])
        self._buffer = self._buffer[len(self._buffer) - keep :]
        return False

    def _skip(self, characters: str) -> str:
        """Cut ``characters`` off the buffer's beginning; they are returned."""
        rest = self._buffer.lstrip(characters)
        skipped, self._buffer = self._buffer[: len(self._buffer) - len(rest)], rest
        return skipped


def _overlap(text: str, mark: str) -> int:
    """How many of the text's last characters may be the beginning of ``mark``."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def write_calls(tool_format: ToolFormat, calls: Sequence[tuple[str, object]]) -> str:
    """Calls (name, arguments) as a model writes them in that format."""
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    match tool_format:
        case "hermes":
            return "\n".join(
                f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
                for name, arguments in written
            )
        case "llama3_json":
            return "; ".join(
                f'{{"name": {json.dumps(name)}, "parameters": {arguments}}}' for name, arguments in written
            )
        case "mistral":
            listed = ", ".join(
                f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}' for name, arguments in written
            )
            return f"[TOOL_CALLS][{listed}]"
        case "pythonic":
            return "[" + ", ".join(_python_call(name, arguments) for name, arguments in calls) + "]"


def _python_call(name: str, arguments: object) -> str:
    values = arguments if isinstance(arguments, dict) else {}
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})"

"""The parser of tool calls written as Python: ``[name(argument=value), …]``. Calls are read, never evaluated."""

from __future__ import annotations

import ast
import json
import re
from typing import Literal

from lightvllm.server.tool_calls import SPACE, ToolParser


class PythonicParser(ToolParser):
    _CALL = re.compile(r"\s*([a-zA-Z0-9_.-]+)\s*\(")
    _UNDECIDED = re.compile(r"\s*[a-zA-Z0-9_.-]*\s*")

    _state: Literal["start", "call", "text"] = "start"
    _open: _Parenthesis | None = None
    _before = ""  # what has been read of the list and not given on

    def _advance(self) -> bool:
        if self._state == "start":
            rest = self._buffer.lstrip(SPACE)
            if not rest:
                return False
            if rest[0] == "[":
                self._before = self._buffer[: len(self._buffer) - len(rest) + 1]
                self._buffer, self._state = rest[1:], "call"
            else:
                self._state = "text"
            return True
        if self._state == "text":
            self._say(self._buffer)
            self._buffer = ""
            return False
        if self.num_calls:
            self._before += self._skip(SPACE + ",")
            if self._buffer.startswith("]"):
                self._buffer, self._state, self._before = self._buffer[1:], "text", ""
                return True
        match = self._CALL.match(self._buffer)
        if match is None or match[1] not in self._names:
            if match is None and self._UNDECIDED.fullmatch(self._buffer) and not self._ended:
                return False
            return self._text()
        self._open = self._open or _Parenthesis(match.end())
        end = self._open.find(self._buffer)
        if end is None:
            return self._text() if self._ended else False
        arguments = _arguments(self._buffer[match.end() - 1 : end])
        if arguments is None:
            return self._text()
        self._buffer, self._before, self._open = self._buffer[end:], "", None
        self._call(match[1])
        self._argue(arguments)
        return True

    def _text(self) -> bool:
        self._say(self._before)
        self._before, self._state = "", "text"
        return True


class _Parenthesis:
    """Finds where a parenthesis that is open is closed, strings left out, while the text grows."""

    def __init__(self, start: int) -> None:
        self._position = start
        self._depth = 1
        self._quote = ""
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The position behind it; None if it is not there yet. ``text`` begins as it did the time before."""
        for position in range(self._position, len(text)):
            char = text[position]
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == self._quote:
                    self._quote = ""
            elif char in "\"'":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if not self._depth:
                    return position + 1
        self._position = len(text)
        return None


def _arguments(text: str) -> str | None:
    """``(a=1, b="x")`` as a JSON object; None if it is not that."""
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            return None
        return json.dumps({k.arg: _literal(k.value) for k in call.keywords}, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


_NAMES = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> object:
    """Python's literals, and JSON's words for True, False and None, which models mix in."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {str(_literal(k)): _literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
    raise ValueError("not a literal")

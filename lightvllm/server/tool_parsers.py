"""Parsers of tool calls written as JSON, and ``PARSERS``, one for each format; see ``tool_calls.py``."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection
from typing import Literal

from lightvllm.server.json_call import JsonCall
from lightvllm.server.pythonic_calls import PythonicParser
from lightvllm.server.tool_calls import SPACE, ToolFormat, ToolParser


class _JsonParser(ToolParser):
    """Reads one ``JsonCall`` after the other; ``_before`` is what stood before the present one, should it be text."""

    known_only = False

    def __init__(self, names: Collection[str], parallel: bool = True) -> None:
        super().__init__(names, parallel)
        self._json: JsonCall | None = None
        self._named = False
        self._before = ""

    def _begin(self, before: str, call: JsonCall | None = None) -> None:
        self._json, self._named, self._before = call or JsonCall(), False, before

    def _read(self) -> Literal["more", "done", "text", "broken"]:
        """``text``: it was no call, and has been said; ``broken``: it was one, and its arguments are not JSON."""
        call = self._json
        assert call is not None
        self._buffer = self._buffer[call.feed(self._buffer) :]
        if call.name is not None and not self._named:
            if self.known_only and call.name not in self._names:
                call.broken = True
            else:
                self._named = True
                self._call(call.name)
        if self._named:
            self._argue(call.take())
        if not (call.done or call.broken or self._ended):
            return "more"
        self._json = None
        if call.done and self._named:
            return "done"
        if self._named:
            return "broken"
        self._say(self._before + call.raw)
        return "text"


class HermesParser(_JsonParser):
    opening = "<tool_call>"
    closing = "</tool_call>"

    _closing: Literal["", "next", "anywhere"] = ""

    def _advance(self) -> bool:
        if self._json is not None:
            match self._read():
                case "more":
                    return False
                case "done":
                    self._closing = "next"
                case "broken":
                    self._closing = "anywhere"
            return True
        if self._closing == "next":
            self._skip(SPACE)
            if self._buffer.startswith(self.closing):
                self._buffer = self._buffer[len(self.closing) :]
            elif self.closing.startswith(self._buffer) and not self._ended:
                return False
            self._closing = ""
            return bool(self._buffer)
        if self._closing:
            at = self._buffer.find(self.closing)
            self._buffer = self._buffer[at + len(self.closing) :] if at >= 0 else self._buffer[-len(self.closing) :]
            if at < 0:
                self._buffer = "" if self._ended else self._buffer
                return False
            self._closing = ""
            return True
        if not self._find(self.opening):
            return False
        self._begin(self.opening)
        return True


class Llama3JsonParser(_JsonParser):
    opening = "<|python_tag|>"

    def __init__(self, names: Collection[str], parallel: bool = True) -> None:
        super().__init__(names, parallel)
        self._may_begin = True  # a call may begin without a mark here

    def _advance(self) -> bool:
        if self._json is not None:
            match self._read():
                case "more":
                    return False
                case "text" | "broken":
                    self._may_begin = False
            self.known_only = False
            return True
        if self._may_begin:
            skipped = self._skip(SPACE + ";" if self.num_calls else SPACE)
            if not self._buffer:
                if self._ended and not self.num_calls:
                    self._say(skipped)
                self._buffer = skipped if not self.num_calls and not self._ended else ""
                return False
            if self._buffer[0] == "{":
                self.known_only = True
                self._begin(skipped)
                return True
            if self.opening.startswith(self._buffer) and len(self._buffer) < len(self.opening) and not self._ended:
                self._buffer = skipped + self._buffer
                return False
            self._may_begin = False
            self._say(skipped)
        if not self._find(self.opening):
            return False
        self._begin(self.opening)
        self._may_begin = True
        return True


class MistralParser(_JsonParser):
    opening = "[TOOL_CALLS]"

    _NAMED = re.compile(r"\s*([a-zA-Z0-9_.-]+)(?:\[CALL_ID\][a-zA-Z0-9]*)?(?:\[ARGS\])?\s*(?=\{)")
    _UNDECIDED = re.compile(r"\s*[a-zA-Z0-9_.-]*(?:\[[A-Z_]*(?:\][a-zA-Z0-9]*)?)*\s*")

    _state: Literal["text", "mark", "list"] = "text"

    def _advance(self) -> bool:
        if self._json is not None:
            match self._read():
                case "more":
                    return False
                case "text" | "broken":
                    self._state = "text"
            return True
        if self._state == "list":
            skipped = self._skip(SPACE + ",")
            if not self._buffer:
                return False
            if self._buffer[0] == "{":
                self._begin(skipped)
                return True
            self._buffer = self._buffer.removeprefix("]")
            self._state = "text"
            return True
        if self._state == "mark":
            return self._marked()
        if not self._find(self.opening):
            return False
        self._state = "mark"
        return True

    def _marked(self) -> bool:
        stripped = self._buffer.lstrip(SPACE)
        if not stripped and not self._ended:
            return False
        if match := self._NAMED.match(self._buffer):
            self._buffer = self._buffer[match.end() :]
            self._state = "text"
            self._begin(self.opening + match[0], JsonCall.arguments_of(match[1]))
            return True
        if stripped.startswith("["):
            after = stripped[1:].lstrip(SPACE)
            if not after and not self._ended:
                return False
            if after.startswith("{"):
                self._buffer, self._state = "", "list"
                self._begin(self.opening + "[")
                self._buffer = after
                return True
            if after.startswith("]"):
                self._buffer, self._state = after[1:], "text"
                return True
        elif self._UNDECIDED.fullmatch(self._buffer) and not self._ended:
            return False
        self._say(self.opening)
        self._state = "text"
        return bool(self._buffer)

    def _new_id(self) -> str:
        """Mistral's templates refuse ids that are not nine letters and digits."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


PARSERS: dict[ToolFormat, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}

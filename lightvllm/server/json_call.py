"""``JsonCall``: reads ``{"name": "f", "arguments": {…}}`` as its characters come, for the parsers of tool calls."""

from __future__ import annotations

import json
from typing import Literal, Self

_SPACE = " \t\r\n"
_KEYS = ("name", "arguments", "parameters", "type", "id")
_ARGUMENTS = ("arguments", "parameters")


class JsonCall:
    """Feed it until it is ``done`` or ``broken``. The arguments are given on as the model writes them, unparsed.

    Attributes:
        name: the function's, once it is known.
        done: the object is complete.
        broken: it is no call: not JSON, a key that calls do not have, a name that is no text.
    """

    def __init__(self) -> None:
        # What grows by a character at a time is kept in lists: texts would be copied whole each time.
        self._raw: list[str] = []
        self.name: str | None = None
        self.done = False
        self.broken = False
        self._arguments: list[str] = []
        self._any_arguments = False
        self._bare = False
        self._state: Literal["start", "key", "in_key", "colon", "value", "string", "container", "scalar"] = "start"
        self._key = ""
        self._token: list[str] = []  # the key or the value being read
        self._depth = 0
        self._quoted = False
        self._escaped = False

    @classmethod
    def arguments_of(cls, name: str) -> Self:
        """Only the arguments' object follows; the name is known."""
        call = cls()
        call.name, call._key, call._state, call._bare = name, "arguments", "value", True
        return call

    @property
    def raw(self) -> str:
        """All characters taken."""
        return "".join(self._raw)

    def take(self) -> str:
        """New text of the arguments; complete ones are never empty."""
        text = "".join(self._arguments)
        self._arguments.clear()
        if self.done and not self._any_arguments:
            text, self._any_arguments = "{}", True
        return text

    def feed(self, text: str) -> int:
        """Take characters; how many. Those behind the object are left."""
        for position, char in enumerate(text):
            if self.done or self.broken:
                return position
            self._raw.append(char)
            self._take(char)
        return len(text)

    def _take(self, char: str) -> None:
        match self._state:
            case "start":
                if char == "{":
                    self._state = "key"
                elif char not in _SPACE:
                    self.broken = True
            case "key":
                if char == '"':
                    self._state, self._token = "in_key", [char]
                elif char == "}":
                    self.done, self.broken = self.name is not None, self.name is None
                elif char not in _SPACE and char != ",":
                    self.broken = True
            case "in_key":
                if self._string(char):
                    self._key, self._state = str(self._parsed()), "colon"
                    self.broken |= self._key not in _KEYS
            case "colon":
                if char == ":":
                    self._state = "value"
                elif char not in _SPACE:
                    self.broken = True
            case "value":
                if char not in _SPACE:
                    self._begin_value(char)
            case "string":
                if self._string(char):
                    self._end_value()
            case "container":
                self._container(char)
            case "scalar":
                if char in ",}" or char in _SPACE:
                    self._end_value()
                    if not self.broken:
                        self._take(char)
                else:
                    self._token.append(char)

    def _begin_value(self, char: str) -> None:
        self._token = [char]
        if char == '"':
            self._state = "string"
        elif char in "{[":
            self._state, self._depth = "container", 1
            if self._key in _ARGUMENTS:
                self._argue(char)
        else:
            self._state = "scalar"
        self.broken |= self._bare and char != "{"

    def _container(self, char: str) -> None:
        if self._key in _ARGUMENTS:
            self._argue(char)
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._quoted = False
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if not self._depth:
                self._token = ["[]"]  # its content is no business of ours
                self._end_value()

    def _string(self, char: str) -> bool:
        """Whether the string ends here."""
        self._token.append(char)
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        else:
            return char == '"'
        return False

    def _end_value(self) -> None:
        kind, self._state = self._state, "key"
        if self._bare:
            self.done = True
            return
        value = None if kind == "container" else self._parsed()
        if self._key == "name":
            self.broken |= not isinstance(value, str) or not value
            self.name = value if isinstance(value, str) else None
        elif self._key in _ARGUMENTS and isinstance(value, str):  # some models write JSON inside a string
            self._argue(value)

    def _parsed(self) -> object:
        try:
            return json.loads("".join(self._token), strict=False)
        except ValueError:
            self.broken = True
            return None

    def _argue(self, text: str) -> None:
        self._arguments.append(text)
        self._any_arguments |= bool(text)

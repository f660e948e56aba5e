"""A parsed YAML document that knows what of it has been dealt with, so that nothing is dropped without a word.

Who converts asks for a value with ``take`` (it is carried over), or says with ``lost``, ``check`` or ``replaced`` what
becomes of it. ``Ledger.report_rest`` names what nobody has touched. Notes name a path and a reason, never a
value: a value may be a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lightvllm.errors import ConfigError

Kind = Literal["lost", "check", "replaced"]
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Note:
    """What became of a part of the input.

    Attributes:
        kind: lost: it could not be carried over. check: it was, and somebody must look at it. replaced: it is Ray's
            own, and needless here, or something else takes its place.
        path: where it is in the input, such as ``spec.suspend``.
        why: the reason and what to do, one line.
    """

    kind: Kind
    path: str
    why: str


@dataclass
class Ledger:
    """What has been dealt with in one document; ``source`` is how errors call the document."""

    source: str
    seen: set[Path] = field(default_factory=set)
    notes: list[Note] = field(default_factory=list)
    embedded: dict[Path, Node] = field(default_factory=dict)

    def note(self, kind: Kind, path: Path, why: str) -> None:
        new = Note(kind, joined(path), why)
        if new not in self.notes:
            self.notes.append(new)

    def error(self, path: Path, message: str) -> ConfigError:
        return ConfigError(f"{self.source}: {joined(path)} {message}" if path else f"{self.source}: {message}")

    def report_rest(self, document: Node) -> None:
        """Everything below ``document`` that nobody has dealt with is lost: one note for the largest whole parts."""
        for path in self._untouched(document):
            self.note("lost", path, "nothing takes its place")

    def _untouched(self, node: Node) -> list[Path]:
        if node.path in self.seen or node.value is None:
            return []
        node = self.embedded.get(node.path, node)
        children = node.children()
        if not isinstance(node.value, dict | list):
            return [node.path]
        below = [(child, self._untouched(child)) for child in children]
        whole = bool(below) and all(paths == [child.path] for child, paths in below)
        return [node.path] if whole and node.path else [path for _, paths in below for path in paths]


@dataclass
class Node:
    """A value in the document, or the place where one would be: then ``value`` is None, as where YAML says null."""

    value: Any
    path: Path
    ledger: Ledger

    def __bool__(self) -> bool:
        return self.value is not None

    def at(self, *keys: str | int) -> Node:
        node = self
        for key in keys:
            if isinstance(key, int):
                node.expect(list, "a list")
                value = node.value[key] if node.value is not None and key < len(node.value) else None
            else:
                node.expect(dict, "an object")
                value = None if node.value is None else node.value.get(key)
            node = Node(value, (*node.path, key), self.ledger)
        return node

    def fields(self) -> Iterator[tuple[str, Node]]:
        self.expect(dict, "an object")
        for key in self.value or {}:
            yield str(key), Node(self.value[key], (*self.path, key), self.ledger)

    def elements(self) -> list[Node]:
        self.expect(list, "a list")
        return [Node(value, (*self.path, number), self.ledger) for number, value in enumerate(self.value or [])]

    def children(self) -> list[Node]:
        if isinstance(self.value, dict):
            return [child for _, child in self.fields()]
        return self.elements() if isinstance(self.value, list) else []

    def embedded(self, value: Any) -> Node:
        """The document that this text holds. It stands for the text, so that only its parts are dealt with."""
        node = Node(value, self.path, self.ledger)
        self.ledger.embedded[self.path] = node
        return node

    def take(self) -> Any:
        """The value with all below it, which is carried over."""
        self.ledger.seen.add(self.path)
        return self.value

    def take_text(self) -> str | None:
        """The same for what is to be text; numbers and booleans become what YAML would call them."""
        value = self.take()
        if isinstance(value, dict | list):
            raise self.error(f"is {type(value).__name__}, expected text")
        if isinstance(value, bool):
            return str(value).lower()
        return None if value is None else str(value)

    def take_int(self, least: int = 0) -> int | None:
        """The same for what is to be a whole number of at least ``least``, or text that says one."""
        value = self.take()
        if value is None:
            return None
        try:
            number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else least - 1
        except ValueError:
            number = least - 1
        if number < least:
            raise self.error(f"is {value!r}, expected a whole number from {least}")
        return number

    def take_number(self) -> float:
        """The same for what is to be a number of at least 0."""
        value = self.take()
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise self.error(f"is {value!r}, expected a number from 0")
        return float(value)

    def reporter(self) -> Callable[[Kind, str], None]:
        """Adds notes to this place, which is dealt with in parts."""
        return lambda kind, why: self.ledger.note(kind, self.path, why)

    def lost(self, why: str) -> None:
        self._dealt_with("lost", why)

    def check(self, why: str) -> None:
        self._dealt_with("check", why)

    def replaced(self, why: str) -> None:
        self._dealt_with("replaced", why)

    def error(self, message: str) -> ConfigError:
        return self.ledger.error(self.path, message)

    def expect(self, kind: type, called: str) -> None:
        if self.value is not None and not isinstance(self.value, kind):
            raise self.error(f"is a {type(self.value).__name__}, expected {called}")

    def _dealt_with(self, kind: Kind, why: str) -> None:
        if self.value is not None:
            self.ledger.seen.add(self.path)
            self.ledger.note(kind, self.path, why)


def joined(path: Path) -> str:
    """``spec.groups[0].name``; a key with a dot in it is quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif "." in str(part) or "/" in str(part):
            text += f"[{str(part)!r}]"
        else:
            text += f".{part}" if text else str(part)
    return text

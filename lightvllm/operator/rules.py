"""Rules between fields, each written once in CEL for the API server and once in Python for everybody else.

Both are applied to the same thing: an object whose defaults have been filled in. ``tests/test_operator_rules.py`` has
the two judge the same objects. Imports nothing of lightvllm; ``types`` hangs the rules on its models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What must hold for an object.

    Attributes:
        cel: the rule in CEL, with ``self`` (https://kubernetes.io/docs/reference/using-api/cel/).
        message: what is expected and what to do, one line.
        holds: the same rule, for the model.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Fixed:
    """A field that cannot be changed while the object lives.

    Attributes:
        field: its name in YAML; ``a.b`` for one in an object that is always there.
        optional: whether it may be left out.
        why: what to do instead, one line.
    """

    field: str
    optional: bool
    why: str

    @property
    def cel(self) -> str:
        new, old = f"self.{self.field}", f"oldSelf.{self.field}"
        if self.optional:
            return f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"
        return f"{new} == {old}"

    @property
    def message(self) -> str:
        return f"{self.field} cannot be changed: {self.why}"

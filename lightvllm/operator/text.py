"""An LLMInference and its plan as YAML, and back. Errors name the field and what was expected. Needs PyYAML."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lightvllm.errors import ConfigError
from lightvllm.operator.types import LLMInference

_MOST_PROBLEMS = 5


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Scripts as blocks that can be read; nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def dump(documents: Iterable[dict[str, Any]]) -> str:
    """YAML documents, fields in the order given."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return text


def read(text: str, source: str) -> dict[str, Any]:
    """The one YAML document in ``text``, unchecked. Raises ConfigError, which names ``source``."""
    try:
        documents = [each for each in yaml.safe_load_all(text) if each is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{where}: no YAML: {getattr(error, 'problem', None) or error}") from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        held = f"{len(documents)} documents" if len(documents) != 1 else f"a {type(documents[0]).__name__}"
        raise ConfigError(f"{source} holds {held}; expected one object of kind LLMInference")
    return documents[0]


def check(document: dict[str, Any], source: str) -> LLMInference:
    """``document``, if it is an LLMInference that the API server would take. Raises ConfigError with each problem."""
    for field, expected in (("apiVersion", "lightvllm.io/v1"), ("kind", "LLMInference")):
        if document.get(field) != expected:
            raise ConfigError(f"{source}: {field} is {document.get(field)!r}, expected {expected}")
    try:
        return LLMInference.model_validate(document)
    except ValidationError as error:
        # Each alternative of a union has its own error.
        problems = list(dict.fromkeys(_problem(each) for each in error.errors()))
    more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    raise ConfigError(f"{source}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")


def _problem(error: Any) -> str:
    """``spec.replicas: …``"""
    kind, context = error["type"], error.get("ctx", {})
    path = [part for part in error["loc"] if not _is_of_a_union(part)]
    got = error["input"]
    if kind == "extra_forbidden":
        known = _fields(path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, 1)
        said = "is no field" + (f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}")
    elif kind == "missing":
        said = "is missing"
    elif kind == "literal_error":
        said = f"is {got!r}, expected {context['expected']}"
    elif kind == "rule":
        said = error["msg"]
    elif len(path) < len(error["loc"]):
        said = f"is {_short(got)}, expected a whole number, or a quantity such as '500m' or '8Gi'"
    elif kind == "string_pattern_mismatch":
        said = f"is {_short(got)}, which does not match {context['pattern']}"
    else:
        message = error["msg"][0].lower() + error["msg"][1:]
        said = f"{message.removeprefix('input ')}, got {_short(got)}"
    return f"{_joined(path)}: {said}"


def _is_of_a_union(part: Any) -> bool:
    """Pydantic names the alternative that it tried, too: ``constrained-str``, ``int``."""
    return isinstance(part, str) and part in ("constrained-str", "constrained-int", "int", "str")


def _joined(path: list[Any]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the object"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _fields(path: list[Any]) -> list[str]:
    """The names of the fields of the object at ``path``."""
    model: Any = LLMInference
    for part in path:
        if isinstance(part, int):
            continue
        field = next(each for each in model.model_fields.values() if each.alias == part)
        model = _model_in(field.annotation)
    return [each.alias for each in model.model_fields.values()]


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (found for each in getattr(annotation, "__args__", ()) if (found := _model_in(each)) is not None)
    return next(inner, None)

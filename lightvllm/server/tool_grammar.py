"""Grammars that hold a model to tool calls: its format around, the functions' parameter schemas inside (llguidance's
Lark notation, whose ``%json`` takes a schema)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightvllm.errors import ConfigError
from lightvllm.server.tool_calls import ToolFormat

MAX_CALLS = 64
"""In one answer."""

Function = tuple[str, Mapping[str, Any] | None]
"""Name and JSON schema of the parameters; None takes none."""

# As templates write arguments (Python's json.dumps), and without blanks for ever.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar(
    tool_format: ToolFormat,
    functions: Sequence[Function],
    *,
    parallel: bool,
    mark_id: int | None = None,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """One or more calls of these functions.

    Args:
        parallel: more than one call is allowed.
        mark_id: the token id of the format's mark (``<tool_call>``), if that is a special token.
        answer: a JSON schema of what may come in place of calls (in llama3_json, of one call).

    Raises ConfigError for a schema that is not of an object.
    """
    if tool_format == "llama3_json" and answer is not None:
        return f"start: {_json(_call_or_answer(functions, answer))}"
    mark = f"<[{mark_id}]>" if mark_id is not None else _quoted(MARKS[tool_format]) if tool_format in MARKS else ""
    rules: list[str] = []
    call = _one_call(tool_format, functions, rules)
    before, between, after = {
        "hermes": ("", '"\\n"', ""),
        "llama3_json": ("", '"; "', ""),
        "mistral": (f'{mark} "["', '", "', '"]"'),
        "pythonic": ('"["', '", "', '"]"'),
    }[tool_format]
    opening = mark if tool_format == "hermes" else ""
    more = f"({between} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    start = "start: calls" if answer is None else f"start: calls | answer\nanswer: {_json(answer)}"
    return "\n".join([start, f"calls: {before} call {more} {after}", f"call: {opening} ({call})", *rules])


MARKS: dict[ToolFormat, str] = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
"""Formats in which every call (of mistral, every list of calls) stands behind a mark."""


def text_with_calls(
    tool_format: ToolFormat, functions: Sequence[Function], *, parallel: bool, mark_id: int | None = None
) -> str:
    """Any text, in which what follows a mark is a call; for formats of ``MARKS``. Arguments as of ``grammar``."""
    rules: list[str] = []
    call = f"({_one_call(tool_format, functions, rules)})"
    if tool_format == "mistral":
        more = f'(", " {call}){{0,{MAX_CALLS - 1}}}' if parallel else ""
        call = f'"[" {call} {more} "]"'
    count = "*" if parallel and tool_format == "hermes" else "?"
    if mark_id is not None:  # text never has it
        return "\n".join([f"start: TEXT (<[{mark_id}]> {call} TEXT){count}", "TEXT: /(?s:.*)/", *rules])
    mark = MARKS[tool_format]
    return "\n".join(
        [
            f"start: (begin {call}){count} TEXT",
            f"begin[suffix={_quoted(mark)}]: /(?s:.*)/",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){re.escape(mark)}(?s:.*)/",
            *rules,
        ]
    )


def _one_call(tool_format: ToolFormat, functions: Sequence[Function], rules: list[str]) -> str:
    """The rule of a call of one of the functions, behind its mark; adds the rules that it needs."""
    names = [_call(tool_format, number, function, rules) for number, function in enumerate(functions)]
    return " | ".join(names)


def _call(tool_format: ToolFormat, number: int, function: Function, rules: list[str]) -> str:
    """The name of the rule of one function's call."""
    name, parameters = function
    schema = _object_schema(name, parameters)
    rule, arguments = f"call_{number}", f"arguments_{number}"
    if tool_format == "pythonic":
        rules.append(f"{rule}: {_quoted(name + '(')} {_python_arguments(arguments, schema, rules)} {_quoted(')')}")
        return rule
    key = "parameters" if tool_format == "llama3_json" else "arguments"
    begin, end = f'{{"name": {json.dumps(name)}, "{key}": ', "}"
    if tool_format == "hermes":
        begin, end = "\n" + begin, end + "\n</tool_call>"
    rules += [f"{rule}: {_quoted(begin)} {arguments} {_quoted(end)}", f"{arguments}: {_json(schema)}"]
    return rule


def _call_or_answer(functions: Sequence[Function], answer: Mapping[str, Any]) -> dict[str, Any]:
    """One schema, because both begin with the same characters, and a lexer does not go back."""
    definitions = {"answer": _moved(answer, "answer")}
    choices: list[Any] = []
    for number, (name, parameters) in enumerate(functions):
        definitions[f"call_{number}"] = _moved(_object_schema(name, parameters), f"call_{number}")
        fields = {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/call_{number}"}}
        choices.append(
            {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        )
    return {"anyOf": [*choices, {"$ref": "#/$defs/answer"}], "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to itself changed for a place in another's ``$defs``."""
    if isinstance(schema, list):
        return [_moved(value, place) for value in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/{place}{reference[1:]}"
    return moved


def _python_arguments(prefix: str, schema: Mapping[str, Any], rules: list[str]) -> str:
    """Rules for ``a=1, b="x"``: the properties in their order, those that are not required perhaps left out.

    ``…_first_3`` stands where none of the properties before the third was written, ``…_more_3`` where one was.
    """
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ConfigError("a function's parameters must have properties (an object) and required (a list)")
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for number, (name, of_value) in enumerate(properties.items()):
        value = f"{prefix}_value_{number}"
        rules.append(f"{value}: {_python_value(of_value, definitions)}")
        first = f"{_quoted(name + '=')} {value} {prefix}_more_{number + 1}"
        more = f"{_quoted(', ' + name + '=')} {value} {prefix}_more_{number + 1}"
        if name not in required:
            first += f" | {prefix}_first_{number + 1}"
            more += f" | {prefix}_more_{number + 1}"
        rules += [f"{prefix}_first_{number}: {first}", f"{prefix}_more_{number}: {more}"]
    rules += [f'{prefix}_first_{len(properties)}: ""', f'{prefix}_more_{len(properties)}: ""']
    return f"{prefix}_first_0"


def _python_value(schema: Any, definitions: Mapping[str, Any]) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "boolean" and "enum" not in schema and "const" not in schema:
        return '"True" | "False"'
    if kind == "null":
        return '"None"'
    return _json({**schema, **definitions} if isinstance(schema, dict) else {})


def _object_schema(name: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = {"type": "object", **parameters}
    if schema["type"] != "object":
        raise ConfigError(f"the parameters of {name} have type={schema['type']!r:.40}; expected a schema of an object")
    return schema


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _COMPACT}, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

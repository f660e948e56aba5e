"""The parsers of tool calls: every format, cut at every character, and what only looks like a call."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from lightvllm.server.tool_calls import ToolFormat, write_calls
from lightvllm.server.tool_parsers import PARSERS

NAMES = ["get_weather", "add"]
CALLS: list[tuple[str, Any]] = [
    ("get_weather", {"city": 'Köln "am" \\ Rhein }] (東京', "days": [1, 2, {"x": None}]}),
    ("add", {}),
    ("add", {"a": -1.5, "b": True}),
]
FORMATS: list[ToolFormat] = ["hermes", "llama3_json", "mistral", "pythonic"]


def parse(tool_format: ToolFormat, pieces: list[str], parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Content, and (name, arguments) of each call; ids are unique and come first."""
    parser = PARSERS[tool_format](NAMES, parallel)
    content, calls, ids = "", list[tuple[str, str]](), set()
    for parsed in [*(parser.feed(piece) for piece in pieces), parser.finish()]:
        content += parsed.content
        for delta in parsed.calls:
            if delta.id is not None:
                assert delta.index == len(calls)
                assert delta.name
                ids.add(delta.id)
                calls.append((delta.name, ""))
            else:
                assert delta.name is None
                assert delta.index == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + delta.arguments
    assert len(ids) == len(calls)
    return content, calls


def everywhere(tool_format: ToolFormat, text: str, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """The result, which must be the same for the whole text, for single characters and for every cut in two."""
    whole = parse(tool_format, [text], parallel)
    assert parse(tool_format, list(text), parallel) == whole
    for cut in range(1, len(text)):
        assert parse(tool_format, [text[:cut], text[cut:]], parallel) == whole, f"cut at {cut}: {text[:cut]!r}"
    return whole


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_written_is_read(tool_format: ToolFormat, count: int) -> None:
    content, calls = everywhere(tool_format, write_calls(tool_format, CALLS[:count]))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in calls] == CALLS[:count]
    assert everywhere(tool_format, write_calls(tool_format, CALLS[:count]), parallel=False) == ("", calls[:1])


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Hello, world. \n",
        "  indented\n\nand more  ",
        '{"name": "unknown", "parameters": {}}',
        '{"city": "Köln"}',
        '{"name": 1}',
        "{",
        "[1, 2, 3]",
        "[unknown(a=1)]",
        "[add(1, 2)]",
        "[add(a=__import__('os'))]",
        "[add(a=1e999)]",
        "[add(**{})]",
        "[add(a=1",
        "[add",
        "<tool_call",
        "<tool_call>no JSON</tool_call>",
        "<tool_call>[]",
        "[TOOL_CALLS",
        "[TOOL_CALLS]",
        "[TOOL_CALLS] nothing",
        "[TOOL_CALLS][1]",
        "[TOOL_CALLS]add[ARGS",
        "<|python_tag|>print('x')",
        "<|python_",
        "a < b <tool",
    ],
)
def test_what_is_no_call_is_text(tool_format: ToolFormat, text: str) -> None:
    assert everywhere(tool_format, text) == (text, [])


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "calls"),
    [
        (
            "hermes",
            'I look.\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n Done.',
            "I look.Done.",
            [("add", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [("other", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}', "", [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": [', "", [("add", '{"a": [')]),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": {}, bad}</tool_call>x',
            "x",
            [("add", "{}")],
        ),
        (
            "hermes",
            '<tool_call>{"name": "add", "arguments": {}} <tool_call>{"name": "add", "arguments": {}}',
            "",
            [("add", "{}"), ("add", "{}")],
        ),
        ("llama3_json", '<|python_tag|>{"name": "other", "parameters": {}}', "", [("other", "{}")]),
        ("llama3_json", 'Well: <|python_tag|>{"name": "add", "parameters": {"a": 1}}', "Well:", [("add", '{"a": 1}')]),
        ("llama3_json", '\n{"type": "function", "name": "add", "parameters": {}} ok', "ok", [("add", "{}")]),
        ("mistral", 'Yes.[TOOL_CALLS] [{"name": "add", "arguments": {}}]', "Yes.", [("add", "{}")]),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": "}"}', "", [("add", '{"a": "}"}')]),
        (
            "mistral",
            '[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{}[TOOL_CALLS]add{"a": 1}',
            "",
            [("add", "{}"), ("add", '{"a": 1}')],
        ),
        ("mistral", "[TOOL_CALLS][] nothing", " nothing", []),
        ("hermes", '<tool_call>{"name": "add", ', "", [("add", "")]),
        ("llama3_json", '{"name": "add"', "", [("add", "")]),
        ("pythonic", "\n[add(a=true, b=None), add()]", "", [("add", '{"a": true, "b": null}'), ("add", "{}")]),
        ("pythonic", "[add(a='x)', b=(1, -2))] bye", "bye", [("add", '{"a": "x)", "b": [1, -2]}')]),
    ],
)
def test_what_models_write(tool_format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert everywhere(tool_format, text) == (content, calls)


def test_arguments_are_given_on_as_they_come() -> None:
    parser = PARSERS["hermes"](NAMES)
    assert parser.feed('Hi <tool_call>{"name": "add", "argum').calls[0].name == "add"
    assert [delta.arguments for delta in parser.feed('ents": {"a": ').calls] == ['{"a": ']
    assert [delta.arguments for delta in parser.feed("12").calls] == ["12"]
    assert [delta.arguments for delta in parser.feed("}}</tool").calls] == ["}"]


def test_ids_are_what_the_templates_take() -> None:
    def first_id(tool_format: ToolFormat) -> str:
        given = PARSERS[tool_format](NAMES).feed(write_calls(tool_format, CALLS[:1])).calls[0].id
        assert given
        return given

    assert first_id("hermes").startswith("call_")
    assert len(first_id("mistral")) == 9
    assert first_id("mistral").isalnum()


@pytest.mark.parametrize("tool_format", PARSERS)
def test_long_arguments_are_read_in_linear_time(tool_format: ToolFormat) -> None:
    begun = time.process_time()
    parser = PARSERS[tool_format](("f",))
    parsed = parser.feed(write_calls(tool_format, [("f", {"x": "a" * 1_000_000})]))
    parser.finish()
    assert sum(len(call.arguments) for call in parsed.calls) > 1_000_000
    assert time.process_time() - begun < 10  # a text that is copied for each of its characters takes minutes

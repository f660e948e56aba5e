"""Tools of a chat request: in which format the model writes calls, what it is told, and what it is held to.

A chat template that knows ``tools`` shows them to the model itself, and its text tells the format of the calls
(``detect``). Without such a template the tools are described in the system message, in Hermes' format unless the server
was started with another ``tool_call_parser``, and earlier calls and results are written as text. A forced choice
(``required``, a named function) becomes a grammar of that format with the tools' parameter schemas in it; so do calls
of ``strict`` tools, where the format marks calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightvllm.engine.protocol import EngineClient
from lightvllm.errors import ConfigError
from lightvllm.sampling_params import StructuredOutputs
from lightvllm.server import tool_grammar
from lightvllm.server.chat_protocol import ChatCompletionRequest, NamedToolChoice, Tool
from lightvllm.server.errors import ApiError
from lightvllm.server.settings import ServerSettings
from lightvllm.server.tool_calls import ToolFormat, ToolParser, write_calls
from lightvllm.server.tool_parsers import PARSERS

NONE: Literal["none"] = "none"
"""Of the setting ``tool_call_parser``: there are no tools."""

_PYTHONIC = re.compile(r"\[func_name1?\(")
_FOREIGN = ("<function=", "<arg_key>", "<｜tool", "<|tool_calls_section")
"""Of formats that have no parser here, although their templates share a mark with one that has."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request uses tools.

    Attributes:
        format: of the calls.
        native: the chat template shows the tools by itself.
        tools: as the template takes them; empty if the model shall not see any.
        names: of the functions.
        parallel: more than one call may come.
        grammar: what a forced choice is held to, or calls of tools that are ``strict``.
        marked: calls are marked by a special token, which the text must show.
    """

    format: ToolFormat
    native: bool
    tools: Sequence[dict[str, Any]]
    names: tuple[str, ...]
    parallel: bool
    grammar: StructuredOutputs | None
    marked: bool

    @property
    def active(self) -> bool:
        """Whether there are tools that the model may call."""
        return bool(self.tools)

    def parser(self) -> ToolParser:
        return PARSERS[self.format](self.names, self.parallel)


def check_format(name: str | None) -> ToolFormat | Literal["none"] | None:
    """The setting ``tool_call_parser``; ``"auto"`` is None. Raises ConfigError for another word."""
    for known in (*PARSERS, NONE):
        if name == known:
            return known
    if name not in (None, "auto"):
        raise ConfigError(f"tool_call_parser={name!r} is not known; use auto, {', '.join(PARSERS)} or none")
    return None


def detect(chat_template: str) -> ToolFormat | None:
    """The format that a chat template writes calls in; None if it is none of ours."""
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if any(mark in chat_template for mark in _FOREIGN):
        return None
    if _PYTHONIC.search(chat_template):
        return "pythonic"
    if "<tool_call>" in chat_template:
        return "hermes"
    if "<|python_tag|>" in chat_template or '"parameters":' in chat_template:
        return "llama3_json"
    return None


def tool_use(
    request: ChatCompletionRequest,
    engine: EngineClient,
    settings: ServerSettings,
    answer: StructuredOutputs | None,
) -> ToolUse:
    """What the request's tool fields come to.

    Args:
        answer: the form that a plain answer must have; with tools the model may call or answer in that form.

    Raises ApiError 400 where the fields contradict each other, or the format is not known.
    """
    tools, choice = request.tools or [], request.tool_choice
    names = tuple(tool.function.name for tool in tools)
    if len(set(names)) < len(names):
        raise ApiError(400, f"two tools have the same name: {', '.join(names)}", param="tools")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise ApiError(
            400,
            f"tool_choice names {choice.function.name!r}, which is not among the tools ({', '.join(names) or 'none'})",
            param="tool_choice",
        )
    if choice in ("auto", "required") and not tools:
        raise ApiError(400, f"tool_choice={choice!r} needs tools", param="tool_choice")
    source = settings.chat_template or engine.tokenizer.chat_template or ""
    native = "tools" in engine.tokenizer.template_variables(settings.chat_template) if source else False
    active = [] if choice == "none" else tools
    tool_format = _format(settings, source, native=native, needed=bool(active))
    parallel = request.parallel_tool_calls is not False
    grammar = None
    if active and (choice == "required" or isinstance(choice, NamedToolChoice)):
        if answer is not None:
            raise ApiError(
                400, "a forced tool_choice leaves no room for another form of the answer", param="tool_choice"
            )
        forced = [
            t for t in active if not isinstance(choice, NamedToolChoice) or t.function.name == choice.function.name
        ]
        grammar = _grammar(engine, tool_format, forced, parallel=parallel)
    elif active and answer is not None:
        if not (answer.json or answer.json_object):
            raise ApiError(400, f"{answer.kind} and tools exclude each other; use a JSON schema", param="tools")
        schema = {"type": "object"} if answer.json_object else json.loads(str(answer.json))
        grammar = _grammar(engine, tool_format, active, parallel=parallel, answer=schema)
    elif tool_format in tool_grammar.MARKS and any(tool.function.strict for tool in active):
        grammar = _grammar(engine, tool_format, active, parallel=parallel, forced=False)
    return ToolUse(
        format=tool_format,
        native=native,
        tools=[_described(tool) for tool in active],
        names=names,
        parallel=parallel,
        grammar=grammar,
        marked=engine.tokenizer.token_id(PARSERS[tool_format].opening) in engine.tokenizer.special_token_ids,
    )


def _format(settings: ServerSettings, chat_template: str, *, native: bool, needed: bool) -> ToolFormat:
    chosen = check_format(settings.tool_call_parser) or (detect(chat_template) if native else "hermes")
    if chosen == "none":
        if needed:
            raise ApiError(400, "this server was started with tool_call_parser=none; leave tools out", param="tools")
        return "hermes"
    if chosen is None:
        if needed:
            raise ApiError(
                400,
                "it is not known how this model writes tool calls; the server must be started with tool_call_parser, "
                f"one of {', '.join(PARSERS)}",
                param="tools",
            )
        return "hermes"
    return chosen


def _grammar(
    engine: EngineClient,
    tool_format: ToolFormat,
    tools: Sequence[Tool],
    *,
    parallel: bool,
    forced: bool = True,
    answer: dict[str, Any] | None = None,
) -> StructuredOutputs:
    """Of calls, or of an ``answer``; not ``forced``: of text with calls, in which those of strict tools are valid."""
    mark = tool_grammar.MARKS.get(tool_format)
    token_id = engine.tokenizer.token_id(mark) if mark else None
    if token_id not in engine.tokenizer.special_token_ids:
        token_id = None  # an ordinary token is part of the text
    try:
        if forced:
            functions = [(tool.function.name, tool.function.parameters) for tool in tools]
            text = tool_grammar.grammar(tool_format, functions, parallel=parallel, mark_id=token_id, answer=answer)
        else:
            anything = {"type": "object"}
            functions = [(t.function.name, t.function.parameters if t.function.strict else anything) for t in tools]
            text = tool_grammar.text_with_calls(tool_format, functions, parallel=parallel, mark_id=token_id)
        return StructuredOutputs(grammar=text)
    except ConfigError as error:
        raise ApiError(400, str(error), param="tools") from None
    except RecursionError:
        raise ApiError(400, "a schema is nested too deeply", param="tools") from None


def _described(tool: Tool) -> dict[str, Any]:
    described = tool.model_dump(exclude_unset=True, by_alias=True)
    described["function"].pop("strict", None)
    return described


def instructions(use: ToolUse) -> str:
    """What the system message says of the tools, where the chat template has no place for them."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in use.tools)
    example = write_calls(use.format, [("function_name", {"parameter": "value"})])
    several = " Call several functions by several of them." if use.parallel else " Call one function only."
    return (
        "You can call functions to help with the user's request. They are, one a line, with a JSON schema of their "
        f"parameters:\n<tools>\n{listed}\n</tools>\n\n"
        f"To call a function, answer with nothing but this form, filled in:\n{example}\n{several.strip()}"
    )

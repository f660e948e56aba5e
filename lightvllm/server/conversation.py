"""The messages of a chat request as its model's chat template takes them, and the prompt that it makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lightvllm.engine.protocol import EngineClient
from lightvllm.errors import ConfigError
from lightvllm.server.chat_protocol import AssistantMessage, ChatCompletionRequest, ChatMessage, RefusalPart, TextPart
from lightvllm.server.errors import ApiError
from lightvllm.server.settings import ServerSettings
from lightvllm.server.tool_calls import ToolFormat, write_calls
from lightvllm.server.tools import ToolUse, instructions


def prompt_text(request: ChatCompletionRequest, engine: EngineClient, settings: ServerSettings, use: ToolUse) -> str:
    """The prompt; raises ApiError 400 for what the template does not know or refuses."""
    tokenizer = engine.tokenizer
    try:
        variables = tokenizer.template_variables(settings.chat_template)
    except ConfigError as error:
        raise ApiError(400, str(error), param="messages") from None
    extra: dict[str, Any] = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        extra["reasoning_effort"] = request.reasoning_effort
    for name, given in (("reasoning_effort", request.reasoning_effort), ("documents", request.documents)):
        if given is not None and name not in variables:
            raise ApiError(400, f"this model's chat template does not know {name}; leave it out", param=name)
    source = settings.chat_template or tokenizer.chat_template or ""
    messages = [
        _message(message, number, native=use.native, tool_format=use.format, knows_developer="developer" in source)
        for number, message in enumerate(request.messages)
    ]
    if not use.native:
        messages = _with_instructions(_results_as_text(messages), use)
    continued = bool(request.continue_final_message)
    if continued and request.add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message and add_generation_prompt exclude each other; use one",
            param="continue_final_message",
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            not continued if request.add_generation_prompt is None else request.add_generation_prompt,
            tools=use.tools or None if use.native else None,
            documents=request.documents,
            continue_final_message=continued,
            chat_template=settings.chat_template,
            template_kwargs=extra,
        )
    except ConfigError as error:
        raise ApiError(400, str(error), param="messages") from None


def _message(
    message: ChatMessage, number: int, *, native: bool, tool_format: ToolFormat, knows_developer: bool
) -> dict[str, Any]:
    given = message.model_dump(exclude_unset=True)
    given["content"] = _text(message.content)
    if message.role == "developer" and not knows_developer:
        given["role"] = "system"
    if isinstance(message, AssistantMessage):
        given.pop("tool_calls", None)
        given.pop("audio", None)
        given.pop("function_call", None)
        refusal = given.pop("refusal", None)
        if given["content"] is None and refusal is not None:
            given["content"] = refusal
        calls = [
            (
                call.id,
                call.function.name,
                _arguments(call.function.arguments, f"messages[{number}].tool_calls[{index}]"),
            )
            for index, call in enumerate(message.tool_calls or ())
        ]
        if calls and native:
            given["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call_id, name, arguments in calls
            ]
        elif calls:
            written = write_calls(tool_format, [(name, arguments) for _, name, arguments in calls])
            given["content"] = "\n".join(filter(None, (given["content"], written)))
        if given["content"] is None and "tool_calls" not in given:  # templates tell calls from text by it
            given["content"] = ""
    return given


def _text(content: str | Sequence[TextPart | RefusalPart] | None) -> str | None:
    """Parts are put together with line breaks between them."""
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _arguments(text: str, param: str) -> dict[str, Any]:
    """Templates write arguments as JSON by themselves, and so take them as a mapping."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(
            400, f"{param}.function.arguments is {text!r:.80}; expected a JSON object as text", param="messages"
        )
    return arguments


def _results_as_text(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool messages as the user's, neighbours in one: templates without tools often want user and assistant in turn."""
    turned: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        if message["role"] != "tool":
            turned.append(message)
            after_result = False
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if after_result:
            turned[-1]["content"] += "\n" + text
        else:
            turned.append({"role": "user", "content": text})
        after_result = True
    return turned


def _with_instructions(messages: list[dict[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
    if not use.active:
        return messages
    told = instructions(use)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": told}, *messages]
    first = {**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}
    return [first, *messages[1:]]

"""A question as a chat completion, and its answer: text, or an instance of a pydantic class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import pydantic

from lightvllm.client.http import Http
from lightvllm.errors import ConfigError, InvalidOutput, ServerError

Model = TypeVar("Model", bound=pydantic.BaseModel)
Prompt = str | Sequence[Mapping[str, Any]]
"""What a user says, or the messages of a conversation as OpenAI has them."""

PATH = "chat/completions"
_OURS = ("messages", "model", "n", "response_format", "stream", "stream_options")
_LONGEST_NAME = 64  # of a schema, by OpenAI's rule
_VALUES = ("const", "default", "enum", "examples")  # of a schema: what they hold is no schema


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message = msgspec.field(default_factory=_Message)
    delta: _Message = msgspec.field(default_factory=_Message)
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    """An answer, or a chunk of one."""

    choices: list[_Choice] = []


class _Card(msgspec.Struct):
    id: str


class _Cards(msgspec.Struct):
    data: list[_Card]


_completion = msgspec.json.Decoder(_Completion)


def question(
    prompt: Prompt,
    system: str | None,
    structured_output: type[pydantic.BaseModel] | None,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """The body of the request, without the model. Raises ConfigError."""
    for name in sampling:
        if name in _OURS:
            hint = "use structured_output, or the openai package" if name == "response_format" else "leave it out"
            raise ConfigError(f"{name} cannot be given here; {hint}")
    body: dict[str, Any] = {"messages": _messages(prompt, system), **sampling}
    if structured_output is not None:
        given: Any = structured_output
        if not (isinstance(given, type) and issubclass(given, pydantic.BaseModel)):
            raise ConfigError(f"structured_output={given!r}; expected a class derived from BaseModel")
        name = re.sub(r"\W", "_", structured_output.__name__, flags=re.ASCII)[:_LONGEST_NAME]
        try:
            schema = structured_output.model_json_schema()
        except pydantic.PydanticUserError as error:
            raise ConfigError(f"{structured_output.__name__} has no JSON schema: {error.message}") from None
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": name, "schema": _closed(schema), "strict": True},
        }
    return body


def _closed(schema: Any) -> Any:
    """The schema without room for properties that the class does not have: pydantic would drop them."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: part if name in _VALUES else _closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **closed} if closed.get("type") == "object" else closed


def _messages(prompt: Prompt, system: str | None) -> list[Mapping[str, Any]]:
    given: Any = prompt
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not (isinstance(messages, Sequence) and messages and all(isinstance(one, Mapping) for one in messages)):
        raise ConfigError(f"a prompt is {given!r:.80}; expected text, or a list of messages with role and content")
    messages = list(messages)
    if system is None:
        return messages
    if messages[0].get("role") == "system":
        raise ConfigError("system is given, but the messages begin with a system message; leave one out")
    return [{"role": "system", "content": system}, *messages]


async def ask(
    http: Http,
    body: dict[str, Any],
    structured_output: type[Model] | None,
    receive: Callable[[str], None] | None = None,
) -> str | Model:
    """The answer. If there is ``receive``, it is streamed, and its text handed on as it comes."""
    parts: list[str] = []
    reason: str | None = None

    def read(data: bytes | str) -> None:
        nonlocal reason
        try:
            completion = _completion.decode(data)
        except msgspec.MsgspecError as error:
            raise ServerError(f"{http.url} sent what is no chat completion: {error}") from None
        for choice in completion.choices[:1]:
            text = choice.message.content or choice.delta.content
            reason = choice.finish_reason or reason
            if text:
                parts.append(text)
                if receive is not None:
                    receive(text)

    if receive is None:
        read(await http.request("POST", PATH, body))
    else:
        await http.stream(PATH, {**body, "stream": True}, read)
    if reason is None:
        raise ServerError(f"{http.url} sent a chat completion without finish_reason: it is not whole")
    text = "".join(parts)
    return text if structured_output is None else _parse(text, structured_output, reason)


def _parse(text: str, structured_output: type[Model], reason: str) -> Model:
    try:
        return structured_output.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        why = f"{where}: {first['msg']}" if where else first["msg"]
        hint = "; the text was cut off: raise max_tokens" if reason == "length" else ""
        raise InvalidOutput(f"the model wrote no {structured_output.__name__}: {why}{hint}", text, reason) from None


async def only_model(http: Http) -> str:
    """The model that the server has. Raises ConfigError if it has several."""
    try:
        names = [card.id for card in msgspec.json.decode(await http.request("GET", "models"), type=_Cards).data]
    except msgspec.MsgspecError as error:
        raise ServerError(f"{http.url}/models sent what is no list of models: {error}") from None
    if len(names) != 1:
        raise ConfigError(f"{http.url} serves {', '.join(names) or 'no model'}; say which with model=…")
    return names[0]

"""Chat completions of OpenAI's API as pydantic models; see ``protocol.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Tag

from lightvllm.sampling_params import MAX_LOGPROBS
from lightvllm.server.protocol import (
    INT64,
    NAME,
    ONE_ERROR,
    AnswerModel,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    RequestModel,
    Usage,
    at_most,
    refused,
    told_apart_by,
)

MAX_MESSAGES = 16_384
MAX_METADATA = 16
MAX_TOOLS = 128


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class RefusalPart(RequestModel):
    type: Literal["refusal"]
    refusal: str


def _only_text(content: Any) -> Any:
    if isinstance(content, list):
        for number, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "refusal"):
                raise ValueError(f"part {number} is of type {kind!r:.40}; this server takes text only")
    return content


_Parts = Annotated[list[TextPart], Field(min_length=1), ONE_ERROR]
_TextContent = Annotated[str | _Parts, BeforeValidator(_only_text)]


class _Message(RequestModel):
    model_config = ConfigDict(extra="allow")  # what else the model's chat template knows

    name: str | None = None


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: _TextContent


class UserMessage(_Message):
    role: Literal["user"]
    content: _TextContent


class FunctionCallRequest(RequestModel):
    name: str = Field(min_length=1)
    arguments: str = Field(description="A JSON object, as text.")


class ToolCallRequest(RequestModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCallRequest


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: Annotated[
        str | Annotated[list[TextPart | RefusalPart], Field(min_length=1), ONE_ERROR] | None,
        BeforeValidator(_only_text),
    ] = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCallRequest], ONE_ERROR] | None = None
    audio: refused("this server takes text only") = None  # type: ignore[valid-type]
    function_call: refused("use tool_calls in place of function_call") = None  # type: ignore[valid-type]


class ToolMessage(_Message):
    role: Literal["tool"]
    content: _TextContent
    tool_call_id: str = ""


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("SystemMessage")]
    | Annotated[UserMessage, Tag("UserMessage")]
    | Annotated[AssistantMessage, Tag("AssistantMessage")]
    | Annotated[ToolMessage, Tag("ToolMessage")],
    told_apart_by(
        "role",
        system="SystemMessage",
        developer="SystemMessage",
        user="UserMessage",
        assistant="AssistantMessage",
        tool="ToolMessage",
    ),
]


class FunctionDefinition(RequestModel):
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object; null takes no arguments.")
    strict: bool | None = Field(
        None,
        description="The arguments follow the schema also when the call is not forced, in formats that mark calls "
        "(hermes, mistral). Those of forced calls always do.",
    )


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(RequestModel):
    name: str


class NamedToolChoice(RequestModel):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), ONE_ERROR]
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64, description="Default: the rest of the context.")
    max_tokens: int | None = Field(None, ge=1, le=INT64, description="The older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Needs logprobs=true.")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), ONE_ERROR] | None = None
    tool_choice: ToolChoice | None = Field(None, description='Default "auto" if there are tools.')
    parallel_tool_calls: bool | None = Field(None, description="Default true.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="For the chat template; an error if that does not know it."
    )
    modalities: Annotated[list[Literal["text"]], Field(min_length=1), ONE_ERROR] | None = None
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)] | None = Field(
        None, description="Has no effect."
    )
    prediction: dict[str, Any] | None = Field(None, description="Has no effect.")
    prompt_cache_key: str | None = Field(None, description="Has no effect.")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="Has no effect.")
    prompt_cache_retention: str | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")
    service_tier: str | None = Field(None, description="Has no effect.")
    functions: refused("use tools in place of functions") = None  # type: ignore[valid-type]
    function_call: refused("use tool_choice in place of function_call") = None  # type: ignore[valid-type]
    audio: refused("this server answers with text only") = None  # type: ignore[valid-type]
    web_search_options: refused("this server does not search the web") = None  # type: ignore[valid-type]
    moderation: refused("this server does not moderate") = None  # type: ignore[valid-type]
    verbosity: refused("ask for it in a system message") = None  # type: ignore[valid-type]

    add_generation_prompt: bool | None = Field(None, description="Default true, unless continue_final_message.")
    continue_final_message: bool | None = Field(None, description="Go on where the last message ends.")
    add_special_tokens: bool | None = Field(None, description="Default false: the template writes its own.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More names for the chat template.")
    documents: Annotated[list[dict[str, Any]], ONE_ERROR] | None = Field(
        None, description="For templates that know documents."
    )


class FunctionCall(AnswerModel):
    name: str
    arguments: str


class ToolCall(AnswerModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatAnswer(AnswerModel):
    role: str
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(AnswerModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerModel):
    content: list[TokenLogprob]
    refusal: None


class ChatChoice(AnswerModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionResponse(AnswerModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None

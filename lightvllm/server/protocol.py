"""Requests and answers of OpenAI's API as pydantic models: what all endpoints share, completions, embeddings, models.

Field names, shapes and bounds are OpenAI's (platform.openai.com/docs/api-reference); vLLM's additions keep their names
where they mean the same. A field that is not listed is an error, so that no option is silently without effect;
docs/openai-api.md says which ones are taken for compatibility and change nothing. Chat is in ``chat_protocol.py``.

An answer is written with ``exclude_unset``: a field that OpenAI always sends is set, to None if need be; one that was
not asked for is left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)

from lightvllm.engine.intake import MAX_PRIORITY
from lightvllm.sampling_params import MAX_LOGPROBS

INT64 = 2**63 - 1
MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 64
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIAS_TOKENS = 4096
MAX_FIELDS = 256
"""Of one object of a request. Each unknown one is an error by itself, and a body has room for millions."""

NAME = r"^[a-zA-Z0-9_.-]{1,64}$"

FinishReason = Literal["stop", "length", "tool_calls"]
TokenId = Annotated[int, Field(ge=0, le=INT64)]
ONE_ERROR: Any = Field(fail_fast=True)
"""Of a list: the first wrong item is told and ends it. Otherwise a body of millions of wrong ones makes as many errors,
a kilobyte each."""

TokenIds = Annotated[list[TokenId], Field(min_length=1), ONE_ERROR]
Text = Annotated[str, StringConstraints(min_length=1)]


def at_most(count: int) -> BeforeValidator:
    """Of a mapping: told before its items are looked at, each of which may be wrong."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"{len(value)} entries are given; the most allowed are {count}")
        return value

    return BeforeValidator(check)


def refused(advice: str) -> Any:
    """The type of a field that OpenAI has and this server has not: null, or an error that gives the advice."""

    def refuse(value: Any) -> None:
        def fail() -> NoReturn:
            raise ValueError(advice)

        return None if value is None else fail()

    return Annotated[None, BeforeValidator(refuse), WithJsonSchema({"type": "null", "description": advice})]


def told_apart_by(field: str, **models: str) -> Discriminator:
    """For a union of models whose ``field`` tells which it is; ``models`` gives each value's ``Tag``.

    Tags are class names, which errors leave out of the path to a wrong field, as they are none of the request's.
    """

    def tag(value: Any) -> str | None:
        kind = value.get(field) if isinstance(value, dict) else getattr(value, field, None)
        return models.get(kind) if isinstance(kind, str) else None

    return Discriminator(
        tag,
        custom_error_type="unknown_kind",
        custom_error_message=f"Input should be an object whose {field} is {', '.join(models)}",
    )


class RequestModel(BaseModel):
    """Of a request: nothing unknown, nothing coerced, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"an object has {len(value)} fields; the most allowed are {MAX_FIELDS}")
        return value


class AnswerModel(BaseModel):
    """Of an answer."""

    model_config = ConfigDict(protected_namespaces=())

    def encode(self) -> bytes:
        """As JSON, without what is not set."""
        return self.model_dump_json(exclude_unset=True).encode()


class StreamOptions(RequestModel):
    include_usage: bool | None = Field(None, description="Send a last chunk without choices that has the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Send the usage so far with every chunk (vLLM's).")
    include_obfuscation: Literal[False] | None = Field(None, description="There is no obfuscation.")


class JsonSchemaFormat(RequestModel):
    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer follows the schema either way.")


class TextFormat(RequestModel):
    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]


class JsonSchemaResponseFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: JsonSchemaFormat


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("TextFormat")]
    | Annotated[JsonObjectFormat, Tag("JsonObjectFormat")]
    | Annotated[JsonSchemaResponseFormat, Tag("JsonSchemaResponseFormat")],
    told_apart_by("type", text="TextFormat", json_object="JsonObjectFormat", json_schema="JsonSchemaResponseFormat"),
]


class StructuredOutputsRequest(RequestModel):
    """vLLM's ``structured_outputs``: exactly one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1), ONE_ERROR] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class GenerationRequest(RequestModel):
    """What completions and chat completions have in common."""

    model: str | None = Field(None, description="One of /v1/models; null takes the one there is.")
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; below 0.00001 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS), ONE_ERROR] | None = None
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS_TOKENS),
            at_most(MAX_LOGIT_BIAS_TOKENS),
        ]
        | None
    ) = Field(None, description="By token id.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="Has no effect.")

    top_k: int | None = Field(None, ge=-1, le=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0, le=INT64)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS), ONE_ERROR] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Text], ONE_ERROR] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="Default true.")
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Not with stream.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=INT64, description="Keep so many of the prompt's last tokens; -1: as many as fit."
    )
    structured_outputs: StructuredOutputsRequest | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1), ONE_ERROR] | None = None
    guided_grammar: Text | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Lower goes first; default 0.")
    timeout: float | None = Field(None, gt=0, description="Seconds; after them the request fails with status 408.")
    return_token_ids: bool | None = Field(None, description="Send the token ids, too.")
    return_tokens_as_token_ids: bool | None = Field(None, description='Write tokens in logprobs as "token_id:5".')

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), ONE_ERROR]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), ONE_ERROR]
    )
    max_tokens: int | None = Field(None, ge=0, le=INT64, description="Default 16.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="At least n; not with stream.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = Field(None, description="Default true: a beginning-of-text token, say.")
    suffix: refused("this server has no insertion; put the suffix into the prompt") = None  # type: ignore[valid-type]


class PromptTokensDetails(AnswerModel):
    cached_tokens: int


class Usage(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class PromptLogprob(AnswerModel):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(AnswerModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(AnswerModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionResponse(AnswerModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class EmbeddingRequest(RequestModel):
    model: str | None = Field(None, description="One of /v1/models; null takes the one there is.")
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), ONE_ERROR]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), ONE_ERROR]
    )
    encoding_format: Literal["float", "base64"] | None = Field(None, description="Default float.")
    dimensions: int | None = Field(None, ge=1, le=INT64, description="Only the model's own size.")
    user: str | None = Field(None, description="Has no effect.")
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Lower goes first; default 0.")


class Embedding(AnswerModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Or little-endian 32-bit floats in base64.")


class EmbeddingUsage(AnswerModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(AnswerModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class ModelCard(AnswerModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(AnswerModel):
    object: Literal["list"]
    data: list[ModelCard]

"""From a request's fields to what the engine takes: model name, prompt tokens, ``SamplingParams``, time-out.

What cannot be met is an ``ApiError`` 400 that names the field. No HTTP here; run-batch uses it, too.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from lightvllm.engine.protocol import EngineClient
from lightvllm.engine.structured import check_structured
from lightvllm.errors import ConfigError, MissingExtra
from lightvllm.sampling_params import SamplingParams, StructuredOutputs
from lightvllm.server.errors import ApiError, as_api_error
from lightvllm.server.protocol import GenerationRequest, JsonObjectFormat, JsonSchemaResponseFormat
from lightvllm.server.settings import ServerSettings
from lightvllm.version import __version__

LONG_TEXT = 4_000
"""Characters from which a text is tokenized in a thread, so that other streams go on meanwhile."""

MAX_TEXT = 4 << 20
"""Characters that are tokenized whatever the context, about two seconds and some hundred MB: a thread that tokenizes
cannot be called off. Beyond it, ``TEXT_PER_TOKEN`` for each token of the context."""

TEXT_PER_TOKEN = 16

GREEDY_BELOW = 1e-5
"""Temperatures that are so low that logits divided by them would be out of range (vLLM's bound)."""

_BLAMED = re.compile(r"([a-z_]+)(\[[^]]*\])?=")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every answer and every chunk of a request begins with.

    Attributes:
        id: ``"cmpl-…"`` or ``"chatcmpl-…"``, with the request's id behind it.
        engine_id: what the engine knows the request by; a client may repeat its own id while the first still runs.
        created: seconds since 1970.
        model: as the request calls it.
        system_fingerprint: version and layout, which decide the arithmetic.
    """

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    engine_id: str = ""


def answer_head(prefix: str, model: str, engine: EngineClient, request_id: str | None) -> AnswerHead:
    """``request_id`` None has one made."""
    layout = engine.info.config.parallel
    sizes = f"tp{layout.tensor_parallel_size}-pp{layout.pipeline_parallel_size}"
    answer_id = f"{prefix}-{request_id or secrets.token_hex(16)}"
    return AnswerHead(
        id=answer_id,
        model=model,
        system_fingerprint=f"lightvllm-{__version__}-{sizes}",
        engine_id=f"{answer_id}-{secrets.token_hex(4)}" if request_id else answer_id,
    )


def served_names(engine: EngineClient, settings: ServerSettings) -> tuple[str, ...]:
    """What requests may call the model."""
    return settings.served_model_names or (engine.info.model,)


def check_model(name: str | None, engine: EngineClient, settings: ServerSettings) -> str:
    """The name that the answer gives; raises ApiError 404 for a model that is not served."""
    names = served_names(engine, settings)
    if name is None:
        return names[0]
    if name not in names:
        raise ApiError(
            404,
            f"the model {name!r:.200} does not exist; this server has {', '.join(names)}",
            param="model",
            code="model_not_found",
        )
    return name


def check_generates(engine: EngineClient) -> None:
    if not engine.info.can_generate:
        raise ApiError(400, f"{engine.info.model} generates no text; use /v1/embeddings", param="model")


async def encode(
    engine: EngineClient, text: str, add_special_tokens: bool, param: str, *, to_fit: bool = False
) -> list[int]:
    """Token ids of ``text``; ``param`` is where it stood in the request.

    With ``to_fit``, text that is too long for the context however it is tokenized is refused at once: to tokenize a
    megabyte takes seconds.
    """
    await asyncio.sleep(0)  # between the texts of one request, others have their turn
    limit = engine.info.config.model.max_model_len
    if to_fit and len(text) >= LONG_TEXT and len(text) > limit * (engine.tokenizer.longest_token or len(text)):
        raise ApiError(
            400,
            f"this model's context is {limit} tokens, in which the prompt's {len(text)} characters cannot fit; "
            "shorten it",
            param=param,
            code="context_length_exceeded",
        )
    most = max(MAX_TEXT, limit * TEXT_PER_TOKEN)
    if len(text) > most:
        raise ApiError(
            400, f"the text has {len(text)} characters, of which this server tokenizes {most} at most", param=param
        )
    try:
        if len(text) < LONG_TEXT:
            return engine.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(engine.tokenizer.encode, text, add_special_tokens)
    except ConfigError as error:
        raise ApiError(400, str(error), param=param) from None


def fit(token_ids: list[int], engine: EngineClient, request: GenerationRequest, param: str) -> list[int]:
    """The prompt as it goes to the engine: truncated if the request wants it, and within the context."""
    keep = request.truncate_prompt_tokens
    if keep is not None:
        keep = engine.info.config.model.max_model_len - 1 if keep == -1 else keep
        token_ids = token_ids[-keep:] if keep else []
    check_length(token_ids, engine, param)
    return token_ids


def check_length(token_ids: list[int], engine: EngineClient, param: str, room: int = 1) -> None:
    """Not empty, and with ``room`` for so many more tokens; raises ApiError 400."""
    context = engine.info.config.model.max_model_len
    if not token_ids:
        raise ApiError(400, "the prompt is empty; give at least one token", param=param)
    if len(token_ids) > context - room:
        raise ApiError(
            400,
            f"this model's context is {context} tokens, and the prompt alone has {len(token_ids)}; shorten it to "
            f"{context - room} or less",
            param=param,
            code="context_length_exceeded",
        )


def structured_outputs(request: GenerationRequest) -> tuple[StructuredOutputs | None, str | None]:
    """From ``response_format``, ``structured_outputs`` or one of ``guided_…``, and from which; two are an error."""
    given: dict[str, StructuredOutputs] = {}
    wanted = request.response_format
    if isinstance(wanted, JsonObjectFormat):
        given["response_format"] = StructuredOutputs(json_object=True)
    elif isinstance(wanted, JsonSchemaResponseFormat):
        if wanted.json_schema.schema_ is None:
            raise ApiError(
                400, "json_schema has no schema; give response_format.json_schema.schema", param="response_format"
            )
        given["response_format"] = _structured("response_format", json=wanted.json_schema.schema_)
    if (form := request.structured_outputs) is not None:
        given["structured_outputs"] = _structured(
            "structured_outputs",
            json=form.json_,
            regex=form.regex,
            choice=form.choice,
            grammar=form.grammar,
            json_object=bool(form.json_object),
        )
    for name in ("json", "regex", "choice", "grammar"):
        if (value := getattr(request, f"guided_{name}")) is not None:
            given[f"guided_{name}"] = _structured(f"guided_{name}", **{name: value})
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} exclude each other; use one", param=list(given)[1])
    return next(((form, name) for name, form in given.items()), (None, None))


def _structured(param: str, **form: Any) -> StructuredOutputs:
    try:
        return StructuredOutputs(**form)
    except ConfigError as error:
        raise ApiError(400, str(error), param=param) from None


async def check_form(structured: StructuredOutputs | None, engine: EngineClient, param: str | None) -> None:
    """Refuse what no grammar can be made of; in a thread, because that may take a while, which the engine then saves.

    Raises ApiError 400.
    """
    if structured is None:
        return
    try:
        await asyncio.to_thread(check_structured, structured, engine.info.config.model)
    except ConfigError as error:
        raise ApiError(400, str(error), param=param) from None


def check_logprobs(count: int | None, settings: ServerSettings, param: str) -> None:
    if count is not None and count > settings.max_logprobs:
        raise ApiError(
            400, f"{param}={count} is not allowed; this server gives at most {settings.max_logprobs}", param=param
        )


def sampling_params(
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    n: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    structured: StructuredOutputs | None,
    skip_special_tokens: bool | None,
) -> SamplingParams:
    """The arguments are what the endpoints define each in its own way; the rest are fields that they share."""
    wanted: dict[str, Any] = {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "structured_outputs": structured,
        "seed": request.seed,
        "allowed_token_ids": request.allowed_token_ids,
    }
    optional = {
        "n": n,
        "skip_special_tokens": skip_special_tokens,
        "logit_bias": {int(i): bias for i, bias in request.logit_bias.items()} if request.logit_bias else None,
    }
    for name in _SHARED:
        optional[name] = getattr(request, name)
    wanted |= {name: value for name, value in optional.items() if value is not None}
    if wanted.get("temperature", 1.0) < GREEDY_BELOW:
        wanted["temperature"] = 0.0
    try:
        return SamplingParams(**wanted)
    except ConfigError as error:
        raise blamed(error, request) from None


_SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "include_stop_str_in_output",
)


def time_limit(request: GenerationRequest, settings: ServerSettings) -> float | None:
    """Seconds: the request's ``timeout``, but not more than the server's."""
    limits = [limit for limit in (request.timeout, settings.request_timeout) if limit is not None]
    return min(limits, default=None)


def timed_out(seconds: float | None) -> ApiError:
    """What a request is told that was not finished within ``seconds``."""
    within = "in time" if seconds is None else f"within {seconds:g} s"
    return ApiError(
        408,
        f"the request was not finished {within}; ask for less, or for a longer timeout",
        type="timeout_error",
        code="timeout",
    )


def blamed(error: ConfigError, request: BaseModel, default: str | None = None) -> ApiError:
    """``error`` with the request's field that its text begins with ("top_k=… is not allowed") as ``param``."""
    if isinstance(error, MissingExtra):
        return as_api_error(error)
    match = _BLAMED.match(str(error))
    param = match[1] if match and match[1] in type(request).model_fields else default
    return ApiError(400, str(error), param=param)

"""``/tokenize`` and ``/detokenize``, as vLLM has them: what the model's tokenizer makes of a text or a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import Field

from lightvllm.engine.protocol import EngineClient
from lightvllm.server.chat import chat_text
from lightvllm.server.chat_protocol import MAX_MESSAGES, MAX_TOOLS, ChatCompletionRequest, ChatMessage, Tool
from lightvllm.server.params import LONG_TEXT, check_model, encode
from lightvllm.server.protocol import ONE_ERROR, AnswerModel, RequestModel, TokenId
from lightvllm.server.settings import ServerSettings
from lightvllm.server.tools import tool_use

T = TypeVar("T")


class TokenizeTextRequest(RequestModel):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(RequestModel):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), ONE_ERROR]
    model: str | None = None
    add_generation_prompt: bool | None = Field(None, description="Default true, unless continue_final_message.")
    continue_final_message: bool | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), ONE_ERROR] | None = None


class TokenizeResponse(AnswerModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="As the vocabulary writes them; null if they were not asked for.")


class DetokenizeRequest(RequestModel):
    tokens: Annotated[list[TokenId], ONE_ERROR]
    model: str | None = None


class DetokenizeResponse(AnswerModel):
    prompt: str


async def tokenize(
    engine: EngineClient, request: TokenizeTextRequest | TokenizeChatRequest, settings: ServerSettings
) -> TokenizeResponse:
    """Raises ApiError."""
    check_model(request.model, engine, settings)
    if isinstance(request, TokenizeTextRequest):
        ids = await encode(engine, request.prompt, request.add_special_tokens, "prompt")
    else:
        shared = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        chat = ChatCompletionRequest.model_validate({name: getattr(request, name) for name in shared})
        text = await chat_text(engine, chat, settings, tool_use(chat, engine, settings, None))
        ids = await encode(engine, text, request.add_special_tokens, "messages")
    strings = None
    if request.return_token_strs:
        strings = await _aside(len(ids), lambda: [engine.tokenizer.token(i) or "" for i in ids])
    return TokenizeResponse(
        count=len(ids), max_model_len=engine.info.config.model.max_model_len, tokens=ids, token_strs=strings
    )


async def detokenize(engine: EngineClient, request: DetokenizeRequest, settings: ServerSettings) -> DetokenizeResponse:
    """Special tokens are written, too; ids that the vocabulary does not have are nothing. Raises ApiError."""
    check_model(request.model, engine, settings)

    def decoded() -> str:
        vocabulary = engine.tokenizer.token_ids
        known = [i for i in request.tokens if i in vocabulary]
        return engine.tokenizer.decode(known, skip_special_tokens=False)

    return DetokenizeResponse(prompt=await _aside(len(request.tokens), decoded))


async def _aside(num_tokens: int, make: Callable[[], T]) -> T:
    """``make()``; of many tokens in a thread, so that other streams go on meanwhile."""
    return make() if num_tokens < LONG_TEXT else await asyncio.to_thread(make)

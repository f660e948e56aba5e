"""``router``: OpenAI's paths, and vLLM's for tokens. Each hands its checked body to the module that answers it.

While an answer is made, its client is watched: one that leaves has its request aborted and its blocks freed, whether it
waits for a whole answer or reads a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from lightvllm.engine.protocol import EngineClient
from lightvllm.server.chat import create_chat_completion
from lightvllm.server.chat_protocol import ChatCompletionRequest, ChatCompletionResponse
from lightvllm.server.completions import create_completion
from lightvllm.server.embeddings import create_embedding
from lightvllm.server.errors import ApiError
from lightvllm.server.params import check_model, served_names
from lightvllm.server.protocol import (
    AnswerModel,
    CompletionRequest,
    CompletionResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ModelCard,
    ModelList,
)
from lightvllm.server.settings import ServerSettings
from lightvllm.server.stream import EventStream, disconnected
from lightvllm.server.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeResponse,
    TokenizeTextRequest,
    detokenize,
    tokenize,
)

CLIENT_LEFT = 499
"""The status in the log of a request whose client left before there was an answer (nginx's)."""

T = TypeVar("T")

router = APIRouter()


def _engine(request: Request) -> EngineClient:
    engine: EngineClient | None = request.app.state.engine
    if engine is None:
        raise ApiError(503, "the model is being loaded", code="engine_starting", retry_after=5)
    return engine


Engine = Annotated[EngineClient, Depends(_engine)]


def _settings(request: Request) -> ServerSettings:
    settings: ServerSettings = request.app.state.settings
    return settings


Settings = Annotated[ServerSettings, Depends(_settings)]


def _streamed(model: type[AnswerModel]) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "model": model,
            "description": "The whole answer, or with stream=true its chunks as server-sent events.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }


@router.post("/v1/completions", tags=["OpenAI"], responses=_streamed(CompletionResponse))
async def completions(body: CompletionRequest, http: Request, engine: Engine, settings: Settings) -> Response:
    """Continue one or several prompts."""
    return await _respond(http, create_completion(engine, body, settings, request_id=_request_id(http)))


@router.post("/v1/chat/completions", tags=["OpenAI"], responses=_streamed(ChatCompletionResponse))
async def chat_completions(body: ChatCompletionRequest, http: Request, engine: Engine, settings: Settings) -> Response:
    """Answer a conversation, by text or by calls of tools."""
    return await _respond(http, create_chat_completion(engine, body, settings, request_id=_request_id(http)))


@router.post("/v1/embeddings", tags=["OpenAI"], responses={200: {"model": EmbeddingResponse}})
async def embeddings(body: EmbeddingRequest, http: Request, engine: Engine, settings: Settings) -> Response:
    """Texts as vectors, if the model makes any."""
    return await _respond(http, create_embedding(engine, body, settings, request_id=_request_id(http)))


@router.get("/v1/models", tags=["OpenAI"], responses={200: {"model": ModelList}})
async def models(http: Request, engine: Engine, settings: Settings) -> Response:
    """What the model may be called."""
    cards = [_card(name, http, engine) for name in served_names(engine, settings)]
    return _written(ModelList(object="list", data=cards))


@router.get("/v1/models/{model:path}", tags=["OpenAI"], responses={200: {"model": ModelCard}})
async def model(model: str, http: Request, engine: Engine, settings: Settings) -> Response:
    """One of them; its name may have slashes."""
    return _written(_card(check_model(model, engine, settings), http, engine))


@router.post("/v1/tokenize", tags=["tokens"], responses={200: {"model": TokenizeResponse}}, name="v1_tokenize")
@router.post("/tokenize", tags=["tokens"], responses={200: {"model": TokenizeResponse}})
async def tokenize_text(
    body: TokenizeTextRequest | TokenizeChatRequest, http: Request, engine: Engine, settings: Settings
) -> Response:
    """The tokens of a text, or of a conversation as the model sees it."""
    return await _respond(http, tokenize(engine, body, settings))


@router.post("/v1/detokenize", tags=["tokens"], responses={200: {"model": DetokenizeResponse}}, name="v1_detokenize")
@router.post("/detokenize", tags=["tokens"], responses={200: {"model": DetokenizeResponse}})
async def detokenize_tokens(body: DetokenizeRequest, http: Request, engine: Engine, settings: Settings) -> Response:
    """The text of tokens."""
    return await _respond(http, detokenize(engine, body, settings))


def _card(name: str, http: Request, engine: EngineClient) -> ModelCard:
    return ModelCard(
        id=name,
        object="model",
        created=int(http.app.state.lifecycle.started_at),
        owned_by="lightvllm",
        root=engine.info.model,
        max_model_len=engine.info.config.model.max_model_len,
    )


def _request_id(http: Request) -> str | None:
    request_id: str | None = getattr(http.state, "request_id", None)
    return request_id


async def _respond(http: Request, making: Coroutine[Any, Any, AnswerModel | AsyncGenerator[bytes, None]]) -> Response:
    """What ``making`` comes to, as HTTP; cancelled when the client leaves."""
    made = await _watched(http, making)
    if made is None:
        return Response(status_code=CLIENT_LEFT)
    if isinstance(made, AnswerModel):
        return _written(made)
    begun = False
    try:
        first = await _watched(http, anext(made))
        begun = first is not None
    finally:
        if not begun:
            await made.aclose()
    return Response(status_code=CLIENT_LEFT) if first is None else EventStream(first, made, _request_id(http))


async def _watched(http: Request, making: Coroutine[Any, Any, T]) -> T | None:
    """The result; None if the client left before, and then ``making`` has been cancelled and has ended."""
    working = asyncio.ensure_future(making)
    leaving = asyncio.ensure_future(disconnected(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _written(answer: AnswerModel) -> Response:
    return Response(answer.encode(), media_type="application/json")

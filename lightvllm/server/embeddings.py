"""``/v1/embeddings``: ``create_embedding``, with or without HTTP around it."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from lightvllm.engine.intake import TokensPrompt
from lightvllm.engine.outputs import EmbeddingOutput
from lightvllm.engine.protocol import EngineClient
from lightvllm.errors import ConfigError
from lightvllm.server.errors import ApiError
from lightvllm.server.params import answer_head, blamed, check_length, check_model, encode, timed_out
from lightvllm.server.protocol import EmbeddingRequest, EmbeddingResponse
from lightvllm.server.settings import ServerSettings


async def create_embedding(
    engine: EngineClient, request: EmbeddingRequest, settings: ServerSettings, *, request_id: str | None = None
) -> EmbeddingResponse:
    """A vector for each input, in their order.

    Args:
        request_id: what the engine's requests are called in logs; None has one made.

    Raises ApiError, and what ``EngineClient.embed`` raises.
    """
    model = check_model(request.model, engine, settings)
    if not engine.info.can_embed:
        raise ApiError(400, f"{model} makes no embeddings; use /v1/completions or /v1/chat/completions", param="model")
    size = engine.info.config.model.hidden_size
    if request.dimensions not in (None, size):
        raise ApiError(
            400, f"dimensions={request.dimensions} is not allowed; {model} makes vectors of {size}", param="dimensions"
        )
    prompts = await _prompts(engine, request)
    engine_id = answer_head("embd", model, engine, request_id).engine_id
    try:
        async with asyncio.timeout(settings.request_timeout) as limit:
            outputs = await _run(engine, request, prompts, engine_id)
    except TimeoutError:
        if not limit.expired():  # it is the engine's
            raise
        raise timed_out(settings.request_timeout) from None
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return EmbeddingResponse.model_validate(
        {
            "object": "list",
            "model": model,
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(request, output.embedding)}
                for index, output in enumerate(outputs)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def _prompts(engine: EngineClient, request: EmbeddingRequest) -> list[TokensPrompt]:
    given: Any = request.input
    several = isinstance(given, list) and not isinstance(given[0], int)
    prompts: list[TokensPrompt] = []
    for number, one in enumerate(given if several else [given]):
        param = f"input[{number}]" if several else "input"
        ids = await encode(engine, one, True, param, to_fit=True) if isinstance(one, str) else one
        check_length(ids, engine, param, room=0)
        prompts.append({"prompt_token_ids": ids})
    return prompts


async def _run(
    engine: EngineClient, request: EmbeddingRequest, prompts: list[TokensPrompt], engine_id: str
) -> list[EmbeddingOutput]:
    """As many at a time as the engine runs sequences; the first error ends the others."""
    places = asyncio.Semaphore(engine.info.config.scheduler.max_num_seqs)

    async def embed(number: int, prompt: TokensPrompt) -> EmbeddingOutput:
        async with places:
            return await engine.embed(prompt, f"{engine_id}-{number}", priority=request.priority or 0)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(embed(number, prompt)) for number, prompt in enumerate(prompts)]
    except ExceptionGroup as failed:
        error = failed.exceptions[0]
        if isinstance(error, ConfigError):
            raise blamed(error, request, "input") from None
        raise error from None
    return [task.result() for task in tasks]


def _written(request: EmbeddingRequest, embedding: list[float]) -> list[float] | str:
    if request.encoding_format != "base64":
        return embedding
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()

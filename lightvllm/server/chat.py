"""``/v1/chat/completions``: ``create_chat_completion``, with or without HTTP around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from lightvllm.engine.intake import TokensPrompt
from lightvllm.engine.outputs import CompletionOutput, RequestOutput
from lightvllm.engine.protocol import EngineClient
from lightvllm.server.chat_protocol import ChatCompletionRequest, ChatCompletionResponse
from lightvllm.server.conversation import prompt_text
from lightvllm.server.errors import ApiError
from lightvllm.server.generation import Job, run, stream
from lightvllm.server.logprobs import chat_logprobs, prompt_logprobs
from lightvllm.server.params import (
    AnswerHead,
    answer_head,
    check_form,
    check_generates,
    check_logprobs,
    check_model,
    encode,
    fit,
    sampling_params,
    structured_outputs,
    time_limit,
)
from lightvllm.server.settings import ServerSettings
from lightvllm.server.stream import DONE, Frames
from lightvllm.server.stream import encode as to_json
from lightvllm.server.tool_calls import Parsed, ToolDelta, ToolParser
from lightvllm.server.tools import ToolUse, tool_use
from lightvllm.server.usage import UsageCounter

MANY_MESSAGES = 64
"""From which on they are put together in a thread, so that other streams go on meanwhile."""


async def create_chat_completion(
    engine: EngineClient,
    request: ChatCompletionRequest,
    settings: ServerSettings,
    *,
    request_id: str | None = None,
) -> ChatCompletionResponse | AsyncGenerator[bytes, None]:
    """The answer, or with ``stream`` its events: frames of ``text/event-stream``, which may hold several chunks.

    Args:
        request_id: stands in the answer's id; None has one made.

    Raises (a stream at its first event or later): ApiError, and what ``EngineClient.generate`` raises.
    """
    writer = await _prepare(engine, request, settings, request_id)
    if request.stream:
        return writer.events()
    (output,) = await run(engine, writer.job)
    return writer.answer(output)


async def chat_text(
    engine: EngineClient, request: ChatCompletionRequest, settings: ServerSettings, use: ToolUse
) -> str:
    """The conversation as the model's chat template writes it."""
    if len(request.messages) < MANY_MESSAGES:
        return prompt_text(request, engine, settings, use)
    return await asyncio.to_thread(prompt_text, request, engine, settings, use)


async def chat_prompt(
    engine: EngineClient, request: ChatCompletionRequest, settings: ServerSettings, use: ToolUse
) -> TokensPrompt:
    """What the model sees."""
    text = await chat_text(engine, request, settings, use)
    to_fit = request.truncate_prompt_tokens is None
    ids = await encode(engine, text, bool(request.add_special_tokens), "messages", to_fit=to_fit)
    return {"prompt_token_ids": fit(ids, engine, request, "messages"), "prompt": text}


async def _prepare(
    engine: EngineClient, request: ChatCompletionRequest, settings: ServerSettings, request_id: str | None
) -> _Writer:
    model = check_model(request.model, engine, settings)
    check_generates(engine)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    check_logprobs(request.top_logprobs, settings, "top_logprobs")
    check_logprobs(request.prompt_logprobs, settings, "prompt_logprobs")
    if request.stream and request.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs are not streamed; use stream=false", param="prompt_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
    if len(set(limits)) > 1:
        raise ApiError(400, "max_tokens is the older name of max_completion_tokens; use one", param="max_tokens")
    answer, form = structured_outputs(request)
    use = tool_use(request, engine, settings, answer)
    form = "tools" if use.grammar is not None else form
    await check_form(use.grammar or answer, engine, form)
    params = sampling_params(
        request,
        max_tokens=limits[0] if limits else None,
        n=request.n,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        structured=use.grammar or answer,
        # A format's mark is often a special token, and a call could not be seen without it.
        skip_special_tokens=False if use.active and use.marked else request.skip_special_tokens,
    )
    head = answer_head("chatcmpl", model, engine, request_id)
    job = Job(
        request=request,
        request_id=head.engine_id,
        prompts=[await chat_prompt(engine, request, settings, use)],
        params=params,
        priority=request.priority or 0,
        timeout=time_limit(request, settings),
        form=form,
    )
    return _Writer(engine, request, head, job, use, settings.response_role)


@dataclass
class _Writer:
    """Writes one request's answer."""

    engine: EngineClient
    request: ChatCompletionRequest
    head: AnswerHead
    job: Job
    use: ToolUse
    role: str

    def answer(self, output: RequestOutput) -> ChatCompletionResponse:
        usage = UsageCounter()
        usage.prompt(0, output)
        choices = []
        for completion in output.outputs:
            usage.generated(len(completion.token_ids))
            choices.append(self._choice(completion))
        answer = {
            "id": self.head.id,
            "object": "chat.completion",
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.system_fingerprint,
            "choices": choices,
            "usage": usage.usage(),
        }
        if self.request.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [], self.request.prompt_logprobs)
        if self.request.return_token_ids:
            answer["prompt_token_ids"] = self._prompt_ids
        return ChatCompletionResponse.model_validate(answer)

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": completion.text, "refusal": None}
        reason: str | None = completion.finish_reason
        if self.use.active:
            parser = self.use.parser()
            begun, ended = parser.feed(completion.text), parser.finish()
            calls = _whole_calls([*begun.calls, *ended.calls])
            message["content"] = begun.content + ended.content
            if calls:
                message["content"] = message["content"] or None
                message["tool_calls"] = calls
            reason = _reason(completion, parser)
        choice: dict[str, Any] = {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion),
            "finish_reason": reason,
        }
        if completion.stop_reason is not None:
            choice["stop_reason"] = completion.stop_reason
        if self.request.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        frames = Frames(self.head, "chat.completion.chunk", usage=self.request.include_usage)
        usage = UsageCounter()
        choices: dict[int, _Choice] = {}
        async with aclosing(stream(self.engine, self.job)) as outputs:
            async for _, output in outputs:
                usage.prompt(0, output)
                chunks: list[bytes] = []
                for completion in output.outputs:
                    usage.generated(len(completion.token_ids))
                    choice = choices.get(completion.index)
                    if choice is None:
                        choice = choices[completion.index] = _Choice(self, frames, completion.index)
                    choice.write(completion, usage.usage() if self.request.continuous_usage else None, chunks)
                if chunks:
                    yield b"".join(chunks)
        yield (frames.usage(usage.usage()) if self.request.include_usage else b"") + DONE

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        return chat_logprobs(
            self.engine.tokenizer,
            completion.logprobs,
            self.request.top_logprobs or 0,
            bool(self.request.return_tokens_as_token_ids),
        )

    @property
    def _prompt_ids(self) -> list[int]:
        return list(self.job.prompts[0]["prompt_token_ids"])


class _Choice:
    """One choice of a stream."""

    def __init__(self, writer: _Writer, frames: Frames, index: int) -> None:
        self._writer = writer
        self._frames = frames
        self._index = index
        self._parser = writer.use.parser() if writer.use.active else None
        self._begun = False
        self._with_ids = bool(writer.request.return_token_ids)
        self._detailed = self._with_ids or bool(writer.request.logprobs)

    def write(self, completion: CompletionOutput, usage: dict[str, Any] | None, chunks: list[bytes]) -> None:
        """Append the chunks that tell what is new."""
        frames, index = self._frames, self._index
        if not self._begun:
            self._begun = True
            delta = b',"delta":{"role":' + to_json(self._writer.role) + b',"content":""},"logprobs":null'
            prompt = self._writer._prompt_ids if self._with_ids else None
            chunks.append(frames.choice(index, delta + _UNFINISHED, usage=usage, prompt_token_ids=prompt))
        deltas = self._deltas(completion)
        # Log-probabilities and token ids go with the first piece; a token without text has a piece of its own.
        if not deltas and self._detailed and completion.token_ids:
            deltas = [b"{}"]
        details = self._details(completion) if self._detailed else _NO_LOGPROBS
        for delta in deltas:
            chunks.append(frames.choice(index, b',"delta":' + delta + details, usage=usage))
            details = _NO_LOGPROBS
        if completion.finish_reason is not None:
            reason = completion.finish_reason if self._parser is None else _reason(completion, self._parser)
            body = b',"delta":{},"logprobs":null,"finish_reason":' + to_json(reason)
            if completion.stop_reason is not None:
                body += b',"stop_reason":' + to_json(completion.stop_reason)
            chunks.append(frames.choice(index, body, usage=usage))

    def _deltas(self, completion: CompletionOutput) -> list[bytes]:
        if self._parser is None:
            return [_content(completion.text)] if completion.text else []
        parsed = self._parser.feed(completion.text)
        if completion.finish_reason is not None:
            ended = self._parser.finish()
            parsed = Parsed(parsed.content + ended.content, [*parsed.calls, *ended.calls])
        deltas = [_content(parsed.content)] if parsed.content else []
        return deltas + [_call(call) for call in parsed.calls]

    def _details(self, completion: CompletionOutput) -> bytes:
        details = b',"logprobs":' + to_json(self._writer._logprobs(completion)) + _UNFINISHED
        if self._with_ids:
            details += b',"token_ids":' + to_json(completion.token_ids)
        return details


_UNFINISHED = b',"finish_reason":null'
_NO_LOGPROBS = b',"logprobs":null' + _UNFINISHED


def _content(text: str) -> bytes:
    return b'{"content":' + to_json(text) + b"}"


def _call(delta: ToolDelta) -> bytes:
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.id is not None:
        call |= {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": delta.arguments}}
    return to_json({"tool_calls": [call]})


def _whole_calls(deltas: list[ToolDelta]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.id is not None:
            calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls


def _reason(completion: CompletionOutput, parser: ToolParser) -> str | None:
    """A call that was cut off by the limit of tokens has the reason "length"."""
    return "tool_calls" if parser.num_calls and completion.finish_reason == "stop" else completion.finish_reason

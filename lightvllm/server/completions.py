"""``/v1/completions``: ``create_completion``, with or without HTTP around it.

``max_tokens=0`` generates nothing (with ``echo`` and ``logprobs`` it scores the prompt): the engine computes one token,
which is thrown away. ``best_of`` runs so many and gives the ``n`` with the highest mean log-probability per token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from lightvllm.engine.intake import TokensPrompt
from lightvllm.engine.outputs import CompletionOutput, RequestOutput
from lightvllm.engine.protocol import EngineClient
from lightvllm.server.errors import ApiError
from lightvllm.server.generation import Job, run, stream
from lightvllm.server.logprobs import CompletionLogprobWriter, Described, join_logprobs, prompt_logprobs
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
from lightvllm.server.protocol import CompletionRequest, CompletionResponse
from lightvllm.server.settings import ServerSettings
from lightvllm.server.stream import DONE, Frames
from lightvllm.server.stream import encode as to_json
from lightvllm.server.usage import UsageCounter

DEFAULT_MAX_TOKENS = 16


async def create_completion(
    engine: EngineClient,
    request: CompletionRequest,
    settings: ServerSettings,
    *,
    request_id: str | None = None,
) -> CompletionResponse | AsyncGenerator[bytes, None]:
    """The answer, or with ``stream`` its events: frames of ``text/event-stream``, which may hold several chunks.

    Args:
        request_id: stands in the answer's id; None has one made.

    Raises (a stream at its first event or later): ApiError, and what ``EngineClient.generate`` raises.
    """
    writer = await _prepare(engine, request, settings, request_id)
    if request.stream:
        return writer.events()
    return writer.answer(await run(engine, writer.job))


async def _prepare(
    engine: EngineClient, request: CompletionRequest, settings: ServerSettings, request_id: str | None
) -> _Writer:
    model = check_model(request.model, engine, settings)
    check_generates(engine)
    check_logprobs(request.logprobs, settings, "logprobs")
    check_logprobs(request.prompt_logprobs, settings, "prompt_logprobs")
    n = request.n or 1
    best_of = n if request.best_of is None else request.best_of
    if best_of < n:
        raise ApiError(400, f"best_of={best_of} is less than n={n}; use at least n", param="best_of")
    if request.stream and best_of > n:
        raise ApiError(400, "best_of cannot be streamed; use n, or stream=false", param="best_of")
    if request.stream and request.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs are not streamed; use echo with logprobs", param="prompt_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")
    echo, nothing = bool(request.echo), request.max_tokens == 0
    counts = [c for c in (request.prompt_logprobs, request.logprobs if echo else None) if c is not None]
    structured, form = structured_outputs(request)
    await check_form(structured, engine, form)
    params = sampling_params(
        request,
        max_tokens=1 if nothing else DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        n=best_of,
        logprobs=0 if best_of > n and request.logprobs is None else request.logprobs,
        prompt_logprobs=max(counts, default=None),
        structured=structured,
        skip_special_tokens=request.skip_special_tokens,
    )
    head = answer_head("cmpl", model, engine, request_id)
    job = Job(
        request=request,
        request_id=head.engine_id,
        prompts=await _prompts(engine, request),
        params=params,
        priority=request.priority or 0,
        timeout=time_limit(request, settings),
        form=form,
    )
    return _Writer(engine, request, head, job, n)


async def _prompts(engine: EngineClient, request: CompletionRequest) -> list[TokensPrompt]:
    given: Any = request.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    special, to_fit = request.add_special_tokens is not False, request.truncate_prompt_tokens is None
    prompts: list[TokensPrompt] = []
    for number, prompt in enumerate(given if several else [given]):
        param = f"prompt[{number}]" if several else "prompt"
        if isinstance(prompt, str):
            ids = fit(await encode(engine, prompt, special, param, to_fit=to_fit), engine, request, param)
            prompts.append({"prompt_token_ids": ids, "prompt": prompt})
        else:
            prompts.append({"prompt_token_ids": fit(prompt, engine, request, param)})
    return prompts


@dataclass
class _Writer:
    """Writes one request's answer; ``n`` choices for each prompt."""

    engine: EngineClient
    request: CompletionRequest
    head: AnswerHead
    job: Job
    n: int
    _scores: dict[int, Sequence[Described | None]] = field(default_factory=dict)
    """Log-probabilities of the prompts, by number; a stream tells them once."""

    def answer(self, outputs: Sequence[RequestOutput]) -> CompletionResponse:
        usage = UsageCounter()
        choices = []
        for number, output in enumerate(outputs):
            usage.prompt(number, output)
            self._scores[number] = output.prompt_logprobs or []
            for completion in output.outputs:
                usage.generated(0 if self._nothing else len(completion.token_ids))
            for index, completion in enumerate(self._best(output.outputs)):
                choices.append(self._choice(number, number * self.n + index, completion))
        return CompletionResponse.model_validate(
            {
                "id": self.head.id,
                "object": "text_completion",
                "created": self.head.created,
                "model": self.head.model,
                "system_fingerprint": self.head.system_fingerprint,
                "choices": choices,
                "usage": usage.usage(),
            }
        )

    def _choice(self, number: int, index: int, completion: CompletionOutput) -> dict[str, Any]:
        request = self.request
        completion = self._shown(completion)
        choice: dict[str, Any] = {
            "index": index,
            "text": (self._echoed(number) if request.echo else "") + completion.text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
        }
        if request.logprobs is not None:
            choice["logprobs"] = self._logprobs(self._logprob_writer(), number, completion, first=True)
        if completion.stop_reason is not None:
            choice["stop_reason"] = completion.stop_reason
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._scores[number], request.prompt_logprobs)
        if request.return_token_ids:
            choice["prompt_token_ids"] = self._prompt_ids(number)
            choice["token_ids"] = completion.token_ids
        return choice

    async def events(self) -> AsyncGenerator[bytes, None]:
        request = self.request
        frames = Frames(self.head, "text_completion", usage=request.include_usage)
        usage = UsageCounter()
        writers: dict[int, CompletionLogprobWriter] = {}
        plain = request.logprobs is None and not request.return_token_ids
        async with aclosing(stream(self.engine, self.job)) as outputs:
            async for number, output in outputs:
                usage.prompt(number, output)
                if output.prompt_logprobs is not None:
                    self._scores[number] = output.prompt_logprobs
                chunks = []
                for completion in output.outputs:
                    index = number * self.n + completion.index
                    completion = self._shown(completion)
                    usage.generated(len(completion.token_ids))
                    first = index not in writers
                    if first:
                        writers[index] = self._logprob_writer()
                    echo = first and bool(request.echo)
                    text = self._echoed(number) + completion.text if echo else completion.text
                    stats = usage.usage() if request.continuous_usage else None
                    if text or echo or (not plain and (completion.token_ids or first)):
                        body = b',"text":' + to_json(text) + b',"logprobs":'
                        if request.logprobs is None:
                            body += b"null"
                        else:
                            body += to_json(self._logprobs(writers[index], number, completion, first=first))
                        body += b',"finish_reason":null'
                        if request.return_token_ids:
                            body += b',"token_ids":' + to_json(completion.token_ids)
                            if first:
                                body += b',"prompt_token_ids":' + to_json(self._prompt_ids(number))
                        chunks.append(frames.choice(index, body, usage=stats))
                    if completion.finish_reason is not None:
                        body = b',"text":"","logprobs":null,"finish_reason":' + to_json(completion.finish_reason)
                        if completion.stop_reason is not None:
                            body += b',"stop_reason":' + to_json(completion.stop_reason)
                        chunks.append(frames.choice(index, body, usage=stats))
                if chunks:
                    yield b"".join(chunks)
        yield (frames.usage(usage.usage()) if request.include_usage else b"") + DONE

    @property
    def _nothing(self) -> bool:
        return self.request.max_tokens == 0

    def _shown(self, completion: CompletionOutput) -> CompletionOutput:
        """Without the token that was computed only because the engine computes at least one."""
        if not self._nothing:
            return completion
        logprobs: Any = None if completion.logprobs is None else []
        return replace(completion, text="", token_ids=[], logprobs=logprobs, stop_reason=None, finish_reason="length")

    def _best(self, completions: Sequence[CompletionOutput]) -> Sequence[CompletionOutput]:
        if len(completions) == self.n:
            return completions

        def mean(completion: CompletionOutput) -> float:
            return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))

        return sorted(completions, key=mean, reverse=True)[: self.n]

    def _prompt_ids(self, number: int) -> list[int]:
        return list(self.job.prompts[number]["prompt_token_ids"])

    def _echoed(self, number: int) -> str:
        """The prompt's text: as it came, or what its tokens say."""
        prompt = self.job.prompts[number]
        if "prompt" in prompt and self.request.truncate_prompt_tokens is None:
            return prompt["prompt"]
        skip = self.job.params.skip_special_tokens
        return self.engine.tokenizer.decode(prompt["prompt_token_ids"], skip_special_tokens=skip)

    def _logprob_writer(self) -> CompletionLogprobWriter:
        tokenizer = self.engine.tokenizer
        return CompletionLogprobWriter(
            tokenizer,
            self.request.logprobs or 0,
            as_ids=bool(self.request.return_tokens_as_token_ids),
            skipped=tokenizer.special_token_ids if self.job.params.skip_special_tokens else frozenset(),
        )

    def _logprobs(
        self,
        writer: CompletionLogprobWriter,
        number: int,
        completion: CompletionOutput,
        *,
        first: bool,
    ) -> dict[str, list[Any]]:
        """Of the generated tokens; at the ``first`` ones of an echoed prompt's, too."""
        parts, begin = [], 0
        if first and self.request.echo:
            text = self._echoed(number)
            parts.append(writer.write(self._prompt_ids(number), self._scores[number], begins_at=0, text=text))
            begin = len(text)
        parts.append(writer.write(completion.token_ids, completion.logprobs or [], begins_at=begin if first else None))
        return join_logprobs(parts)

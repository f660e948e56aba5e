"""Prompts run side by side, and what is written of their outputs, over an engine that does what a test says."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest
import tiny_tokenizers
from scripted_client import ScriptedClient, engine_config

from lightvllm.engine.outputs import CompletionOutput, EmbeddingOutput, Logprob, RequestMetrics, RequestOutput
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError, QueueFull, WorkerDied
from lightvllm.server.chat import create_chat_completion
from lightvllm.server.chat_protocol import ChatCompletionRequest
from lightvllm.server.completions import create_completion
from lightvllm.server.embeddings import create_embedding
from lightvllm.server.errors import ApiError
from lightvllm.server.params import answer_head, time_limit
from lightvllm.server.protocol import CompletionRequest, CompletionResponse, EmbeddingRequest
from lightvllm.server.settings import ServerSettings

SETTINGS = ServerSettings()
Script = list[list[CompletionOutput] | Exception]


def piece(index: int, text: str, count: int = 1, reason: Any = None) -> CompletionOutput:
    """``count`` tokens with the id 5."""
    logprobs = [{5: Logprob(-1.0, 1, "x")}] * count
    return CompletionOutput(index, text, [5] * count, -1.0 * count, logprobs, finish_reason=reason)


class Engine(ScriptedClient):
    """Plays ``script`` for every prompt: a list of deltas, or an exception.

    Attributes:
        running: generators that are open; ``most`` of them at a time so far.
        calls: what ``generate`` was called with.
    """

    def __init__(self, tokenizer: Tokenizer, script: Script, max_num_seqs: int = 64) -> None:
        super().__init__()
        config = engine_config()
        scheduler = msgspec.structs.replace(config.scheduler, max_num_seqs=max_num_seqs)
        self.info = msgspec.structs.replace(self.info, config=msgspec.structs.replace(config, scheduler=scheduler))
        self.own = tokenizer
        self.script = script
        self.running = self.most = 0
        self.calls: list[dict[str, Any]] = []

    @property
    def tokenizer(self) -> Tokenizer:
        return self.own

    async def generate(  # type: ignore[override]
        self, prompt: Any, sampling_params: Any = None, request_id: str | None = None, **rest: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.calls.append({"prompt": prompt, "params": sampling_params, "request_id": request_id, **rest})
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for number, outputs in enumerate(self.script):
                await asyncio.sleep(0)
                if isinstance(outputs, Exception):
                    raise outputs
                last = number == len(self.script) - 1
                if rest["output_kind"] == "delta" or last:
                    ids = list(prompt["prompt_token_ids"])
                    yield RequestOutput(
                        request_id or "", None, ids, outputs, last, RequestMetrics(0.0), num_cached_tokens=2
                    )
        finally:
            self.running -= 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("level")))


def run(coroutine: Any) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(20):
            return await coroutine

    return asyncio.run(limited())


async def chunks_of(answer: Any) -> list[Any]:
    assert isinstance(answer, AsyncGenerator)
    text = b"".join([event async for event in answer]).decode()
    *frames, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "hello", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "hello"}], **fields})


def test_outputs_that_were_merged_lose_nothing(tokenizer: Tokenizer) -> None:
    """As for a reader that comes late: several tokens in one output, choices that end at different times."""
    script: Script = [
        [piece(0, "ab", 3), piece(1, "", 1)],
        [piece(1, "cd", 2)],
        [piece(0, "e", 4, "stop"), piece(1, "", 1, "length")],
    ]
    engine = Engine(tokenizer, script)
    options = {"include_usage": True, "continuous_usage_stats": True}
    for request, create in (
        (completion(n=2, stream=True, stream_options=options, logprobs=0), create_completion),
        (chat(n=2, stream=True, stream_options=options, logprobs=True), create_chat_completion),
    ):

        async def streamed(request: Any = request, create: Any = create) -> list[Any]:
            return await chunks_of(await create(engine, request, SETTINGS))

        *chunks, last = run(streamed())
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 11
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 11
        for index, text, tokens in ((0, "abe", 7), (1, "cd", 4)):
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            said = [c["text"] if "text" in c else c["delta"].get("content", "") for c in mine]
            assert "".join(said) == text
            logprobs = [c["logprobs"] for c in mine if c["logprobs"]]
            assert sum(len(part.get("tokens") or part.get("content")) for part in logprobs) == tokens
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [{0: "stop", 1: "length"}[index]]
            assert mine[-1]["finish_reason"]


def test_one_request_does_not_fill_the_engines_queue(tokenizer: Tokenizer) -> None:
    engine = Engine(tokenizer, [[piece(0, "a")], [piece(0, "ab", 2, "stop")]], max_num_seqs=3)
    answer = run(create_completion(engine, completion(prompt=["a"] * 20), SETTINGS, request_id="r"))
    assert isinstance(answer, CompletionResponse)
    assert [choice.index for choice in answer.choices] == list(range(20))
    assert answer.usage.prompt_tokens == 20
    assert engine.most == 3
    ids = [call["request_id"] for call in engine.calls]
    assert len(set(ids)) == 20
    assert all(one.startswith("cmpl-r-") for one in ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", ["hello", "hello"]])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (QueueFull("full", 3.0), QueueFull),
        (WorkerDied("w", "killed"), WorkerDied),
        (ConfigError("top_k=5 is wrong"), ApiError),
    ],
)
def test_an_error_ends_every_prompt(
    tokenizer: Tokenizer, stream: bool, prompt: Any, error: Exception, raised: type[Exception]
) -> None:
    engine = Engine(tokenizer, [[piece(0, "a")], error])

    async def answered() -> None:
        answer = await create_completion(engine, completion(prompt=prompt, stream=stream), SETTINGS)
        assert isinstance(answer, AsyncGenerator)
        async for _ in answer:
            pass

    with pytest.raises(raised) as seen:
        run(answered())
    if isinstance(seen.value, ApiError):
        assert (seen.value.status, seen.value.param) == (400, "top_k")
    assert engine.running == 0


@pytest.mark.parametrize("prompt", ["hello", ["hello", "hello"]])
def test_closing_a_stream_closes_every_request(tokenizer: Tokenizer, prompt: Any) -> None:
    engine = Engine(tokenizer, [[piece(0, "a")]] * 50)

    async def begun() -> None:
        answer = await create_completion(engine, completion(prompt=prompt, stream=True), SETTINGS)
        assert isinstance(answer, AsyncGenerator)
        await anext(answer)
        assert engine.running == (2 if isinstance(prompt, list) else 1)
        await answer.aclose()
        assert engine.running == 0

    run(begun())


@pytest.mark.parametrize(("reason", "status"), [("timeout", 408), ("abort", 503), ("error", 400)])
def test_ends_that_are_no_answers(tokenizer: Tokenizer, reason: str, status: int) -> None:
    engine = Engine(tokenizer, [[piece(0, "a")], [piece(0, "ab", 2, reason)]])
    with pytest.raises(ApiError) as seen:
        run(create_chat_completion(engine, chat(timeout=2), SETTINGS))
    assert seen.value.status == status
    assert engine.calls[0]["timeout"] == 2


def test_the_servers_limit_of_time_holds(tokenizer: Tokenizer) -> None:
    limited = ServerSettings(request_timeout=5)
    assert time_limit(completion(), SETTINGS) is None
    assert time_limit(completion(), limited) == 5
    assert time_limit(completion(timeout=9), limited) == 5
    assert time_limit(completion(timeout=1), limited) == 1


def test_engines_never_see_one_id_twice(tokenizer: Tokenizer) -> None:
    engine = Engine(tokenizer, [])
    heads = [answer_head("cmpl", "m", engine, "same") for _ in range(2)]
    assert heads[0].id == heads[1].id == "cmpl-same"
    assert heads[0].engine_id != heads[1].engine_id
    assert answer_head("cmpl", "m", engine, None).id != answer_head("cmpl", "m", engine, None).id


def test_fields_reach_the_engine(tokenizer: Tokenizer) -> None:
    engine = Engine(tokenizer, [[piece(0, "a", 1, "stop")]])
    fields = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 1, "ignore_eos": True, "priority": -3}
    more = {"stop": "x", "stop_token_ids": [4], "logit_bias": {"7": -1.5}, "bad_words": ["y"], "temperature": 1e-9}
    run(create_completion(engine, completion(**fields, **more, max_tokens=5, seed=8), SETTINGS))
    (call,) = engine.calls
    params = call["params"]
    assert {name: getattr(params, name) for name in fields if name != "priority"} == {
        name: value for name, value in fields.items() if name != "priority"
    }
    assert (call["priority"], params.stop, params.stop_token_ids) == (-3, ("x",), (4,))
    assert (params.logit_bias, params.bad_words, params.temperature) == ({7: -1.5}, ("y",), 0.0)
    assert (params.max_tokens, params.seed) == (5, 8)
    run(create_completion(engine, completion(), SETTINGS))
    assert engine.calls[-1]["params"].max_tokens == 16
    run(create_chat_completion(engine, chat(), SETTINGS))
    assert engine.calls[-1]["params"].max_tokens is None


class Embedder(Engine):
    async def embed(self, prompt: Any, request_id: str | None = None, *, priority: int = 0) -> EmbeddingOutput:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            ids = list(prompt["prompt_token_ids"])
            if ids == [265]:
                raise ConfigError("no")
            return EmbeddingOutput(request_id or "", ids, [float(len(ids)), -0.5])
        finally:
            self.running -= 1


def embedding(given: Any, **fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest.model_validate({"input": given, **fields})


def test_embeddings(tokenizer: Tokenizer) -> None:
    engine = Embedder(tokenizer, [], max_num_seqs=2)
    answer = run(create_embedding(engine, embedding(["a", "xyz", "hello"]), SETTINGS))
    assert [(one.index, one.embedding) for one in answer.data] == [(0, [1.0, -0.5]), (1, [3.0, -0.5]), (2, [1.0, -0.5])]
    assert answer.usage.total_tokens == 5
    assert engine.most == 2
    packed = run(create_embedding(engine, embedding([5, 6], encoding_format="base64"), SETTINGS)).data[0].embedding
    assert struct.unpack("<2f", base64.b64decode(packed)) == (2.0, -0.5)
    for request, param in (
        (embedding("a", dimensions=3), "dimensions"),
        (embedding([[5], [265]]), "input"),
        (embedding([5] * 513), "input"),
    ):
        with pytest.raises(ApiError) as seen:
            run(create_embedding(engine, request, SETTINGS))
        assert (seen.value.status, seen.value.param) == (400, param)
    assert run(create_embedding(engine, embedding([5] * 512), SETTINGS)).usage.prompt_tokens == 512
    assert engine.running == 0


def test_embeddings_have_a_limit_of_time(tokenizer: Tokenizer) -> None:
    class Stuck(Engine):
        async def embed(self, prompt: Any, request_id: str | None = None, *, priority: int = 0) -> EmbeddingOutput:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(ApiError, match=r"not finished within 0\.01 s") as seen:
        run(create_embedding(Stuck(tokenizer, []), embedding(["a", "b"]), ServerSettings(request_timeout=0.01)))
    assert seen.value.status == 408


def test_what_is_long_is_made_ready_aside(tokenizer: Tokenizer) -> None:
    engine = Engine(tokenizer, [[piece(0, "a", 1, "stop")]])
    run(create_completion(engine, completion(prompt="x" * 30_000 + "y", truncate_prompt_tokens=100), SETTINGS))
    kept = engine.calls.pop()["prompt"]["prompt_token_ids"]
    assert tokenizer.decode(kept) == "x" * 99 + "y"
    one, many = ([{"role": "user", "content": "x"}] * count for count in (1, 80))
    for messages in (one, many):
        run(create_chat_completion(engine, chat(messages=messages, truncate_prompt_tokens=-1), SETTINGS))
    short, long = (call["prompt"]["prompt"] for call in engine.calls)
    assert long.count("<|user|>x") == 80
    assert short.count("<|user|>x") == 1

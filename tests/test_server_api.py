"""OpenAI's own client against a server of a tiny model: every endpoint, streams, errors, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny_llama
from pydantic import BaseModel, Field
from served_model import ServedModel, serve
from waiting import wait_until

from lightvllm import LLM, SamplingParams
from lightvllm.server.params import LONG_TEXT

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Paris?"}]
LONG: dict[str, Any] = {"model": "tiny", "prompt": "Paris", "max_tokens": 900, "extra_body": {"ignore_eos": True}}


class Colour(Enum):
    red = "red"
    blue = "blue"


class Answer(BaseModel):
    colour: Colour
    count: int = Field(ge=0, le=99)


def tool(name: str) -> Any:
    schema = {"type": "object", "additionalProperties": False, "required": ["a", "b"]}
    schema["properties"] = {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}}
    return {"type": "function", "function": {"name": name, "description": "Adds.", "parameters": schema}}


def stream_of(create: Any, **request: Any) -> list[Any]:
    return list(create(stream=True, stream_options={"include_usage": True}, **request))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[ServedModel]:
    with serve(folder) as served:
        yield served


@pytest.fixture(autouse=True)
def nothing_is_left(model: ServedModel) -> Iterator[None]:
    yield
    model.wait_idle()


def test_models(model: ServedModel) -> None:
    cards = model.client.models.list().data
    assert [card.id for card in cards] == ["tiny", "org/tiny"]
    assert model.client.models.retrieve("org/tiny").id == "org/tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        model.client.models.retrieve("huge")


def test_a_completion_is_what_the_library_says(model: ServedModel, folder: Path) -> None:
    prompts = ["Paris is", "One token"]
    with LLM(folder, num_kv_blocks=256) as llm:
        wanted = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        ids = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
    answer = model.client.completions.create(prompt=prompts, max_tokens=12, **GREEDY)
    assert [choice.text for choice in answer.choices] == [output.outputs[0].text for output in wanted]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert answer.usage.completion_tokens == 24
    by_tokens = model.client.completions.create(prompt=ids, max_tokens=12, **GREEDY)
    assert [choice.text for choice in by_tokens.choices] == [choice.text for choice in answer.choices]
    one = model.client.completions.create(prompt=ids[0], max_tokens=12, **GREEDY)
    assert one.choices[0].text == answer.choices[0].text
    assert one.choices[0].finish_reason == "length"


def test_a_stop_string_ends_and_is_left_out(model: ServedModel) -> None:
    text = model.client.completions.create(prompt="Paris is", max_tokens=30, **GREEDY).choices[0].text
    stop = text[10:13]
    choice = model.client.completions.create(prompt="Paris is", max_tokens=30, stop=[stop], **GREEDY).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert choice.model_extra == {"stop_reason": stop}
    chunks = list(model.client.completions.create(prompt="Paris is", max_tokens=30, stop=stop, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_a_seed_repeats_and_choices_differ(model: ServedModel) -> None:
    def texts(seed: int) -> list[str]:
        answer = model.client.completions.create(model="tiny", prompt="Paris", n=3, seed=seed, max_tokens=8)
        return [choice.text for choice in answer.choices]

    first = texts(5)
    assert texts(5) == first
    assert len(set(first)) == 3
    assert texts(6) != first


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_of_a_completion_belong_to_its_text(model: ServedModel, echo: bool) -> None:
    request: dict[str, Any] = {"prompt": ["Grüße aus", "Köln"], "max_tokens": 10, "logprobs": 2, "echo": echo, **GREEDY}
    answer = model.client.completions.create(**request)
    for choice, prompt in zip(answer.choices, request["prompt"], strict=True):
        found = choice.logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.text_offset is not None
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        assert choice.text.startswith(prompt) is echo
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            assert "\ufffd" in token or "<|" in token or choice.text.startswith(token, offset)
        if echo:
            assert found.token_logprobs[0] is None
            assert found.top_logprobs[0] is None
        for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[
            echo:
        ]:
            assert top[token] == logprob
            assert logprob <= 0

    def rows(found: Any) -> list[Any]:
        return list(zip(found.tokens, found.token_logprobs, found.text_offset, strict=True)) if found else []

    by_stream: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in model.client.completions.create(stream=True, **request):
        by_stream[chunk.choices[0].index] += rows(chunk.choices[0].logprobs)
    assert by_stream == {choice.index: rows(choice.logprobs) for choice in answer.choices}


def test_a_prompt_is_scored_without_generating(model: ServedModel) -> None:
    request: dict[str, Any] = {"prompt": "Paris is the capital", "echo": True, "logprobs": 1, **GREEDY}
    answer = model.client.completions.create(max_tokens=0, **request)
    longer = model.client.completions.create(max_tokens=4, **request)
    choice, more = answer.choices[0], longer.choices[0]
    assert (choice.text, choice.finish_reason) == ("Paris is the capital", "length")
    assert choice.logprobs is not None
    assert more.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert more.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs == more.logprobs.token_logprobs[:-4]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    chunks = stream_of(model.client.completions.create, max_tokens=0, **request)
    assert chunks[0].choices[0].text == choice.text
    assert chunks[0].choices[0].logprobs == choice.logprobs
    assert chunks[-1].usage == answer.usage


def test_best_of_gives_the_most_probable(model: ServedModel) -> None:
    request: dict[str, Any] = {"model": "tiny", "prompt": "Paris", "seed": 3, "max_tokens": 6, "logprobs": 0}
    every = model.client.completions.create(n=5, **request)
    best = model.client.completions.create(n=2, best_of=5, **request)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / 6

    wanted = sorted(every.choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in wanted]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage is not None
    assert best.usage.completion_tokens == 30


def test_token_ids_are_sent_when_asked_for(model: ServedModel) -> None:
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    answer = model.client.completions.create(prompt=[5, 6], max_tokens=3, logprobs=0, extra_body=extra, **GREEDY)
    choice: Any = answer.choices[0]
    assert choice.prompt_token_ids == [5, 6]
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.token_ids]
    chunks: Any = list(
        model.client.completions.create(prompt=[5, 6], max_tokens=3, stream=True, extra_body=extra, **GREEDY)
    )
    assert chunks[0].choices[0].prompt_token_ids == [5, 6]
    assert [i for chunk in chunks for i in getattr(chunk.choices[0], "token_ids", ())] == choice.token_ids


def test_a_biased_token_comes_or_never_comes(model: ServedModel) -> None:
    def ids(bias: dict[str, int]) -> list[int]:
        request: Any = {"prompt": "Paris", "max_tokens": 4, "logit_bias": bias, **GREEDY}
        answer: Any = model.client.completions.create(extra_body={"return_token_ids": True}, **request)
        return list(answer.choices[0].token_ids)

    assert ids({"40": 100}) == [40] * 4
    plain = ids({})
    assert plain[0] not in ids({str(plain[0]): -100})


def test_a_chat_answer_is_what_the_library_says(model: ServedModel, folder: Path) -> None:
    with LLM(folder, num_kv_blocks=256) as llm:
        wanted = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]
    answer = model.client.chat.completions.create(messages=MESSAGES, max_completion_tokens=12, **GREEDY)
    assert answer.choices[0].message.content == wanted.outputs[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    by_parts: Any = model.client.chat.completions.create(messages=parts, max_tokens=12, **GREEDY)  # type: ignore[arg-type]
    assert by_parts.choices[0].message.content == answer.choices[0].message.content


def test_without_a_limit_an_answer_goes_to_the_contexts_end(model: ServedModel) -> None:
    answer = model.client.chat.completions.create(messages=MESSAGES, extra_body={"ignore_eos": True}, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_is_the_whole_one_in_openais_order(model: ServedModel, n: int) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "seed": 1, "n": n}
    whole = model.client.chat.completions.create(logprobs=True, top_logprobs=2, **request)
    chunks = stream_of(model.client.chat.completions.create, logprobs=True, top_logprobs=2, **request)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert all(chunk.delta.role is None for chunk in mine[1:])
        assert "".join(chunk.delta.content or "" for chunk in mine) == choice.message.content
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        tokens = [token for chunk in mine if chunk.logprobs for token in chunk.logprobs.content]
        assert tokens == choice.logprobs.content


def test_bytes_of_chat_logprobs_make_up_the_text(model: ServedModel) -> None:
    answer = model.client.chat.completions.create(
        messages=MESSAGES, max_tokens=60, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}, **GREEDY
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    special = {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    said = [token for token in choice.logprobs.content if token.token not in special]
    assert all(token.bytes is not None for token in said)
    assert bytes(b for token in said for b in token.bytes or ()).decode("utf-8", "replace") == choice.message.content
    assert any("\ufffd" in token.token for token in said), "some tokens are no whole characters"
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)


@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_forced_tool_is_called_with_valid_arguments(model: ServedModel, choice: str) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "seed": 4,
        "tools": [tool("add"), tool("sub")],
        "tool_choice": choice if choice == "required" else {"type": "function", "function": {"name": choice}},
        "parallel_tool_calls": False,
    }
    whole = model.client.chat.completions.create(**request).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    assert call.type == "function"
    assert call.function.name in (["add", "sub"] if choice == "required" else ["add"])
    arguments = json.loads(call.function.arguments)
    assert arguments["b"] in ("x", "y")
    assert 0 <= arguments["a"] <= 99

    deltas = [chunk.choices[0] for chunk in model.client.chat.completions.create(stream=True, **request)]
    calls = [delta.delta.tool_calls[0] for delta in deltas if delta.delta.tool_calls]
    assert deltas[-1].finish_reason == "tool_calls"
    assert [c.function.name for c in calls] == [call.function.name] + [None] * (len(calls) - 1)
    assert [c.id for c in calls][1:] == [None] * (len(calls) - 1)
    assert "".join(c.function.arguments for c in calls) == call.function.arguments
    assert len(calls) > 3, "arguments come in pieces"


def test_a_conversation_with_calls_and_results_is_understood(model: ServedModel) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    answer = model.client.chat.completions.create(messages=messages, tools=[tool("add")], max_tokens=3, **GREEDY)
    assert answer.choices[0].finish_reason == "length"


def test_pydantic_models_are_parsed(model: ServedModel) -> None:
    parsed = model.client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Answer, seed=2)
    answer = parsed.choices[0].message.parsed
    assert isinstance(answer, Answer)
    assert parsed.choices[0].finish_reason == "stop"


def test_pydantic_tools_are_parsed(model: ServedModel) -> None:
    parsed = model.client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Answer)],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=2,
    )
    (call,) = parsed.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Answer)


@pytest.mark.parametrize(
    ("extra", "allowed"),
    [
        ({"guided_choice": ["yes", "no"]}, ("yes", "no")),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, ("aaa", "aab", "aba", "abb", "baa", "bab", "bba", "bbb")),
        ({"guided_json": {"enum": [1, 2]}}, ("1", "2")),
        ({"guided_grammar": 'root ::= "x" | "y"'}, ("x", "y")),
    ],
)
def test_forms_of_vllms_are_kept(model: ServedModel, extra: Any, allowed: Any) -> None:
    answer = model.client.completions.create(model="tiny", prompt="Say", max_tokens=20, extra_body=extra)
    assert answer.choices[0].text in allowed


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 2, "temperature": 0}, "n", "gives the same text"),
        ({"n": 3, "best_of": 2}, "best_of", "less than n"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"suffix": "x"}, "suffix", "no insertion"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "not in the vocabulary"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": [[1], [999]]}, None, "not in the vocabulary"),
        ({"prompt": "x" * 5000}, "prompt", "context is 1024 tokens"),
        ({"extra_body": {"min_tokens": 9, "max_tokens": 4}}, "min_tokens", "at most max_tokens"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate", "not permitted"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex", "structured_outputs"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["a"]}}, "guided_choice", "exclude each other"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options", "needs stream"),
    ],
)
def test_a_wrong_request_is_told_which_field(model: ServedModel, change: Any, param: str | None, text: str) -> None:
    with pytest.raises(openai.BadRequestError, match=text) as refused:
        list(model.client.completions.create(**{"model": "tiny", "prompt": "x", **change}))
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "text only",
        ),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0]", "role is system, developer"),
        ({"response_format": {"type": "xml"}}, "response_format", "type is text, json_object"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [tool("f"), tool("f")]}, "tools", "same name"),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "not among the tools",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "use one"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "does not know"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "no schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}},
            "response_format",
            "structured_outputs",
        ),
    ],
)
def test_a_wrong_chat_is_told_which_field(model: ServedModel, change: Any, param: Any, text: str) -> None:
    with pytest.raises(openai.BadRequestError, match=text) as refused:
        model.client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **change})
    assert refused.value.param == param


def test_other_errors_have_openais_classes(model: ServedModel) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        model.client.completions.create(model="huge", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        model.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        model.client.embeddings.create(model="tiny", input="x")


def test_a_request_that_takes_too_long_is_ended(model: ServedModel) -> None:
    late = LONG | {"extra_body": {"ignore_eos": True, "timeout": 0.05}}
    with pytest.raises(openai.APIStatusError, match=r"not finished within 0\.05 s") as ended:
        model.client.completions.create(**late)
    assert ended.value.status_code == 408
    assert ended.value.code == "timeout"
    with pytest.raises(openai.APIError, match="not finished within"):
        list(model.client.completions.create(stream=True, **late))


def test_the_async_client(model: ServedModel) -> None:
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{model.url}/v1", api_key="none", max_retries=0) as client:

            async def streamed() -> str:
                stream = await client.completions.create(prompt="Paris", max_tokens=20, stream=True, **GREEDY)
                return "".join([chunk.choices[0].text async for chunk in stream])

            whole = client.completions.create(prompt="Paris", max_tokens=20, **GREEDY)
            answers = await asyncio.gather(whole, *(streamed() for _ in range(8)))
            return [answers[0].choices[0].text, *answers[1:]]

    assert len(set(asyncio.run(both()))) == 1


def test_a_client_that_leaves_a_stream_frees_its_blocks(model: ServedModel) -> None:
    stream = model.client.completions.create(stream=True, n=4, **LONG)
    next(iter(stream))
    assert model.engine.stats.num_free_kv_blocks < model.engine.stats.num_kv_blocks
    stream.close()
    model.wait_idle()


@pytest.mark.parametrize("prompts", ["Paris", ["Paris", "Rome", "Athens"]])
def test_a_client_that_leaves_while_it_waits_frees_its_blocks(model: ServedModel, prompts: Any) -> None:
    aborted = model.engine.stats.total_generation_tokens

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=model.url, timeout=60) as client:
            body = {"prompt": prompts, "max_tokens": 900, "ignore_eos": True, "n": 4}
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.to_thread(wait_until, lambda: model.engine.stats.num_running >= 4, "the request runs")
            asking.cancel()

    asyncio.run(leave())
    model.wait_idle()
    assert model.engine.stats.total_generation_tokens - aborted < 900 * 4 * len(prompts)


def test_embeddings_of_a_model_that_makes_them(tmp_path: Path) -> None:
    folder = tiny_llama.build(tmp_path)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}), encoding="utf-8")
    texts = ["Paris", "Rome is the capital", "Paris"]
    with LLM(folder, num_kv_blocks=64) as llm:
        wanted = [output.embedding for output in llm.embed(texts, use_tqdm=False)]
    with serve(folder, num_kv_blocks=64) as served:
        packed = served.client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
        plain = served.client.embeddings.create(model="tiny", input=texts, encoding_format="float", dimensions=32)
        for answer in (packed, plain):
            assert [one.index for one in answer.data] == [0, 1, 2]
            for one, vector in zip(answer.data, wanted, strict=True):
                assert one.embedding == pytest.approx(vector, abs=1e-5)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens > 3
        with pytest.raises(openai.BadRequestError, match="generates no text"):
            served.client.completions.create(model="tiny", prompt="x")
        served.wait_idle()


def test_tokens_of_texts_and_conversations(model: ServedModel) -> None:
    def post(path: str, **body: Any) -> Any:
        answer = httpx.post(model.url + path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    made = post("/tokenize", prompt="Köln is", return_token_strs=True)
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == 1024
    assert post("/v1/detokenize", tokens=made["tokens"]) == {"prompt": "Köln is"}
    chat = post("/v1/tokenize", messages=MESSAGES)
    text = post("/detokenize", tokens=chat["tokens"])["prompt"]
    assert text.endswith("Paris?<|im_end|>\n<|im_start|>assistant\n")
    continued = post(
        "/tokenize", messages=[*MESSAGES, {"role": "assistant", "content": "Well"}], continue_final_message=True
    )
    assert post("/detokenize", tokens=continued["tokens"])["prompt"].endswith("assistant\nWell")
    many = post("/tokenize", prompt="Köln is " * 2000, return_token_strs=True)
    assert LONG_TEXT < many["count"] == len(many["token_strs"])
    assert post("/detokenize", tokens=[*many["tokens"], 10**9]) == {"prompt": "Köln is " * 2000}


def test_frames_are_exactly_openais(model: ServedModel) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{model.url}/v1/chat/completions", json=body, headers={"X-Request-Id": "abc"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    *frames, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    head = {key: chunks[0][key] for key in ("id", "object", "created", "model", "system_fingerprint")}
    assert head["id"] == "chatcmpl-abc"
    assert head["object"] == "chat.completion.chunk"
    assert all(chunk == head | {"choices": chunk["choices"]} for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert choices[0] == first
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    for choice in choices[1:-1]:
        assert list(choice) == ["index", "delta", "logprobs", "finish_reason"]
        assert list(choice["delta"]) == ["content"]

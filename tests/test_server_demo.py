"""The demo model over HTTP says what it says from Python; and calls tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served_model import ServedModel, serve

from lightvllm import LLM, SamplingParams
from lightvllm.hub.locate import model_dir
from lightvllm.server.settings import ServerSettings

pytestmark = [pytest.mark.demo, pytest.mark.slow]

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model() -> Iterator[ServedModel]:
    settings = ServerSettings(served_model_names=("demo",), log_requests=False)
    with serve(model_dir("smollm2-135m"), settings, num_kv_blocks=128, max_model_len=2048) as served:
        yield served
        served.wait_idle()


def test_a_chat_over_http_says_what_the_library_says(model: ServedModel) -> None:
    with LLM("smollm2-135m", num_kv_blocks=128, max_model_len=2048) as llm:
        wanted = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)[0].outputs[0]
    request: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 24}
    whole = model.client.chat.completions.create(**request).choices[0]
    assert (whole.message.content, whole.finish_reason) == (wanted.text, wanted.finish_reason)
    assert "Paris" in wanted.text
    streamed = [chunk.choices[0] for chunk in model.client.chat.completions.create(stream=True, **request)]
    assert "".join(choice.delta.content or "" for choice in streamed) == wanted.text
    assert streamed[-1].finish_reason == wanted.finish_reason


def test_a_tool_is_called_for_a_question(model: ServedModel) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    request: dict[str, Any] = {
        "model": "demo",
        "messages": question,
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    choice = model.client.chat.completions.create(**request).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"].startswith("Paris")
    pieces = [
        delta.function.arguments
        for chunk in model.client.chat.completions.create(stream=True, **request)
        for delta in chunk.choices[0].delta.tool_calls or ()
    ]
    assert "".join(pieces) == call.function.arguments

"""The request models: what a hostile body may cost."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lightvllm.server.chat_protocol import ChatCompletionRequest
from lightvllm.server.errors import invalid_request
from lightvllm.server.protocol import MAX_FIELDS, CompletionRequest, EmbeddingRequest, RequestModel
from lightvllm.server.tokens import DetokenizeRequest

MANY = 20_000
KEYS = {f"key{number}": 0 for number in range(MANY)}


def asking(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}]} | more


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": "a"} | KEYS),
        (CompletionRequest, {"prompt": [-1] * MANY}),
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": [[-1] * MANY]}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * MANY}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [-1] * MANY}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [1] * MANY}),
        (CompletionRequest, {"prompt": "a", "allowed_token_ids": [-1] * MANY}),
        (CompletionRequest, {"prompt": "a", "bad_words": [1] * MANY}),
        (CompletionRequest, {"prompt": "a", "logit_bias": KEYS}),
        (CompletionRequest, {"prompt": "a", "guided_choice": [1] * MANY}),
        (CompletionRequest, {"prompt": "a", "structured_outputs": {"choice": [1] * MANY}}),
        (EmbeddingRequest, {"input": [-1] * MANY}),
        (EmbeddingRequest, {"input": [""] * MANY}),
        (DetokenizeRequest, {"tokens": [-1] * MANY}),
        (ChatCompletionRequest, {"messages": [{}] * MANY}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"} | KEYS]}]}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "content": [{}] * MANY}]}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
        (ChatCompletionRequest, asking(tools=[{}] * MANY)),
        (ChatCompletionRequest, asking(documents=[1] * MANY)),
        (ChatCompletionRequest, asking(modalities=["image"] * MANY)),
        (ChatCompletionRequest, asking(metadata=KEYS)),
    ],
)
def test_a_body_of_wrong_items_makes_few_errors(model: type[RequestModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    assert refused.value.error_count() <= 8
    assert len(invalid_request(refused.value).message) < 2000


def test_many_errors_of_one_body_are_told_in_linear_time() -> None:
    class Wide(RequestModel):
        values: dict[str, str]

    with pytest.raises(ValidationError) as refused:
        Wide.model_validate({"values": {f"k{number}": number for number in range(50_000)}})
    assert invalid_request(refused.value).message.endswith("; and 49997 more")


def test_an_object_of_too_many_fields_is_told_as_such() -> None:
    with pytest.raises(ValidationError, match=f"the most allowed are {MAX_FIELDS}"):
        CompletionRequest.model_validate({"prompt": "a"} | KEYS)

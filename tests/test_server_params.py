"""Text on its way to the engine: what cannot fit is refused before it is tokenized."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_client import ScriptedClient

from lightvllm.server.errors import ApiError
from lightvllm.server.params import TEXT_PER_TOKEN, encode


class Counting:
    """A token per four characters; counts how much it has been given."""

    longest_token: int | None = 4

    def __init__(self) -> None:
        self.seen = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.seen += len(text)
        return [1] * (len(text) // 4)


class Client(ScriptedClient):
    tokenizer: Any = None


@pytest.fixture
def client() -> Client:
    client = Client()  # a context of 512 tokens
    client.tokenizer = Counting()
    return client


def test_what_cannot_fit_is_not_tokenized(client):
    with pytest.raises(ApiError, match="512 tokens, in which the prompt's 1000000 characters cannot fit") as refused:
        asyncio.run(encode(client, "x" * 1_000_000, True, "prompt", to_fit=True))
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert refused.value.param == "prompt"
    assert client.tokenizer.seen == 0


@pytest.mark.parametrize(("length", "to_fit", "longest"), [(2048, True, 4), (10**6, False, 4), (10**6, True, None)])
def test_what_may_fit_is(client, length, to_fit, longest):
    client.tokenizer.longest_token = longest
    assert len(asyncio.run(encode(client, "x" * length, True, "prompt", to_fit=to_fit))) == length // 4
    assert client.tokenizer.seen == length


@pytest.mark.parametrize(("longest", "to_fit"), [(None, True), (None, False), (4, False), (100_000, True)])
def test_what_would_keep_a_thread_for_long_is_not_tokenized(client, monkeypatch, longest, to_fit):
    monkeypatch.setattr("lightvllm.server.params.MAX_TEXT", 20_000)
    client.tokenizer.longest_token = longest
    asyncio.run(encode(client, "x" * 20_000, True, "prompt", to_fit=to_fit))
    client.tokenizer.seen = 0
    with pytest.raises(ApiError, match="20001 characters, of which this server tokenizes 20000 at most") as refused:
        asyncio.run(encode(client, "x" * 20_001, True, "prompt", to_fit=to_fit))
    assert (refused.value.status, refused.value.param, client.tokenizer.seen) == (400, "prompt", 0)


def test_a_long_context_has_room_for_long_texts(client, monkeypatch):
    monkeypatch.setattr("lightvllm.server.params.MAX_TEXT", 10)
    most = client.info.config.model.max_model_len * TEXT_PER_TOKEN
    asyncio.run(encode(client, "x" * most, True, "prompt"))
    with pytest.raises(ApiError, match=f"tokenizes {most} at most"):
        asyncio.run(encode(client, "x" * (most + 1), True, "prompt"))

"""What is read of a body, and which requests belong together."""

from __future__ import annotations

import json

import pytest

from lightvllm.router.body import affinity_key, parse
from lightvllm.router.replies import ApiError


def key(most: int = 64, **body: object) -> bytes | None:
    return affinity_key(parse(json.dumps(body).encode()), most)


def chat(*contents: str, system: str = "be brief") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *said]


def test_a_growing_conversation_keeps_its_key():
    keys = {key(messages=chat(*["Hi", "Hello!", "And then?", "Nothing."][:length])) for length in (1, 3, 4)}
    assert len(keys) == 1


def test_conversations_with_one_system_prompt_have_keys_of_their_own():
    long = "You are helpful. " * 100
    assert key(messages=chat("Hi", system=long)) != key(messages=chat("Good day", system=long))


def test_completions_share_the_key_of_their_beginning():
    beginning = "x" * 100
    assert key(prompt=beginning + "a") == key(prompt=beginning + "b") != key(prompt="y" + beginning)


def test_embeddings_go_by_their_input_and_other_bodies_have_no_key():
    assert key(input="a") != key(input="b")
    assert key(model="m") is None
    assert key(most=0, prompt="a") is None


@pytest.mark.parametrize("messages", [None, "text", [1, 2], [], [{"role": 5}]])
def test_malformed_messages_are_for_the_replica_to_refuse(messages):
    assert parse(json.dumps({"model": "m", "messages": messages}).encode()).model == "m"
    key(messages=messages)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b'{"model": "m"', "no valid JSON"),
        (b'{"model": "\xff"}', "no valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b'{"model": 5}', "'model' must be a string"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_what_is_no_request_is_400(content, words):
    with pytest.raises(ApiError, match=words) as caught:
        parse(content)
    assert caught.value.status == 400

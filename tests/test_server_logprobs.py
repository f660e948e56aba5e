"""Log-probabilities in OpenAI's two shapes, over both kinds of tokenizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from lightvllm.engine.outputs import Logprob
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.server.logprobs import (
    MIN_LOGPROB,
    CompletionLogprobWriter,
    chat_logprobs,
    join_logprobs,
    prompt_logprobs,
)

TEXTS = ["hello world", " hello", "東京 😀 hello", "é", ""]


@pytest.fixture(scope="module", params=["level", "fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    write: Any = {"level": tiny_tokenizers.byte_level, "fallback": tiny_tokenizers.byte_fallback}[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    return Tokenizer.from_dir(write(folder))


def position(token_id: int, *others: int, chosen_rank: int = 1) -> dict[int, Logprob]:
    """The chosen token, and others at the ranks that are left."""
    ranks = iter(rank for rank in range(1, 9) if rank != chosen_rank)
    found = {token_id: Logprob(-0.5, chosen_rank, "?")}
    return found | {i: Logprob(-1.0 - n, next(ranks), "?") for n, i in enumerate(others)}


def writer(tokenizer: Tokenizer, count: int = 0) -> CompletionLogprobWriter:
    return CompletionLogprobWriter(tokenizer, count, as_ids=False, skipped=tokenizer.special_token_ids)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("begins_at", [0, 7])
def test_offsets_are_where_the_tokens_stand_in_the_text(tokenizer: Tokenizer, text: str, begins_at: int) -> None:
    ids = tokenizer.encode(text)
    shown = tokenizer.decode(ids)
    whole = writer(tokenizer).write(ids, [position(i) for i in ids], begins_at=begins_at)
    for index, (token, offset) in enumerate(zip(whole["tokens"], whole["text_offset"], strict=True)):
        if "\ufffd" not in token and ids[index] not in tokenizer.special_token_ids:
            at = offset - begins_at
            assert shown.startswith(token, at) or shown.startswith(token.removeprefix(" "), at)
    assert whole["text_offset"] == sorted(whole["text_offset"])
    for cut in range(1, len(ids)):
        parts = writer(tokenizer)
        first = parts.write(ids[:cut], [position(i) for i in ids[:cut]], begins_at=begins_at)
        assert join_logprobs([first, parts.write(ids[cut:], [position(i) for i in ids[cut:]])]) == whole


def test_a_prompts_special_tokens_stand_in_its_text_only_if_they_were_written(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_token_ids)
    name = tokenizer.token(special)
    assert name is not None
    ids = [special, tokenizer.token_id("x") or 0]
    nothing: list[Any] = [None] * len(ids)
    assert writer(tokenizer).write(ids, nothing, begins_at=0, text="x")["text_offset"][-1] == 0
    written = writer(tokenizer).write(ids, nothing, begins_at=0, text=name + "x")
    assert written["text_offset"][-1] == len(name)
    assert written["token_logprobs"] == written["top_logprobs"] == nothing


def test_the_chosen_token_is_told_beside_the_most_probable_ones(tokenizer: Tokenizer) -> None:
    low, a, b, c = (tokenizer.token_id(letter) or 0 for letter in ("h", "e", "l", "o"))
    told = writer(tokenizer, 2).write([low], [position(low, a, b, c, chosen_rank=5)], begins_at=0)
    assert told["top_logprobs"] == [{"h": -0.5, "e": -1.0, "l": -2.0}]
    chat = chat_logprobs(tokenizer, [position(low, a, b, c, chosen_rank=5)], 2)["content"][0]
    assert (chat["token"], chat["logprob"], chat["bytes"]) == ("h", -0.5, [104])
    assert [(top["token"], top["logprob"]) for top in chat["top_logprobs"]] == [("e", -1.0), ("l", -2.0)]
    assert chat_logprobs(tokenizer, [position(low)], 0)["content"][0]["top_logprobs"] == []
    scores = prompt_logprobs([None, position(low, a, b, c, chosen_rank=5)], 1)
    assert scores[0] is None
    assert set(scores[1] or ()) == {str(low), str(a)}


def test_bytes_that_are_no_character_keep_their_values(tokenizer: Tokenizer) -> None:
    ids = [i for i in tokenizer.encode("東", add_special_tokens=False) if tokenizer.token_bytes(i) != b" "]
    content = chat_logprobs(tokenizer, [position(i) for i in ids], 0)["content"]
    assert [entry["token"] for entry in content] == ["\ufffd"] * 3
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "東"
    told = writer(tokenizer, 3).write([ids[0]], [position(ids[0], *ids[1:])], begins_at=0)
    assert told["top_logprobs"] == [{"\ufffd": -0.5}], "of tokens that read alike the chosen one is told"
    by_id = chat_logprobs(tokenizer, [position(ids[0])], 0, as_ids=True)["content"]
    assert by_id[0]["token"] == f"token_id:{ids[0]}"


def test_minus_infinity_has_a_number(tokenizer: Tokenizer) -> None:
    never = {5: Logprob(-math.inf, 1, "?")}
    assert chat_logprobs(tokenizer, [never], 1)["content"][0]["logprob"] == MIN_LOGPROB
    assert writer(tokenizer).write([5], [never])["token_logprobs"] == [MIN_LOGPROB]

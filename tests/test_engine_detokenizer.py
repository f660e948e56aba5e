"""Text as it comes: whole characters, held-back beginnings of stop strings, and in the end exactly ``decode``."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvllm.engine.detokenizer import Detokenizer
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    return [
        Tokenizer.from_dir(tiny_tokenizers.byte_level(folder / "level")),
        Tokenizer.from_dir(tiny_tokenizers.byte_fallback(folder / "fallback")),
    ]


@pytest.fixture(scope="module")
def tokenizer(tokenizers: list[Tokenizer]) -> Tokenizer:
    return tokenizers[0]


def feed(tokenizer: Tokenizer, ids: Sequence[int], **params: object) -> tuple[list[str], str, str | None]:
    """What is visible after each token, the final text, and the stop string met."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=None, **params))  # type: ignore[arg-type]
    seen = []
    for token_id in ids:
        stop = detokenizer.append(token_id)
        seen.append(detokenizer.visible)
        if stop is not None:
            break
    else:
        stop = detokenizer.flush()
    for earlier, later in itertools.pairwise([*seen, detokenizer.visible]):
        assert later.startswith(earlier), "what was shown is never taken back"
    assert detokenizer.visible == detokenizer.text
    return seen, detokenizer.text, stop


def test_a_character_appears_when_it_is_complete(tokenizers: list[Tokenizer]) -> None:
    level, fallback = tokenizers
    assert feed(level, level.encode("aß東"))[0] == ["a", "a", "aß", "aß", "aß", "aß東"]
    ids = fallback.encode("aßa", add_special_tokens=False)
    assert feed(fallback, ids)[0] == ["", "a", "a", "a", "aßa"], "a run of byte tokens is judged when it has ended"


def test_an_unfinished_character_is_broken_in_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a東")[:-1]
    seen, text, _ = feed(tokenizer, ids)
    assert seen == ["a", "a", "a"]
    assert text == "a\ufffd" == tokenizer.decode(ids)


def test_a_model_that_says_u_fffd_may(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\ufffdb")
    assert feed(tokenizer, ids)[1] == "a\ufffdb"
    assert feed(tokenizer, ids[:-1])[1] == "a\ufffd"


def test_special_tokens_are_skipped_or_not(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("he"), 2, 3, *tokenizer.encode("llo")]
    assert feed(tokenizer, ids)[1] == "he<tool>llo"
    assert feed(tokenizer, ids, skip_special_tokens=False)[1] == "he<|end|><tool>llo"


def test_an_id_without_a_token_has_no_text(tokenizers: list[Tokenizer]) -> None:
    level, fallback = tokenizers
    assert feed(level, [*level.encode("he"), level.vocab_size])[1] == "he"
    first, last = 3, 131  # <0x00> and <0x80>: one run of bytes, and not UTF-8
    assert feed(fallback, [first, fallback.vocab_size, last])[1] == "\ufffd\ufffd"


def test_a_stop_string_across_tokens_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abhello world")
    seen, text, stop = feed(tokenizer, ids, stop=["o wo", "zzz"])
    assert (text, stop) == ("abhell", "o wo")
    assert seen == ["a", "ab", "abhell", "abhell", "abhell"]
    assert feed(tokenizer, ids, stop="o wo", include_stop_str_in_output=True)[1] == "abhello wo"


def test_what_may_become_a_stop_string_is_shown_once_it_cannot(tokenizer: Tokenizer) -> None:
    seen, text, stop = feed(tokenizer, tokenizer.encode("axxyb"), stop="xxz")
    assert seen == ["a", "a", "a", "axxy", "axxyb"]
    assert (text, stop) == ("axxyb", None)


def test_what_was_held_back_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    seen, text, stop = feed(tokenizer, tokenizer.encode("axx"), stop="xxz")
    assert seen == ["a", "a", "a"]
    assert (text, stop) == ("axx", None)


def test_the_earliest_of_several_stop_strings_wins(tokenizer: Tokenizer) -> None:
    (hello,) = tokenizer.encode("hello")
    assert feed(tokenizer, [hello], stop=["o", "ell"])[1:] == ("h", "ell")


def test_a_stop_string_counts_only_after_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("axbxcx")
    assert feed(tokenizer, ids, stop="x", min_tokens=2)[1] == "axb"
    assert feed(tokenizer, ids, stop="x", min_tokens=4)[1] == "axbxc"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3), st.text("ab", max_size=30), st.data())
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(
    tokenizer: Tokenizer, stops: list[str], text: str, data: st.DataObject
) -> None:
    """``min_tokens`` lets stop strings go by, so that the text goes on."""
    params = SamplingParams(max_tokens=None, stop=stops, min_tokens=1000)
    detokenizer, begun = Detokenizer(tokenizer, params), ""
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    for token_id in tokenizer.encode(text):
        detokenizer.append(token_id)
        begun = detokenizer.text
        if data.draw(st.booleans()):  # nobody may have looked for some tokens
            held = max((len(one) for one in beginnings if begun.endswith(one)), default=0)
            assert detokenizer.visible == begun[: len(begun) - held]
    assert begun == text


def test_a_long_stop_string_takes_no_more_memory_than_itself(tokenizer: Tokenizer) -> None:
    (token_id,) = tokenizer.encode("a")
    params = SamplingParams(max_tokens=None, stop="a" * 5000 + "b")
    tracemalloc.start()
    detokenizer = Detokenizer(tokenizer, params)
    for _ in range(100):
        detokenizer.append(token_id)
        assert detokenizer.visible == ""
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_stop_string_may_be_made_of_byte_tokens(tokenizers: list[Tokenizer]) -> None:
    _, fallback = tokenizers
    ids = fallback.encode("a東", add_special_tokens=False)
    assert feed(fallback, ids, stop="東")[1:] == ("a", "東")


# Bytes that begin, continue and break characters, added tokens, spaces and words; few enough to meet often.
LEVEL_TEXTS = ["hello", " w", "or", " ", "x", "ß", "東", "😀"]


@pytest.mark.parametrize("which", [0, 1])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_the_final_text_is_what_decode_says(tokenizers: list[Tokenizer], which: int, data: st.DataObject) -> None:
    tokenizer = tokenizers[which]
    common = sorted({i for text in LEVEL_TEXTS for i in tokenizer.encode(text)} | {0, 1, 2, 3})
    one = st.sampled_from(common) | st.integers(0, tokenizer.vocab_size + 2)
    ids = data.draw(st.lists(one, max_size=40))
    skip = data.draw(st.booleans())
    _, text, _ = feed(tokenizer, ids, skip_special_tokens=skip)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    stop = data.draw(st.lists(st.text("helowrdx ß東😀\ufffd", min_size=1, max_size=4), min_size=1, max_size=3))
    _, cut, found = feed(tokenizer, ids, skip_special_tokens=skip, stop=stop)
    if found is None:
        assert cut == text
        assert not any(s in text for s in stop)
    else:
        assert text.startswith(cut + found)
        assert not any(s in cut for s in stop)

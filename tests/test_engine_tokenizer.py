"""The tokenizer against transformers' on the same folders, and what it says to broken folders and messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError

TEXTS = ["hello world", " leading space", "two  spaces", "Grüße, 東京 😀", "a\nb\tc", "<|end|>hello<tool>", ""]
CONVERSATION = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "hello <b>&</b> 東"},
    {"role": "assistant", "content": "hello"},
]


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("level"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizers.byte_fallback(tmp_path_factory.mktemp("fallback"))


@pytest.mark.parametrize("kind", ["level", "fallback"])
def test_it_agrees_with_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder: Path = request.getfixturevalue(kind)
    ours, theirs = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.special_token_ids == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["level", "fallback"])
def test_no_token_stands_for_more_than_the_longest(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.from_dir(request.getfixturevalue(kind))
    assert tokenizer.longest_token is not None
    for text in [*TEXTS, "<|end|>" * 100, "\n" * 1000, "\U0010ffff" * 50]:
        assert len(text) <= tokenizer.longest_token * len(tokenizer.encode(text, add_special_tokens=False))


def test_an_unknown_token_may_stand_for_any_number_of_characters(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models

    fast = FastTokenizer(models.WordLevel({"hello": 0, "<unk>": 1}, unk_token="<unk>"))
    fast.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).longest_token is None


def test_bos_is_added_where_the_post_processor_does(level: Path, fallback: Path) -> None:
    with_bos, without = Tokenizer.from_dir(fallback), Tokenizer.from_dir(level)
    assert with_bos.encode("hello")[0] == 1
    assert with_bos.encode("hello", add_special_tokens=False) == with_bos.encode("hello")[1:]
    assert without.encode("hello") == without.encode("hello", add_special_tokens=False)
    assert without.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_chat_is_rendered_as_transformers_does(level: Path, add_generation_prompt: bool) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(level).apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ours = Tokenizer.from_dir(level).apply_chat_template(CONVERSATION, add_generation_prompt)
    assert ours == theirs
    assert ours.startswith("<|bos|>")
    assert ours.rstrip().endswith("<|assistant|>") is add_generation_prompt
    assert "<b>&</b> 東<|end|>" in ours, "nothing is escaped"
    assert '{"<tools>": null}' in ours


def test_a_template_file_wins_and_knows_the_date(tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}",
        encoding="utf-8",
    )
    assert Tokenizer.from_dir(folder).apply_chat_template(CONVERSATION[:2]) == "hello <b>&</b> 東4"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    folder = tiny_tokenizers.byte_level(tmp_path, chat_template=None)
    templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}), encoding="utf-8")
    assert Tokenizer.from_dir(folder).apply_chat_template(CONVERSATION) == "D"


def test_saved_truncation_and_padding_are_not_applied(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as FastTokenizer

    file = tiny_tokenizers.byte_level(tmp_path) / "tokenizer.json"
    fast = FastTokenizer.from_file(str(file))
    fast.enable_truncation(2)
    fast.enable_padding(length=9)
    fast.save(str(file))
    assert len(Tokenizer.from_dir(tmp_path).encode("xxxx")) == 4


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "at least one message"),
        (["hello"], "message 0 is 'hello'; expected a mapping"),
        ([{"content": "hello"}], "message 0 is .*; expected a mapping"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "judge", "content": "x"}], "refuses these messages: unknown role judge"),
    ],
)
def test_bad_messages_are_refused(level: Path, messages: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Tokenizer.from_dir(level).apply_chat_template(messages)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "has no chat template"),
        ("{% for %}", "chat template is broken"),
        ("{{ 1 + messages[0]['content'] }}", "refuses these messages: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: access to attribute"),
        ("{{ messages.append(1) }}", "refuses these messages: access to attribute"),
    ],
)
def test_bad_templates_are_refused(tmp_path: Path, template: str | None, text: str) -> None:
    tokenizer = Tokenizer.from_dir(tiny_tokenizers.byte_level(tmp_path, chat_template=template))
    with pytest.raises(ConfigError, match=text):
        tokenizer.apply_chat_template(CONVERSATION)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    tiny_tokenizers.byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("kind", ["level", "fallback"])
def test_bytes_of_tokens_make_up_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer.from_dir(request.getfixturevalue(kind))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined in (text, " " + text)
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(1) == (b"<|eos|>" if kind == "level" else b"<s>")


def test_a_byte_that_is_no_character_keeps_its_value(level: Path, fallback: Path) -> None:
    for folder in (level, fallback):
        tokenizer = Tokenizer.from_dir(folder)
        pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("東", add_special_tokens=False)]
        assert [piece for piece in pieces if piece != b" "] == [b"\xe6", b"\x9d", b"\xb1"]


@pytest.mark.parametrize("content", ["hello", "ends with a space "])
def test_a_final_message_is_continued_as_transformers_does(level: Path, content: str) -> None:
    from transformers import AutoTokenizer

    messages = [*CONVERSATION[:2], {"role": "assistant", "content": content}]
    theirs = AutoTokenizer.from_pretrained(level).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    tokenizer = Tokenizer.from_dir(level)
    assert tokenizer.apply_chat_template(messages, False, continue_final_message=True) == theirs
    assert theirs.endswith(content.strip())
    with pytest.raises(ConfigError, match="exclude each other"):
        tokenizer.apply_chat_template(messages, continue_final_message=True)
    with pytest.raises(ConfigError, match="drops the final message"):
        tokenizer.apply_chat_template(messages, False, continue_final_message=True, chat_template="x")


def test_a_template_gets_tools_documents_and_names_of_the_caller(level: Path) -> None:
    tokenizer = Tokenizer.from_dir(level)
    template = "{{ tools | tojson }}{{ documents[0].text }}{{ thinking }}{{ eos_token }}"
    text = tokenizer.apply_chat_template(
        CONVERSATION,
        tools=[{"name": "f"}],
        documents=[{"text": "D"}],
        chat_template=template,
        template_kwargs={"thinking": 1},
    )
    assert text == '[{"name": "f"}]D1<|eos|>'
    assert tokenizer.template_variables(template) == {"tools", "documents", "thinking", "eos_token"}
    assert "documents" not in tokenizer.template_variables()
    for name in ("messages", "tools", "eos_token"):
        with pytest.raises(ConfigError, match=f"may not set {name}"):
            tokenizer.apply_chat_template(CONVERSATION, template_kwargs={name: 1})


def test_half_a_surrogate_pair_is_refused(level: Path) -> None:
    with pytest.raises(ConfigError, match="no valid Unicode"):
        Tokenizer.from_dir(level).encode("a\ud800b")

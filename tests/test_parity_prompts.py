"""Prompt files, and the prompts that are shipped."""

import io

import pytest

from lightvllm.errors import ConfigError
from lightvllm.parity.prompts import Prompt, default_prompts, read_prompts


def test_the_shipped_prompts():
    prompts = default_prompts()
    assert len(prompts) == 8
    assert prompts[0] == Prompt(messages=[{"role": "user", "content": "What is the capital of France?"}])
    assert any(not p.title.isascii() for p in prompts)
    assert max(len(p.title) for p in prompts) > 500
    assert {p.messages is None for p in prompts} == {True, False}


def test_text(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text('one\n\n  two\n{"prompt": "as it is"}\n')
    assert [p.title for p in read_prompts(file)] == ["one", "  two", '{"prompt": "as it is"}']


def test_jsonl(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('"a\\nb"\n\n{"prompt": "c"}\n{"messages": [{"role": "user", "content": "d"}]}\n')
    prompts = read_prompts(file)
    assert [p.title for p in prompts] == ["a\nb", "c", "d"]
    assert prompts[2].messages == [{"role": "user", "content": "d"}]


def test_standard_input(monkeypatch, tmp_path):
    from pathlib import Path

    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert [p.title for p in read_prompts(Path("-"))] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "line 2: .*; expected a string"),
        ("3", "line 2: "),
        ("{}", "line 2: .*either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "line 2: .*either prompt or messages"),
        ('{"promt": "a"}', "line 2: .*promt"),
        ('{"prompt": ""}', "line 2: .*length"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, words):
    file = tmp_path / "p.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    with pytest.raises(ConfigError, match=words):
        read_prompts(file)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the prompts"):
        read_prompts(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ConfigError, match="no prompt in it"):
        read_prompts(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="give a UTF-8 file"):
        read_prompts(tmp_path / "latin")

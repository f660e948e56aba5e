"""Files with secrets, and keys that are shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightvllm.errors import ConfigError
from lightvllm.keys import ApiKeys, check_private, is_sendable, read_keys, read_word


def private(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def test_secrets_of_another_user_may_be_readable_by_our_group(tmp_path, monkeypatch):
    """As Kubernetes mounts them for a pod with fsGroup."""
    path = tmp_path / "key"
    path.write_text("x")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="open to others"):
        check_private(path, "key")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    check_private(path, "key")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="defaultMode: 0400"):
        check_private(path, "key")


@pytest.mark.parametrize(
    ("authorization", "number"),
    [
        ("Bearer first", 1),
        ("bearer second", 2),
        ("Bearer  second ", 2),
        ("Bearer third", None),
        ("Bearer", None),
        ("Basic first", None),
        ("first", None),
        ("Bearer \udcff\xe4", None),
        ("", None),
        (None, None),
    ],
)
def test_a_shown_key_is_found(authorization, number):
    assert ApiKeys(["first", "second"]).find(authorization) == number


def test_without_keys_nothing_is_found():
    assert not ApiKeys()
    assert ApiKeys().find("Bearer ") is None


def test_keys_are_shown_by_nothing():
    keys = ApiKeys(["very-secret"])
    assert "very-secret" not in f"{keys!r}{vars(keys)}"
    with pytest.raises(ConfigError) as refused:
        ApiKeys(["good", "very secret"])
    assert str(refused.value) == "API key 2 must be printable ASCII without spaces"


@pytest.mark.parametrize("key", ["", "a b", "a\n", "schlüssel"])
def test_what_cannot_be_sent(key):
    assert not is_sendable(key)


def test_files_of_keys(tmp_path):
    path = private(tmp_path / "keys", b"# ours\n\n first \nsecond\n  # theirs\n")
    assert read_keys(path) == ["first", "second"]
    assert ApiKeys.read(path).find("Bearer second") == 2
    with pytest.raises(ConfigError, match="holds no key; put one on each line"):
        read_keys(private(path, b"# none\n"))
    with pytest.raises(ConfigError, match="keys: API key 1 must be"):
        ApiKeys.read(private(path, b"a b"))
    with pytest.raises(ConfigError, match=r"cannot read the API key file .*No such file"):
        read_keys(tmp_path / "nothing")


def test_files_of_one_secret(tmp_path):
    path = private(tmp_path / "key", b" one\n")
    assert read_word(path, "key file") == "one"
    for content, words in (
        (b"", "must hold one word"),
        (b"a\nb", "must hold one word"),
        (b"\xff", "expected ASCII text"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_word(private(path, content), "key file")

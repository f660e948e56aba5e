"""Tokens, certificates' files, and addresses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from k8s_servers import write_token

from lightvllm.backends.k8s.security import Tls, Token, check_address, split_address
from lightvllm.errors import ConfigError


def test_a_token_matches_itself_alone() -> None:
    token = Token.new()
    assert token.matches(token.metadata())
    assert not Token.new().matches(token.metadata())
    assert not token.matches(())
    assert not token.matches((*token.metadata(), *token.metadata()))
    assert not token.matches((("authorization", token.reveal()),))
    assert not token.matches((("authorization", "Bearer "),))
    assert not token.matches((("authorization", "Bearer ž"),))
    assert token.matches((("user-agent", "x"), *token.metadata()))


def test_a_token_is_not_shown() -> None:
    token = Token.new()
    assert len(token.reveal()) >= 43  # 32 random bytes
    assert token.reveal() not in f"{token} {token!r}"


def test_a_token_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = write_token(tmp_path)
    assert Token.read(path).reveal() == Path(path).read_text().strip()


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o620])
def test_a_token_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_token(tmp_path)
    os.chmod(path, mode)
    with pytest.raises(ConfigError, match=rf"open to others \(mode {mode:04o}\); run: chmod 600"):
        Token.read(path)


def test_a_secret_mounted_for_ones_group_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_token(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # the file is then another's
    os.chmod(path, 0o440)
    assert Token.read(path).reveal()
    os.chmod(path, 0o444)
    with pytest.raises(ConfigError, match="open to others"):
        Token.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "must hold one word"), (b" \n", "must hold one word"), (b"a b", "one word"), (b"\xff", "ASCII")],
)
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_token(tmp_path)
    Path(path).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Token.read(path)


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file"):
        Token.read(tmp_path / "nowhere")


def test_tls_is_all_or_nothing(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("cert", "key", "ca")]
    assert Tls.from_options(None, None, None) is None
    with pytest.raises(ConfigError, match="missing: tls_key, tls_ca"):
        Tls.from_options(files[0], None, None)
    with pytest.raises(ConfigError, match=r"cert: No such file"):
        Tls.from_options(*files)
    for file in files:
        Path(file).write_text(file)
    tls = Tls.from_options(*files)
    assert tls is not None
    assert [content.decode() for content in tls.read()] == files


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("worker-0.llm:9000", ("worker-0.llm", 9000)), ("[::1]:80", ("::1", 80))],
)
def test_addresses_are_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "9000", ":9000", "host:", "host:x", "host:65536", "::1:80", "host:-1"])
def test_malformed_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="malformed; expected host:port"):
        split_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.0.1:1", "localhost:1", "[::1]:1"])
def test_loopback_needs_no_tls(address: str) -> None:
    check_address(address, None)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "10.0.0.1:1", "[::]:1", "localhost.example:1", "127.0.0.1.nip.io:1"])
def test_other_addresses_need_tls(address: str) -> None:
    with pytest.raises(ConfigError, match=r"not a loopback address.*mutual TLS"):
        check_address(address, None)
    check_address(address, Tls("cert", "key", "ca"))

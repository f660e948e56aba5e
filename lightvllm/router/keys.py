"""API keys of the router's clients: read from a file, compared in constant time, shown by nothing."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from lightvllm.errors import ConfigError


class ApiKeys:
    """The keys of which a request must show one; without any, every request is let in.

    Raises ConfigError for one that cannot be sent in a header.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests: list[bytes] = []
        for number, key in enumerate(keys, 1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"API key {number} must be printable ASCII without spaces")
            self._digests.append(_digest(key))

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """One key a line; empty lines and those that begin with '#' are skipped. Raises ConfigError."""
        lines = (line.strip() for line in read_secret(path, "API key file").splitlines())
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(
                f"API key file {path} holds no key; make one with: "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        try:
            return cls(keys)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def allow(self, authorization: str | None) -> bool:
        """Whether the header ``Authorization`` shows one of them."""
        if not self._digests:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        shown = _digest(given.strip())
        # All are looked at, so that the time tells nothing.
        matches = [hmac.compare_digest(shown, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def read_secret(path: Path, what: str) -> str:
    """The file's text. Raises ConfigError if it is missing, no ASCII, or open to others."""
    check_private(path, what)
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path}: expected ASCII text") from None


def check_private(path: Path, what: str) -> None:
    """Raise ConfigError if the file is not there, or others than its owner can read it.

    A file of one's own must be open to nobody else; another's (a Kubernetes Secret's, which the kubelet mounts for the
    pod's group) must not be open to all.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"{what} {path}: {error.strerror}") from None
    forbidden = 0o077 if status.st_uid == os.geteuid() else 0o007
    if status.st_mode & forbidden:
        raise ConfigError(
            f"{what} {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); run: chmod 600 {path}"
        )


def read_key(path: Path) -> str:
    """The one key that replicas are shown. Raises ConfigError."""
    text = read_secret(path, "backend API key file").strip()
    if not text or not text.isprintable() or " " in text:
        raise ConfigError(f"backend API key file {path} must hold one key")
    return text


def _digest(key: str) -> bytes:
    """Equal in length, so that comparing tells nothing of a key's; headers may hold any bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

"""API keys and other secrets in files: read, checked to be private, compared in constant time, shown by nothing.

Any module may import this one; it imports ``errors`` alone.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from lightvllm.errors import ConfigError

_MAKE_ONE = "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"


class ApiKeys:
    """The keys of which a request must show one. Raises ConfigError for one that cannot be sent in a header."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests: list[bytes] = []
        for number, key in enumerate(keys, 1):
            if not is_sendable(key):
                raise ConfigError(f"API key {number} must be printable ASCII without spaces")
            self._digests.append(_digest(key))

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Those of a file, see ``read_keys``. Raises ConfigError."""
        keys = read_keys(path)
        try:
            return cls(keys)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def find(self, authorization: str | None) -> int | None:
        """The number, from 1, of the key that the header ``Authorization`` shows; None if it shows none of them."""
        scheme, _, given = (authorization or "").partition(" ")
        shown, found = _digest(given.strip()), None
        for number, digest in enumerate(self._digests, 1):  # all, so that the time tells nothing
            if hmac.compare_digest(shown, digest):
                found = number
        return found if scheme.lower() == "bearer" else None


def is_sendable(key: str) -> bool:
    """Whether it can be sent in a header: printable ASCII without spaces."""
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


def read_keys(path: Path, what: str = "API key file") -> list[str]:
    """One key a line; empty lines and those that begin with '#' are skipped. Raises ConfigError."""
    lines = (line.strip() for line in read_secret(path, what).splitlines())
    if not (keys := [line for line in lines if line and not line.startswith("#")]):
        raise ConfigError(f"{what} {path} holds no key; put one on each line; {_MAKE_ONE}")
    return keys


def read_word(path: str | os.PathLike[str], what: str) -> str:
    """The one secret that the file holds. Raises ConfigError."""
    text = read_secret(path, what).strip()
    if not is_sendable(text):
        raise ConfigError(f"{what} {os.fspath(path)} must hold one word; {_MAKE_ONE}")
    return text


def read_secret(path: str | os.PathLike[str], what: str) -> str:
    """The file's text. Raises ConfigError if it is missing, no ASCII, or open to others."""
    check_private(path, what)
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {os.fspath(path)}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {os.fspath(path)}: expected ASCII text") from None


def check_private(path: str | os.PathLike[str], what: str) -> None:
    """Raise ConfigError if a secret's file cannot be read, or others than its owner can read it.

    A file of one's own must be open to nobody else; another's (a Kubernetes Secret's, which the kubelet mounts for the
    pod's group) must not be open to all.
    """
    try:
        status = os.stat(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {os.fspath(path)}: {error.strerror}") from None
    own = status.st_uid == os.geteuid()
    if status.st_mode & (0o077 if own else 0o007):
        raise ConfigError(
            f"{what} {os.fspath(path)} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"run: chmod 600 {os.fspath(path)}" + ("" if own else " (in a Kubernetes Secret volume: defaultMode: 0400)")
        )


def _digest(key: str) -> bytes:
    """Equal in length, so that comparing tells nothing of a key's; headers may hold any bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()

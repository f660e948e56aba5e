"""The two files of ``lightvllm run-batch``: requests, and answers that are only ever appended.

The id of an answer is a digest of the model's name and of the request that it answers. So what is still to be done
follows from the two files alone: an answer whose request has changed, or is gone, is noticed, and nothing is answered
twice. Lines are read one at a time; what stays in memory is a digest per request, about a hundred bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from lightvllm.errors import ConfigError

MAX_LINE_BYTES = 64 << 20
_ID = re.compile(r"batch_req_([0-9a-f]{24})")


class Entry(msgspec.Struct):
    """A line of the input. Everything but ``custom_id`` is checked when it is run, and may be wrong."""

    custom_id: str
    method: Any = None
    url: Any = None
    body: Any = None

    def identity(self, model: str) -> bytes:
        """12 bytes that no other request has."""
        content = msgspec.json.encode([model, self.custom_id, self.method, self.url, self.body], order="deterministic")
        return hashlib.blake2b(content, digest_size=12).digest()


class _Answer(msgspec.Struct):
    id: str
    custom_id: str


_entry = msgspec.json.Decoder(Entry)
_answer = msgspec.json.Decoder(_Answer)


def answer_id(identity: bytes) -> str:
    return f"batch_req_{identity.hex()}"


def read_entries(path: Path) -> Iterator[Entry]:
    """The requests of a file, line by line; empty lines are skipped. Raises ConfigError, naming the line."""
    with _opened(path) as file:
        for number, line in _lines(file, path):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                entry = _entry.decode(text)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{path}, line {number} is no request: {error}; expected a JSON object with custom_id, method, "
                    "url and body"
                ) from None
            if not entry.custom_id:
                raise ConfigError(f"{path}, line {number}: custom_id is empty")
            yield entry


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _lines(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{path}, line {number} is longer than {MAX_LINE_BYTES} bytes")
        yield number, line


class Answers:
    """The output: what it already holds, and a place to append to. One process has it at a time.

    Attributes:
        identities: of the requests that it answers.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Open or make it. An unfinished last line, which a process that was killed has left, is dropped.

        Raises ConfigError if it cannot be written, is in use, or holds something else.
        """
        self.path = path
        self.identities: set[bytes] = set()
        self._synced = True
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{path} is being written by another process; wait for its end") from None
            if overwrite:
                os.ftruncate(self._fd, 0)
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)

    def append(self, line: bytes) -> None:
        """Write a line, without its end. It outlives this process at once, and the machine after ``sync``."""
        self._synced = False
        left = memoryview(line + b"\n")
        while left:
            left = left[os.write(self._fd, left) :]

    def sync(self) -> None:
        if not self._synced:
            os.fsync(self._fd)
            self._synced = True

    def custom_id_of(self, identities: set[bytes]) -> str:
        """The ``custom_id`` of the first answer among these."""
        return next(answer.custom_id for answer in self._answers() if _identity(answer) in identities)

    def _read(self) -> None:
        for answer in self._answers(repair=True):
            identity = _identity(answer)
            if identity is None:
                raise ConfigError(
                    f"{self.path} has an answer to {answer.custom_id!r} with the id {answer.id!r}, which is not from "
                    "lightvllm run-batch; name another file for the output"
                )
            if identity in self.identities:
                raise ConfigError(f"{self.path} has two answers to {answer.custom_id!r}; begin anew with --overwrite")
            self.identities.add(identity)

    def _answers(self, repair: bool = False) -> Iterator[_Answer]:
        end = 0
        with self.path.open("rb") as file:
            for number, line in _lines(file, self.path):
                if not line.endswith(b"\n"):
                    break
                try:
                    answer = _answer.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise ConfigError(
                        f"{self.path}, line {number} is no answer of a batch: {error}; name another file for the output"
                    ) from None
                yield answer
                end += len(line)
        if repair:
            os.ftruncate(self._fd, end)


def _identity(answer: _Answer) -> bytes | None:
    found = _ID.fullmatch(answer.id)
    return bytes.fromhex(found[1]) if found else None

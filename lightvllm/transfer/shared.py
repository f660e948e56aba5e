"""``pp_transport="shared"``: batches as files in a directory that both workers see.

The directory is a tmpfs for workers on one host, or a volume that all hosts mount (a ReadWriteMany claim). The
receiver makes a folder of its own in it, mode 0700, and removes it when it closes. A batch is written under another
name and then renamed, so that it is there as a whole or not at all; the receiver maps it and removes the file at once
(the memory lives as long as the tensor). At most ``capacity`` files are there: the sender waits until an older one has
gone.

Nobody is told when a file appears: the receiver looks, ever less often, but only while a step waits. An idle worker
costs nothing.

Each end holds a lock (flock) on a file in the folder. The kernel drops it when the process ends, however it ends. So on
one host a dead peer is noticed while waiting, and what a dead group has left behind is removed at the next start.
Where the lock's file names another boot of the system than this one, nothing is concluded from it: locks are not sure
to be seen across hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.transfer import tensors
from lightvllm.transfer.stage import Batch, Header

if TYPE_CHECKING:
    import torch

PREFIX = "lightvllm-stage-"
_DATA_OFFSET = 512  # a batch's header ends and its tensor begins here
_MAGIC = b"LVST\x00\x01"
_PREAMBLE = struct.Struct("<6sH")  # magic, bytes of the header
_RECEIVER, _SENDER = "receiver", "sender"  # the lock files
_LOOK_SECONDS = (50e-6, 2e-3)  # between two looks: at first, and at most
_PEER_SECONDS = 0.5  # between two looks at the peer's lock
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)


def default_directory() -> Path:
    """Memory, where there is a tmpfs to write to; for workers on one host."""
    memory = Path("/dev/shm")  # noqa: S108  folders in it are private and have names that cannot be guessed
    return memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _boot() -> bytes:
    """Names this run of this host's kernel; another host or another boot has another name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b""


class _Folder:
    """An open folder; files in it are named relative to it, so that nobody can put another in its place."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if it is missing or no folder, ConfigError if others may enter it."""
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            self.close()
            raise ConfigError(
                f"{path} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}; expected this "
                f"process's user {os.geteuid()} and 0700: run all workers as one user"
            )

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)

    def exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def hold(self, name: str) -> int:
        """A file of this name, locked by this process for as long as the descriptor is open.

        It gets its name when it is locked: a lock file that can be taken is a dead process's.
        """
        temporary = f".{name}.{secrets.token_hex(4)}"
        fd = self.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.write(fd, _boot())
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def take_over(self, name: str) -> int | None:
        """The lock of a process that is certainly dead, or None."""
        try:
            fd = self.open(name, os.O_RDWR)
        except OSError:
            return None
        boot = _boot()
        if boot and os.read(fd, 4096) == boot:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
        os.close(fd)
        return None

    def remove(self) -> None:
        """With all that is in it; the receiver's lock goes last, for as long as it is there the folder has an owner."""
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self.fd), key=lambda name: name == _RECEIVER):
                self.unlink(name)
            self.path.rmdir()


def _is_dead(folder: _Folder, name: str) -> bool:
    lock = folder.take_over(name)
    if lock is not None:
        os.close(lock)
    return lock is not None


def remove_stale(directory: Path) -> list[Path]:
    """Remove the folders in ``directory`` whose owner ran on this host, as this user, and is dead; returns them."""
    removed = []
    for path in sorted(directory.glob(PREFIX + "*")):
        try:
            folder = _Folder(path)
        except (OSError, ConfigError):  # somebody else's, or gone meanwhile
            continue
        lock = folder.take_over(_RECEIVER)
        if lock is not None:
            folder.remove()
            removed.append(path)
            os.close(lock)
        folder.close()
    return removed


def _file(sequence: int) -> str:
    return f"{sequence:016x}"


def _look(condition: Callable[[], bool], deadline: float, peer_gone: Callable[[], bool], gone: str) -> bool:
    """Wait until ``condition`` holds; False at ``deadline``. LightvllmError(``gone``) when the peer has gone before."""
    pause, most = _LOOK_SECONDS
    next_peer = time.monotonic() + _PEER_SECONDS
    while not condition():
        now = time.monotonic()
        if now >= deadline:
            return False
        if now >= next_peer:
            if peer_gone() and not condition():
                raise LightvllmError(gone)
            next_peer = now + _PEER_SECONDS
        time.sleep(min(pause, deadline - now))
        pause = min(most, pause * 1.25)
    return True


class SharedInlet:
    """The receiving end. Makes its folder in ``directory``, after removing what dead processes have left there.

    Args:
        directory: where both workers can read and write.
        group, rank: name the folder.
        limit: bytes of the largest tensor.

    Attributes:
        address: the folder's path.

    Raises ConfigError if the folder cannot be made.
    """

    def __init__(self, directory: Path, group: str, rank: int, limit: int) -> None:
        self._limit = limit
        self._next = 1
        self._using = threading.Lock()
        self._closing = False
        path = directory / f"{PREFIX}{group}-{rank}"
        try:
            remove_stale(directory)
            path.mkdir(mode=0o700)
            self._folder = _Folder(path)
            self._lock = self._folder.hold(_RECEIVER)
        except OSError as error:
            raise ConfigError(
                f"cannot make a folder for hidden states in {directory}: {error.strerror}; "
                "give --pp-shared-dir a directory that the workers can write to"
            ) from None
        self.address = str(path)

    def take(self, deadline: float) -> Batch | None:
        name = _file(self._next)
        with self._using:
            found = _look(
                lambda: self._closing or self._folder.exists(name),
                deadline,
                lambda: _is_dead(self._folder, _SENDER),
                "its process has ended",
            )
            if self._closing:
                raise LightvllmError("this worker has closed its stage transport")
            if not found:
                return None
            try:
                batch = self._read(name)
                self._folder.unlink(name)
            except OSError as error:
                raise LightvllmError(f"cannot read {self.address}/{name}: {error.strerror}") from None
            self._next += 1
            return batch

    def _read(self, name: str) -> Batch:
        fd = self._folder.open(name, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            if not _DATA_OFFSET <= size <= _DATA_OFFSET + self._limit:
                raise LightvllmError(
                    f"{self.address}/{name} has {size} bytes; expected {_DATA_OFFSET} to {_DATA_OFFSET + self._limit}"
                )
            # Private: a page that the model writes to becomes its own.
            mapped = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)
        magic, length = _PREAMBLE.unpack_from(mapped)
        if magic != _MAGIC or length > _DATA_OFFSET - _PREAMBLE.size:
            raise LightvllmError(f"{self.address}/{name} is no batch; do all workers run the same lightvllm?")
        try:
            header = _decoder.decode(mapped[_PREAMBLE.size : _PREAMBLE.size + length])
        except msgspec.MsgspecError as error:
            raise LightvllmError(f"{self.address}/{name} has a malformed header: {error}") from None
        if not header.dtype:
            return Batch(header, None)
        return Batch(header, tensors.from_buffer(mapped, header.shape, header.dtype, _DATA_OFFSET))  # type: ignore[arg-type]

    def close(self) -> None:
        """Removes the folder."""
        self._closing = True  # whoever waits in ``take`` sees it at the next look
        with self._using:
            if self._folder.fd >= 0:
                self._folder.remove()
                self._folder.close()
                os.close(self._lock)


class SharedOutlet:
    """The sending end, in the folder that the peer's ``SharedInlet`` has made.

    Raises ConfigError if the folder is not there.
    """

    def __init__(self, address: str, capacity: int) -> None:
        self._capacity = capacity
        self._using = threading.Lock()
        self._closing = False
        try:
            self._folder = _Folder(Path(address))
            self._lock = self._folder.hold(_SENDER)
        except OSError as error:
            raise ConfigError(
                f"{address}, where the next stage looks for hidden states, cannot be used here: {error.strerror}; give "
                "--pp-shared-dir a directory that all workers share under one path"
            ) from None

    def put(self, header: Header, x: torch.Tensor | None, deadline: float) -> bool:
        host = None if x is None else tensors.to_host(x)
        oldest = _file(header.sequence - self._capacity)
        with self._using:
            free = _look(
                lambda: self._closing or header.sequence <= self._capacity or not self._folder.exists(oldest),
                deadline,
                lambda: _is_dead(self._folder, _RECEIVER),
                "its process has ended",
            )
            if self._closing:
                raise LightvllmError("this worker has closed its stage transport")
            if not free:
                return False
            if not self._folder.exists(_RECEIVER):
                raise LightvllmError("it has closed its stage transport")
            try:
                self._write(header, host)
            except OSError as error:
                raise LightvllmError(
                    f"cannot write {0 if host is None else host.nbytes} bytes to {self._folder.path}: {error.strerror}"
                ) from None
            return True

    def _write(self, header: Header, x: torch.Tensor | None) -> None:
        encoded = _encoder.encode(header)
        head = (_PREAMBLE.pack(_MAGIC, len(encoded)) + encoded).ljust(_DATA_OFFSET, b"\0")
        name = _file(header.sequence)
        temporary = f".{name}"
        fd = self._folder.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            parts = [memoryview(head), tensors.buffer_of(x) if x is not None else memoryview(b"")]
            while parts:
                written = os.writev(fd, parts)
                while parts and written >= len(parts[0]):
                    written -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][written:]
        except BaseException:
            os.close(fd)
            self._folder.unlink(temporary)
            raise
        os.close(fd)
        os.rename(temporary, name, src_dir_fd=self._folder.fd, dst_dir_fd=self._folder.fd)

    def close(self) -> None:
        """Also removes the folder if its owner has died."""
        self._closing = True
        with self._using:
            if self._folder.fd < 0:
                return
            orphan = self._folder.take_over(_RECEIVER)
            if orphan is not None:
                self._folder.remove()
                os.close(orphan)
            self._folder.close()
            os.close(self._lock)

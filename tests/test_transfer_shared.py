"""Files of hidden states: whose they are, and when they go."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import no_more_files_than, open_files

from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.transfer import shared
from lightvllm.transfer.shared import SharedInlet, SharedOutlet, default_directory, remove_stale
from lightvllm.transfer.stage import Header

GROUP = "00112233445566778899aabbccddeeff"
LIMIT = 1 << 20


def soon() -> float:
    return time.monotonic() + 10


def header(sequence: int = 1, *shape: int) -> Header:
    return Header(0, sequence, sequence, "float32", shape)


def owner(directory: Path, what: str = "SharedInlet") -> subprocess.Popen[str]:
    """Another process that has opened an end, and waits."""
    script = f"""
import sys
from pathlib import Path
from lightvllm.transfer.shared import SharedInlet, SharedOutlet
end = {what}
print(getattr(end, "address", "open"), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_folder_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    inlet = SharedInlet(tmp_path, GROUP, 1, LIMIT)
    folder = Path(inlet.address)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    outlet = SharedOutlet(inlet.address, 2)
    outlet.put(header(1, 2), torch.ones(2), soon())
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    inlet.close()
    assert list(tmp_path.iterdir()) == []
    outlet.close()
    inlet.close()


def test_a_file_goes_when_it_is_taken(tmp_path: Path) -> None:
    inlet = SharedInlet(tmp_path, GROUP, 1, LIMIT)
    outlet = SharedOutlet(inlet.address, 2)
    for sequence in (1, 2):
        outlet.put(header(sequence, 100, 100), torch.full((100, 100), float(sequence)), soon())
    assert not outlet.put(header(3, 1), torch.ones(1), time.monotonic() + 0.1)
    batch = inlet.take(soon())
    assert batch is not None
    assert outlet.put(header(3, 1), torch.ones(1), soon())
    assert sorted(path.name[-1] for path in Path(inlet.address).glob("0*")) == ["2", "3"]
    assert float(batch.tensor[5, 5]) == 1.0  # type: ignore[index]
    inlet.close()
    assert float(batch.tensor[99, 99]) == 1.0  # type: ignore[index]
    outlet.close()


def test_what_dead_processes_have_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    arguments = 'SharedInlet(Path("."), "{}", 1, 1000)'
    dead, alive = (owner(tmp_path, arguments.format(name)) for name in ("dead", "alive"))
    try:
        end(dead)
        elsewhere = tmp_path / f"{shared.PREFIX}elsewhere-1"
        elsewhere.mkdir(mode=0o700)
        (elsewhere / "receiver").write_bytes(b"another boot of another host")
        unfinished = tmp_path / f"{shared.PREFIX}unfinished-1"  # its owner has not locked it yet
        unfinished.mkdir(mode=0o700)
        others = tmp_path / f"{shared.PREFIX}others-1"
        others.mkdir()
        others.chmod(0o755)
        (tmp_path / "unrelated").mkdir()
        assert [path.name for path in remove_stale(tmp_path)] == [f"{shared.PREFIX}dead-1"]
        left = {"alive-1", "elsewhere-1", "unfinished-1", "others-1"}
        assert {path.name for path in tmp_path.iterdir()} == {"unrelated", *(shared.PREFIX + name for name in left)}
    finally:
        end(dead)
        end(alive)
    inlet = SharedInlet(tmp_path, GROUP, 1, LIMIT)  # the next start
    assert not (tmp_path / f"{shared.PREFIX}alive-1").exists()
    inlet.close()


def test_a_dead_sender_is_noticed_while_waiting(tmp_path: Path) -> None:
    inlet = SharedInlet(tmp_path, GROUP, 1, LIMIT)
    sender = owner(tmp_path, f'SharedOutlet("{inlet.address}", 2)')
    try:
        assert inlet.take(time.monotonic() + 0.1) is None
        end(sender)
        began = time.monotonic()
        with pytest.raises(LightvllmError, match="its process has ended"):
            inlet.take(time.monotonic() + 60)
        assert time.monotonic() - began < 20
    finally:
        end(sender)
        inlet.close()


def test_a_dead_receiver_is_noticed_by_a_sender_that_waits_and_its_folder_is_removed(tmp_path: Path) -> None:
    receiver = owner(tmp_path, f'SharedInlet(Path("{tmp_path}"), "{GROUP}", 1, 1000)')
    outlet = SharedOutlet(str(tmp_path / f"{shared.PREFIX}{GROUP}-1"), 1)
    try:
        assert outlet.put(header(1, 1), torch.ones(1), soon())
        end(receiver)
        with pytest.raises(LightvllmError, match="its process has ended"):
            outlet.put(header(2, 1), torch.ones(1), time.monotonic() + 60)
    finally:
        end(receiver)
        outlet.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_batch_is_refused(tmp_path: Path) -> None:
    inlet = SharedInlet(tmp_path, GROUP, 1, 1000)
    first = Path(inlet.address, f"{1:016x}")
    good = bytearray(512 + 8)
    encoded = shared._encoder.encode(header(1, 2))
    good[: 8 + len(encoded)] = shared._PREAMBLE.pack(shared._MAGIC, len(encoded)) + encoded
    longer = bytearray(good)
    longer[6:8] = (60_000).to_bytes(2, "little")
    malformed = bytearray(good)
    malformed[8:12] = b"\xc1\xc1\xc1\xc1"
    cases: list[tuple[bytes, str]] = [
        (b"", "has 0 bytes; expected 512 to 1512"),
        (bytes(100), "has 100 bytes"),
        (bytes(2000), "has 2000 bytes"),
        (bytes(600), "is no batch"),
        (bytes(longer), "is no batch"),
        (bytes(malformed), "malformed header"),
        (bytes(good[:-1]), "7 bytes came for a tensor of float32 .2.; expected 8"),
    ]
    for content, message in cases:
        first.write_bytes(content)
        with pytest.raises(LightvllmError, match=message):
            inlet.take(soon())
    first.unlink()
    first.symlink_to("/etc/passwd")
    with pytest.raises(LightvllmError, match="cannot read"):
        inlet.take(soon())
    first.unlink()
    first.write_bytes(good)
    batch = inlet.take(soon())
    assert batch is not None
    assert batch.tensor is not None
    assert batch.tensor.tolist() == [0, 0]
    inlet.close()


def test_a_directory_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory; give --pp-shared-dir"):
        SharedInlet(tmp_path / "missing", GROUP, 1, LIMIT)
    with pytest.raises(ConfigError, match="that all workers share under one path"):
        SharedOutlet(str(tmp_path / "missing"), 2)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ConfigError, match=r"mode 0755; expected this process's user .* and 0700"):
        SharedOutlet(str(tmp_path / "open"), 2)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(ConfigError, match="cannot be used here"):
        SharedOutlet(str(tmp_path / "link"), 2)


def test_a_full_volume_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inlet = SharedInlet(tmp_path, GROUP, 1, LIMIT)
    outlet = SharedOutlet(inlet.address, 2)

    def full(*_: Any) -> int:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(LightvllmError, match=r"cannot write 4 bytes to .*: No space left on device"):
            outlet.put(header(1, 1), torch.ones(1), soon())
    assert not [path for path in Path(inlet.address).iterdir() if path.name.startswith(".0")]
    assert outlet.put(header(1, 1), torch.ones(1), soon())  # nothing of the failed one is left
    assert inlet.take(soon()) is not None
    inlet.close()
    outlet.close()


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    before = open_files()
    for _ in range(3):
        inlet = SharedInlet(tmp_path, GROUP, 1, LIMIT)
        outlet = SharedOutlet(inlet.address, 2)
        outlet.put(header(1, 4), torch.ones(4), soon())
        assert inlet.take(soon()) is not None
        outlet.close()
        inlet.close()
    no_more_files_than(before)


def test_the_default_directory_can_be_written_to() -> None:
    assert os.access(default_directory(), os.W_OK)

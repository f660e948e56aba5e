"""A worker server as a child process: how it is started, watched and ended."""

from __future__ import annotations

import io
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

from k8s_servers import TESTS, script
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.security import Token
from lightvllm.errors import ConfigError, PlacementError

TOKEN = Token.new()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket's path, which pytest's own may not be."""
    with tempfile.TemporaryDirectory(prefix="lightvllm-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def start(listen: str, **options: Any) -> WorkerProcess:
    env = {**os.environ, "PYTHONPATH": TESTS, **options.pop("env", {})}
    return WorkerProcess(listen, TOKEN, max_message_bytes=1 << 20, env=env, **options)


def test_it_listens_and_exits_when_its_stdin_ends(folder: Path) -> None:
    exits: queue.SimpleQueue[str] = queue.SimpleQueue()
    process = start(f"unix:{folder}/w.sock", on_exit=lambda: exits.put("exited"))
    assert process.wait_listening(LIMIT) == f"unix:{folder}/w.sock"
    assert process.reason() == "is running"
    process.hang_up()
    process.hang_up()
    assert exits.get(timeout=LIMIT) == "exited"
    assert process.reason() == "exited with code 0"
    assert not folder.exists()  # it has taken its socket with it


def test_the_token_is_in_neither_its_arguments_nor_its_environment(folder: Path) -> None:
    process = start(f"unix:{folder}/w.sock")
    process.wait_listening(LIMIT)
    for name in ("cmdline", "environ"):
        content = Path(f"/proc/{process.pid}/{name}").read_bytes()
        assert content
        assert TOKEN.reveal().encode() not in content
    process.end(time.monotonic() + LIMIT)


def test_a_signal_is_named(folder: Path) -> None:
    process = start(f"unix:{folder}/w.sock")
    process.wait_listening(LIMIT)
    os.kill(process.pid, signal.SIGKILL)
    assert process.exited.wait(LIMIT)
    assert process.reason("during load_model") == "killed by SIGKILL during load_model"
    process.kill()
    process.end(time.monotonic())


def test_ctrl_c_of_the_terminal_is_not_for_it(folder: Path) -> None:
    process = start(f"unix:{folder}/w.sock")
    process.wait_listening(LIMIT)
    assert os.getpgid(process.pid) != os.getpgid(0)
    os.kill(process.pid, signal.SIGINT)
    assert not process.exited.wait(0.2)
    process.end(time.monotonic() + LIMIT)
    assert process.reason() == "exited with code 0"


def test_one_that_does_not_listen_says_why(folder: Path) -> None:
    process = start(f"unix:{folder}/no/such/folder/w.sock")
    with pytest.raises(ConfigError, match=r"^cannot listen on unix:\S*: is the address in use\?$"):
        process.wait_listening(LIMIT)
    assert process.exited.wait(LIMIT)


def test_one_that_dies_before_it_listens_gives_its_last_words(folder: Path) -> None:
    (folder / "grpc.py").write_text("raise SystemExit('this grpc is broken')")
    process = start(f"unix:{folder}/w.sock", env={"PYTHONPATH": str(folder)})
    with pytest.raises(PlacementError, match="exited with code 1 before it listened: this grpc is broken"):
        process.wait_listening(LIMIT)


def test_one_that_dies_before_it_is_told_anything_is_a_placement_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = msgspec.json.encode

    def encode_later(bootstrap: object) -> bytes:
        (child,) = {child.pid for child in psutil.Process().children()} - before
        wait_until(lambda: gone(child), "the process to end")
        return encode(bootstrap)

    before = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr(msgspec.json, "encode", encode_later)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    process = start(f"unix:{folder}/w.sock")
    with pytest.raises(PlacementError, match="exited with code 1 before it listened"):
        process.wait_listening(LIMIT)


def test_one_that_takes_too_long_is_a_placement_error(folder: Path) -> None:
    process = start(f"unix:{folder}/w.sock")
    with pytest.raises(PlacementError, match="did not listen within 0 s"):
        process.wait_listening(0.0)
    process.end(time.monotonic())
    assert process.exited.is_set()


def test_one_that_is_stuck_is_killed(folder: Path) -> None:
    process = start(f"unix:{folder}/w.sock")
    process.wait_listening(LIMIT)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "the process to stop")
    process.end(time.monotonic() + 0.1)
    assert process.reason() == "killed by SIGKILL"


def test_what_it_started_itself_ends_with_it(folder: Path) -> None:
    """The server module is replaced by a program that leaves a child of its own behind."""
    (folder / "grpc.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "sys.exit(f'child {child.pid}')\n"
    )
    process = start(f"unix:{folder}/w.sock", env={"PYTHONPATH": str(folder)})
    assert process.exited.wait(LIMIT)
    child = wait_until(lambda: process.reason().partition("child ")[2], "its last words")
    wait_until(lambda: gone(int(child)), "the child to be gone")


def test_what_it_says_is_shown_only_on_demand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "grpc.py").write_text("raise SystemExit('some words')")
    for debug, shown in (("", False), ("1", True)):
        monkeypatch.setenv("LIGHTVLLM_DEBUG", debug)
        exited = threading.Event()
        process = start(f"unix:{folder}/w.sock", env={"PYTHONPATH": str(folder)}, on_exit=exited.set)
        assert exited.wait(LIMIT)
        assert (f"[worker {process.pid}] some words" in capsys.readouterr().err) == shown


def test_its_log_is_shown_as_it_is_where_it_is_for_machines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = '{"time": "2026-11-21T15:05:02.396Z", "message": "words"}'
    (folder / "grpc.py").write_text(f"import sys\nsys.stderr.write({record!r} + chr(10))\nraise SystemExit('others')")
    exited = threading.Event()
    start(f"unix:{folder}/w.sock", env={"PYTHONPATH": str(folder)}, on_exit=exited.set)
    assert exited.wait(LIMIT)
    assert capsys.readouterr().err == f"{record}\n"


def say(folder: Path, code: str) -> WorkerProcess:
    """The server module is replaced by ``code``, which writes to ``err``, a binary stderr; its output is shown."""
    (folder / "grpc.py").write_text(f"import sys\nerr = sys.stderr.buffer\n{code}\nerr.flush()\nsys.exit(3)\n")
    process = start(f"unix:{folder}/w.sock", env={"PYTHONPATH": str(folder)}, show_output=True)
    assert process.exited.wait(LIMIT)
    process.end(time.monotonic())
    return process


def test_what_it_says_is_shown_as_it_is(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    words = b" some words \n\n\x1b[32mgreen\t\xe2\x82\xac\n\xff\x00\n" + b"x" * 20_000 + b"\nno end"
    process = say(folder, f"err.write({words!r})")
    assert capfdbinary.readouterr().err == words + b"\n"
    assert process.reason() == "exited with code 3: no end"


def test_where_stderr_has_no_bytes_junk_is_escaped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    say(folder, "err.write(b'\\xff\\x00\\n')")
    assert shown.getvalue() == "\\xff\x00\n"


def test_of_a_line_without_end_nothing_is_lost(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    size = 5 * 2**19
    process = say(folder, f"err.write(b'y' * {size})")
    pieces = capfdbinary.readouterr().err.split(b"\n")
    assert [len(piece) for piece in pieces] == [2**20, 2**20, 2**19, 0]
    assert b"".join(pieces) == b"y" * size
    assert process.reason() == f"exited with code 3: {'y' * 4096}"  # which fits in a message


@pytest.mark.parametrize("stderr", ["broken", "none"])
def test_one_whose_words_nobody_takes_is_not_held_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stderr: str
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken() if stderr == "broken" else None)
    assert say(folder, "err.write(b'z\\n' * 2**20 + b'the end')").reason() == "exited with code 3: the end"


def test_a_grandchild_that_keeps_the_pipe_does_not_hide_the_end(folder: Path) -> None:
    """It has a session of its own, so that it is not killed with its parent."""
    (folder / "grpc.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "sys.exit(f'child {child.pid}')\n"
    )
    process = start(f"unix:{folder}/w.sock", env={"PYTHONPATH": str(folder)})
    assert process.exited.wait(LIMIT)
    child = psutil.Process(int(wait_until(lambda: process.reason().partition("child ")[2], "its last words")))
    started = time.monotonic()
    process.end(started)
    assert time.monotonic() - started < 0.9  # far below the 60 s of the grandchild
    child.kill()


PARENT = """
import os, sys, time
from lightvllm.backends.k8s.process import WorkerProcess
from lightvllm.backends.k8s.security import Token
process = WorkerProcess(sys.argv[1], Token.new(), max_message_bytes=1 << 20, env=os.environ)
if sys.argv[2] == "listening":
    process.wait_listening(60)
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["starting", "listening"])
def test_it_does_not_outlive_its_parent(folder: Path, when: str) -> None:
    with script(PARENT, f"unix:{folder}/w.sock", when) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        wait_until(lambda: gone(pid), "the worker to be gone")
        assert not folder.exists()

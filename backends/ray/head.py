"""The process that holds a local Ray cluster and never outlives the driver that started it.

Run as a script, with a session of its own: ``head.py hold TEMP_DIR ARG...`` starts ``ray start --head ARG...``, writes
``ready`` (or what went wrong) to its standard output, and then waits until its standard input is closed or its parent
is gone, however that ended. Everything that Ray has started by then is in the same session: it is killed, and
TEMP_DIR is removed. So neither Ctrl-C nor SIGKILL of the driver leaves anything behind, and none of Ray's processes
depends on which thread of the driver started it (Ray's own tie to its parent ends with the *thread*).

``end_session`` is the driver's too, for the case that this process itself has been killed. Only its two roles below
import ray, and only ``start`` does so.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil

READY = "ready"
LOG = "start.log"  # in TEMP_DIR: what `ray start` said
_CHECK_SECONDS = 1.0  # how often to reap, and to look for a parent that is gone while a fork of it keeps the pipe open
_PR_SET_CHILD_SUBREAPER = 36


def session_members(session: int) -> list[int]:
    """The living processes of a session, without its leader."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if pid != session and os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                members.append(pid)
    return members


def end_session(session: int, limit: float = 5.0) -> bool:
    """SIGKILL the members of a session until none is left; False if some are after ``limit`` seconds.

    Removes the semaphores of their compiled graphs, too: Ray's processes do that only where they end by themselves.
    """
    deadline = time.monotonic() + limit
    killed: set[int] = set()
    while members := session_members(session):
        killed.update(members)
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    _remove_semaphores(killed)
    return True


def _remove_semaphores(pids: set[int]) -> None:
    """Ray names them after the process that made the object: ``sem.hdrPID-TIME`` and ``sem.objPID-TIME``."""
    for path in Path("/dev/shm").glob("sem.*"):  # noqa: S108  where Linux keeps named semaphores
        maker = re.fullmatch(r"sem\.(?:hdr|obj)(\d+)-\d+", path.name)
        if maker and int(maker[1]) in pids:
            path.unlink(missing_ok=True)


def hold(temp_dir: str, arguments: list[str]) -> None:
    """Start the cluster, say so, and end it with the driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit)
    parent = os.getppid()
    threading.Thread(target=_watch_driver, args=(parent,), daemon=True).start()
    try:
        _adopt_orphans()
        log = Path(temp_dir, LOG)
        with log.open("wb") as output:
            started = subprocess.run(
                [sys.executable, "-P", __file__, "start", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if started.returncode == 0:
            print(READY, flush=True)  # noqa: T201  the driver reads it
            while True:
                time.sleep(_CHECK_SECONDS)
                _reap()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here it ends by itself
        lines = log.read_text(errors="replace").split("\n")
        print(next((line for line in reversed(lines) if line.strip()), "no output"), flush=True)  # noqa: T201
    finally:
        end_session(os.getpid())
        _reap(1.0)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _exit(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break off the cleaning up
    raise SystemExit


def _watch_driver(parent: int) -> None:
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin.buffer], [], [], _CHECK_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    os.kill(os.getpid(), signal.SIGTERM)


def _adopt_orphans() -> None:
    """Become the parent of what `ray start` leaves running: PID 1 of a container may not reap it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap(limit: float = 0.0) -> None:
    """Collect dead children; with a limit, wait for the last of them, seconds."""
    deadline = time.monotonic() + limit
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] or time.monotonic() < deadline:
            time.sleep(0.001)


def start(arguments: list[str]) -> None:
    """``ray start``, after seeing to it that there is the token with which Ray authenticates every connection."""
    from ray.scripts import scripts

    cli = scripts.cli
    # No option turns Ray Client's server off; it would want port 10001, which two clusters would fight for.
    scripts.get_ray_client_dependency_error = lambda: "not wanted here"
    if os.environ.get("RAY_AUTH_MODE") == "token" and "get-auth-token" in cli.commands:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the token
            cli(["get-auth-token", "--generate"], standalone_mode=False)
    cli(["start", "--head", *arguments], standalone_mode=False)


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "hold":
        hold(rest[0], rest[1:])
    else:
        start(rest)

"""The scripts of a pod, run by bash and Python, with commands that only say that they have begun and ended."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_objects import Objects, inference
from waiting import LIMIT, wait_until

from lightvllm.operator.planner import scripts

# Writes what it does to $LOG; ends at SIGTERM, or when its fifo is written to, with that status.
STUB = """\
#!/bin/bash
name=$(basename "$0")
mkfifo "$LOG.$name" 2>/dev/null
trap 'echo "$name ended" >> "$LOG"; exit 0' TERM
echo "$name began $*" >> "$LOG"
exec 3<>"$LOG.$name"
until read -r -t 60 status <&3; do :; done
echo "$name failed" >> "$LOG"
exit "$status"
"""


class Pod:
    """``scripts.run`` as it runs in a pod."""

    def __init__(self, folder: Path, index: int) -> None:
        self.log = folder / "log"
        self.log.touch()
        for name in ("lightvllm", "server"):
            stub = folder / name
            stub.write_text(STUB)
            stub.chmod(0o755)
        self.process = subprocess.Popen(
            ["bash", "-c", scripts.run(2, "::"), "run", "server", "a b", "--c=d"],
            env={
                **os.environ,
                "PATH": f"{folder}:{os.environ['PATH']}",
                "LOG": str(self.log),
                "LWS_WORKER_INDEX": str(index),
            },
            start_new_session=True,
        )

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, *lines: str) -> None:
        wait_until(lambda: all(any(line in each for each in self.lines()) for line in lines), f"{lines} in the log")

    def fail(self, name: str, status: int) -> None:
        with open(f"{self.log}.{name}", "w") as fifo:
            fifo.write(f"{status}\n")

    def status(self) -> int:
        return self.process.wait(LIMIT)


@contextlib.contextmanager
def pod(folder: Path, index: int) -> Iterator[Pod]:
    started = Pod(folder, index)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process.pid, signal.SIGKILL)
        started.process.wait(LIMIT)


def test_the_leader_runs_workers_and_server_and_ends_the_server_first(tmp_path: Path) -> None:
    with pod(tmp_path, 0) as leader:
        leader.wait_for("lightvllm began worker --listen [::]:50051 --workers 2", "server began a b --c=d")
        leader.process.send_signal(signal.SIGTERM)
        assert leader.status() == 143
        assert leader.lines()[-2:] == ["server ended", "lightvllm ended"]


def test_another_pod_runs_workers_alone(tmp_path: Path) -> None:
    with pod(tmp_path, 1) as worker:
        worker.wait_for("lightvllm began")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.status() == 143
        assert worker.lines()[1:] == ["lightvllm ended"]


@pytest.mark.parametrize(("fails", "other"), [("server", "lightvllm"), ("lightvllm", "server")])
def test_when_one_of_the_two_ends_so_does_the_other_and_its_status_is_the_pods(
    tmp_path: Path, fails: str, other: str
) -> None:
    with pod(tmp_path, 0) as leader:
        leader.wait_for("lightvllm began", "server began")
        leader.fail(fails, 3)
        assert leader.status() == 3
        assert leader.lines()[-2:] == [f"{fails} failed", f"{other} ended"]


def test_what_waits_for_the_leader_ends_when_it_is_told_to(tmp_path: Path) -> None:
    """It says so by its status: nothing but a trap ends the first process of a container."""
    (waiting,) = Objects(inference(tensorParallelSize=2, gpusPerPod=1)).pod["initContainers"]
    getent = tmp_path / "getent"
    getent.write_text('#!/bin/sh\necho "$2" >> "$LOG"; exit 2\n')
    getent.chmod(0o755)
    log = tmp_path / "log"
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "LWS_LEADER_ADDRESS": "leader"}
    started = subprocess.Popen(waiting["command"], env=environ)
    try:
        wait_until(lambda: log.exists() and log.read_text().startswith("leader\n"), "a look-up of the leader's name")
        started.send_signal(signal.SIGTERM)
        assert started.wait(LIMIT) == 143
    finally:
        started.kill()
        started.wait()


def leave(index: int, port: int, pause: int = 0, most: int = 600) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "LWS_WORKER_INDEX": str(index), "LWS_LEADER_ADDRESS": "127.0.0.1"}
    return subprocess.Popen(["bash", "-c", scripts.leave(pause, most, port)], env=environ)


def test_a_worker_stays_until_the_leaders_worker_server_has_gone() -> None:
    leader = socket.create_server(("127.0.0.1", 0))
    leaving = leave(1, leader.getsockname()[1])
    try:
        leader.settimeout(LIMIT)
        leader.accept()[0].close()  # it has looked
        assert leaving.poll() is None
        leader.close()
        assert leaving.wait(LIMIT) == 0
    finally:
        leaving.kill()
        leaving.wait()


def test_a_worker_does_not_stay_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as leader:
        assert leave(1, leader.getsockname()[1], most=0).wait(LIMIT) == 0


def test_the_leader_waits_for_services_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as leader:
        assert leave(0, leader.getsockname()[1]).wait(LIMIT) == 0


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def api() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    ("index", "path", "workers_listen", "well"),
    [
        (0, "/health", True, True),
        (0, "/other", True, False),
        (0, "/health", False, False),
        (1, "/other", True, True),
        (1, "/health", False, False),
    ],
)
def test_probe(api: int, index: int, path: str, workers_listen: bool, well: bool) -> None:
    worker = socket.create_server(("127.0.0.1", 0))
    port = worker.getsockname()[1]
    if not workers_listen:
        worker.close()
    with worker:
        command = scripts.ask(path, tls=False, workers=1, worker_port=port, http_port=api)
        environ = {**os.environ, "LWS_WORKER_INDEX": str(index), "http_proxy": "http://127.0.0.1:1"}
        ran = subprocess.run(command, env=environ, capture_output=True, timeout=LIMIT, check=False)
    assert (ran.returncode == 0) is well, ran.stderr


class Health6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


def test_probe_of_a_pod_that_has_ipv6_alone() -> None:
    try:
        server = Health6(("::1", 0), Health)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        command = scripts.ask("/health", tls=False, workers=1, worker_port=port, http_port=port, host="::1")
        environ = {**os.environ, "LWS_WORKER_INDEX": "0"}
        ran = subprocess.run(command, env=environ, capture_output=True, timeout=LIMIT, check=False)
        server.shutdown()
    assert ran.returncode == 0, ran.stderr


def test_the_leaders_probe_fails_where_nothing_is_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as worker, socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        closed.close()
        command = scripts.ask("/health", tls=False, workers=1, worker_port=worker.getsockname()[1], http_port=port)
        environ = {**os.environ, "LWS_WORKER_INDEX": "0"}
        ran = subprocess.run(command, env=environ, capture_output=True, timeout=LIMIT, check=False)
    assert ran.returncode != 0

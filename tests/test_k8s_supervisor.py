"""``lightvllm worker``: one address, a fresh process for each driver, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

from k8s_servers import WORKER, WorkerCommand, script, worker_command, write_token
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.base import Placement, WorkerRef
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.errors import PlacementError
from lightvllm.messages import decode_reply, encode_call


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    return write_token(tmp_path)


@pytest.fixture
def command(token_file: str) -> Iterator[WorkerCommand]:
    with worker_command("--listen", "127.0.0.1:0", "--token-file", token_file) as command:
        yield command


def use(command: WorkerCommand, token_file: str) -> int:
    """Be a driver for one call; the worker's process id."""
    backend = KubernetesBackend((command.address(),), token_file)
    try:
        (worker,) = backend.place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, LIMIT)
        assert decode_reply("echo", backend.call(worker, *encode_call("echo", (1,), None)).result(LIMIT)) == 1
        return worker.pid
    finally:
        backend.shutdown()


def test_each_driver_meets_a_fresh_process_at_the_same_address(command: WorkerCommand, token_file: str) -> None:
    pids = [use(command, token_file) for _ in range(3)]
    assert len(set(pids)) == 3
    assert pids == [command.server_pid(count) for count in (1, 2, 3)]


DRIVER = f"""
import sys
from lightvllm.backends.base import Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.errors import PlacementError
from lightvllm.messages import encode_call
address, token_file, flag = sys.argv[1:]
backend = KubernetesBackend((address,), token_file)
(worker,) = backend.place(Placement(world_size=1, worker_class={WORKER!r}), lambda *_: None, 60)
backend.call(worker, *encode_call("touch_and_hang", (flag,), None)).result(60)
"""


def test_a_driver_that_is_killed_frees_the_worker_though_it_is_stuck(
    command: WorkerCommand, token_file: str, tmp_path: Path
) -> None:
    with script(DRIVER, command.address(), token_file, str(tmp_path / "flag")) as driver:
        wait_until((tmp_path / "flag").exists, "the call to begin")
        first = command.server_pid()
        driver.kill()
        driver.wait(LIMIT)
        started = time.monotonic()
        assert use(command, token_file) == command.server_pid(2) != first
        assert time.monotonic() - started < 10  # the call would have taken 60 s
        assert gone(first)


def test_a_second_driver_is_told_that_the_worker_is_taken(
    command: WorkerCommand, token_file: str, tmp_path: Path
) -> None:
    with script(DRIVER, command.address(), token_file, str(tmp_path / "flag")):
        wait_until((tmp_path / "flag").exists, "the call to begin")
        with pytest.raises(PlacementError, match=r"0 of 1 workers: \S+: it is serving another driver; a worker serves"):
            use(command, token_file)


def test_a_server_process_that_is_killed_is_replaced(command: WorkerCommand, token_file: str) -> None:
    os.kill(command.server_pid(), signal.SIGKILL)
    command.find("killed by SIGKILL; starting a fresh one")
    assert use(command, token_file) == command.server_pid(2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_both_processes(
    command: WorkerCommand, token_file: str, tmp_path: Path, number: int, status: int
) -> None:
    """While a driver is connected and the worker is stuck."""
    with script(DRIVER, command.address(), token_file, str(tmp_path / "flag")):
        wait_until((tmp_path / "flag").exists, "the call to begin")
        started = time.monotonic()
        assert command.end(number) == status
        assert time.monotonic() - started < 2
        assert gone(command.server_pid())


def test_the_server_process_does_not_outlive_the_supervisor(command: WorkerCommand) -> None:
    pid = command.server_pid()
    command.end(signal.SIGKILL)
    wait_until(lambda: gone(pid), "the server process to be gone")


def test_the_supervisor_itself_imports_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, lightvllm.cli.main, lightvllm.backends.k8s.supervisor\n"
        "print({'torch', 'grpc', 'transformers', 'ray'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stdout == "set()\n"


def said(*options: str) -> list[str]:
    """What a ``lightvllm worker`` that cannot start prints."""
    with worker_command(*options) as command:
        assert command.wait() == 1
        return command.lines


def test_an_occupied_port_is_one_line(token_file: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        lines = said("--listen", address, "--token-file", token_file)
    assert lines == [f"error: cannot listen on {address}: is the address in use?"]


def test_a_port_occupied_by_another_worker_is_one_line(command: WorkerCommand, token_file: str) -> None:
    address = command.address()
    lines = said("--listen", address, "--token-file", token_file)
    assert lines == [f"error: cannot listen on {address}: is the address in use?"]


def test_a_token_file_open_to_others_is_one_line(token_file: str) -> None:
    os.chmod(token_file, 0o644)
    (line,) = said("--listen", "127.0.0.1:0", "--token-file", token_file)
    assert line == f"error: token file {token_file} is open to others (mode 0644); run: chmod 600 {token_file}"


def test_an_address_that_is_not_loopback_needs_tls(token_file: str) -> None:
    (line,) = said("--listen", "0.0.0.0:0", "--token-file", token_file)
    assert line.startswith("error: 0.0.0.0:0 is not a loopback address")


def test_a_worker_ref_of_a_static_address_names_it(command: WorkerCommand, token_file: str) -> None:
    backend = KubernetesBackend((command.address(),), token_file)
    try:
        refs = backend.place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, LIMIT)
        assert refs == [
            WorkerRef(
                id=command.address(),
                node=socket.gethostname(),
                address=command.address(),
                index=0,
                pid=command.server_pid(),
                device_ids=refs[0].device_ids,
            )
        ]
    finally:
        backend.shutdown()

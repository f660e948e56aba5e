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

from k8s_servers import WORKER, WorkerCommand, free_ports, script, worker_command, write_token
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.base import Placement, WorkerRef
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.errors import PlacementError
from lightvllm.executors.ranks import deal_ranks, device_indices, local_ranks
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


# ------------------------------------------------------------------------------------------- several at one command


@pytest.fixture
def pod(token_file: str) -> Iterator[WorkerCommand]:
    """Two servers."""
    address = f"127.0.0.1:{free_ports(2)}"
    with worker_command("--listen", address, "--workers", "2", "--token-file", token_file) as command:
        assert command.address() == address
        yield command


def test_a_pods_servers_listen_at_consecutive_ports_and_restart_apart(pod: WorkerCommand, token_file: str) -> None:
    first = int(pod.address().rpartition(":")[2])
    assert pod.address(2) == f"127.0.0.1:{first + 1}"
    pids = [pod.server_pid(count) for count in (1, 2)]
    stays = KubernetesBackend((pod.address(2),), token_file)
    try:
        (worker,) = stays.place(Placement(world_size=1, worker_class=WORKER), lambda *_: None, LIMIT)
        assert worker.pid == pids[1]
        assert [use(pod, token_file) for _ in range(2)] == [pids[0], pod.server_pid(3)]
        assert decode_reply("pid", stays.call(worker, *encode_call("pid", (), None)).result(LIMIT)) == pids[1]
    finally:
        stays.shutdown()
    restarted = pod.find(rf"^127\.0\.0\.1:{first + 1}: ready \(process (\d+)\)")
    assert int(restarted[1]) not in pids
    pod.find(rf"^127\.0\.0\.1:{first}: process {pids[0]} exited with code 0; starting a fresh one")


def test_one_driver_takes_a_whole_pod(pod: WorkerCommand, token_file: str) -> None:
    for _ in range(2):
        backend = KubernetesBackend((pod.address(),), token_file, gpus_per_pod=2)
        try:
            refs = backend.place(Placement(world_size=2, worker_class=WORKER), lambda *_: None, LIMIT)
            assert [(ref.id, ref.address) for ref in refs] == [(pod.address(n), pod.address(n)) for n in (1, 2)]
            assert {ref.node for ref in refs} == {socket.gethostname()}
        finally:
            backend.shutdown()


def test_ranks_go_pod_by_pod_and_workers_of_a_pod_share_its_gpus(
    pod: WorkerCommand, token_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pod says what it sees; both are of one node here, so that what they see is told apart by name."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    other = f"127.0.0.1:{free_ports(2)}"
    with worker_command("--listen", other, "--workers", "2", "--token-file", token_file) as command:
        addresses = [command.address(n) for n in (1, 2)] + [pod.address(n) for n in (1, 2)]
        backend = KubernetesBackend((other, pod.address()), token_file, gpus_per_pod=2)
        try:
            refs = backend.place(Placement(world_size=4, worker_class=WORKER), lambda *_: None, LIMIT)
        finally:
            backend.shutdown()
    ranked = deal_ranks(refs, 2, 2, backend.driver_node)
    assert [ref.address for ref in ranked] == addresses
    assert [ref.device_ids for ref in ranked[:2]] == [("4", "7")] * 2
    assert device_indices(ranked)[:2] == [0, 1]
    assert local_ranks(ranked) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_free_ports_are_all_printed(token_file: str) -> None:
    with worker_command("--listen", "127.0.0.1:0", "--workers", "3", "--token-file", token_file) as command:
        addresses = [command.address(count) for count in (1, 2, 3)]
    assert len(set(addresses)) == 3
    assert "127.0.0.1:0" not in addresses


def test_if_one_cannot_listen_all_end_and_its_port_is_named(token_file: str) -> None:
    first = free_ports(3)
    with socket.create_server(("127.0.0.1", first + 1)):
        *listening, error = said("--listen", f"127.0.0.1:{first}", "--workers", "3", "--token-file", token_file)
    assert error == f"error: cannot listen on 127.0.0.1:{first + 1}: is the address in use?"
    assert [line.partition(" (")[0] for line in listening] == [f"listening on 127.0.0.1:{first}"]
    for port in range(first, first + 3):
        socket.create_server(("127.0.0.1", port)).close()  # is free


def test_if_one_cannot_listen_again_all_end(pod: WorkerCommand, token_file: str) -> None:
    """Somebody else takes the port while a fresh process is being started."""
    pids = [pod.server_pid(count) for count in (1, 2)]
    host, port = pod.address(2).split(":")
    os.kill(pids[1], signal.SIGKILL)
    taken = wait_until(lambda: listener(host, int(port)), "the port to be free")
    with taken:
        assert pod.wait() == 1
    assert pod.lines[-1] == f"error: cannot listen on {pod.address(2)}: is the address in use?"
    assert gone(pids[0])


def listener(host: str, port: int) -> socket.socket | None:
    try:
        return socket.create_server((host, port))
    except OSError:
        return None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_server_outlives_the_supervisor(
    pod: WorkerCommand, token_file: str, tmp_path: Path, number: int, status: int
) -> None:
    pids = [pod.server_pid(count) for count in (1, 2)]
    with script(DRIVER, pod.address(2), token_file, str(tmp_path / "flag")):
        wait_until((tmp_path / "flag").exists, "the call to begin")
        assert pod.end(number) == status
        wait_until(lambda: all(map(gone, pids)), "the servers to be gone", 2.0)


def test_more_ports_than_there_are_is_one_line(token_file: str) -> None:
    (line,) = said("--listen", "127.0.0.1:65535", "--workers", "2", "--token-file", token_file)
    assert line == (
        "error: 2 workers from 127.0.0.1:65535 on need the ports 65535 to 65536; expected 65535 at most: use port "
        "65534 or a lower one"
    )


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

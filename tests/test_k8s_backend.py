"""KubernetesBackend: what is its own, beyond the contract that ``test_backend_contract.py`` holds every backend to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import psutil
from k8s_servers import TESTS, WORKER, WorkerCommand, script, worker_command, write_token
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.base import Placement, WorkerRef
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.errors import AuthError, ConfigError, PlacementError, Shutdown, WorkerDied
from lightvllm.messages import decode_reply, encode_call

TWO = Placement(world_size=2, worker_class=WORKER)
ONE = Placement(world_size=1, worker_class=WORKER)


def ask(backend: KubernetesBackend, worker: WorkerRef, method: str | Callable[..., Any], *args: Any) -> Any:
    name, payload = encode_call(method, args, None)
    return decode_reply(name, backend.call(worker, name, payload).result(LIMIT))


def ignore(worker: WorkerRef, died: WorkerDied) -> None:
    pass


def place(backend: KubernetesBackend, request: Placement = ONE, timeout: float = LIMIT) -> list[WorkerRef]:
    return list(backend.place(request, ignore, timeout))


@pytest.fixture
def started() -> Iterator[Callable[..., KubernetesBackend]]:
    """Makes backends that are shut down after the test."""
    with ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> KubernetesBackend:
            backend = KubernetesBackend(*args, **kwargs)
            stack.callback(backend.shutdown, 0.5)
            return backend

        yield start


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    return write_token(tmp_path)


@pytest.fixture
def commands(token_file: str) -> Iterator[list[WorkerCommand]]:
    """Two running ``lightvllm worker``."""
    with ExitStack() as stack:
        options = ("--listen", "127.0.0.1:0", "--token-file", token_file)
        yield [stack.enter_context(worker_command(*options)) for _ in range(2)]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary directory of this test's own, to see what is left in it."""
    with tempfile.TemporaryDirectory(prefix="lv-", dir="/tmp") as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(path)


# ------------------------------------------------------------------------------------------------- local workers


def test_local_workers_leave_no_socket_even_while_they_run(started: Any, temporary: Path) -> None:
    backend = started()
    refs = place(backend, TWO)
    assert list(temporary.iterdir()) == []
    assert [ask(backend, ref, "echo", 1) for ref in refs] == [1, 1]


def test_a_temporary_directory_with_a_long_path_is_no_obstacle(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    backend = started()
    assert ask(backend, place(backend)[0], "echo", 1) == 1
    assert list(folder.iterdir()) == []


def test_what_the_driver_can_import_its_local_workers_can(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_on_sys_path.py").write_text("class Worker:\n    def echo(self, value): return value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    backend = started()
    (ref,) = place(backend, Placement(world_size=1, worker_class="only_on_sys_path:Worker"))
    assert ask(backend, ref, "echo", 1) == 1


def test_gpus_are_dealt_to_local_workers(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    backend = started()
    refs = place(backend, Placement(world_size=3, worker_class=WORKER, gpus_per_worker=1))
    assert [ref.device_ids for ref in refs] == [("4",), ("5",), ("6",)]
    assert [ask(backend, ref, "getenv", "CUDA_VISIBLE_DEVICES") for ref in refs] == ["4", "5", "6"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Placement(world_size=2, worker_class=WORKER, gpus_per_worker=64), "128 GPUs are needed"),
        (Placement(world_size=2, worker_class=WORKER, strategy="STRICT_SPREAD"), "STRICT_SPREAD needs as many nodes"),
    ],
)
def test_what_one_machine_cannot_give_is_refused(started: Any, request_: Placement, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        place(started(), request_)


def test_a_worker_that_dies_in_a_call_is_told_with_its_last_words(started: Any) -> None:
    backend = started()
    (ref,) = place(backend)
    with pytest.raises(
        WorkerDied, match=r"worker local-0 died: exited with code 1 during exit_yourself: no memory left"
    ):
        ask(backend, ref, "exit_yourself", "no memory left")


def test_a_worker_that_exits_while_it_is_constructed_is_told_with_its_last_words(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exits.py").write_text(
        "import sys\nclass Worker:\n    def __init__(self): sys.exit('no such device')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PlacementError, match=r"0 of 1 .*exited with code 1 while it was starting: no such device"):
        place(started(), Placement(world_size=1, worker_class="exits:Worker"))


def test_what_a_worker_prints_counts_as_its_last_words(started: Any) -> None:
    def print_and_die(worker: object) -> None:
        import os

        print("no memory left")
        os.abort()

    backend = started()
    (ref,) = place(backend)
    with pytest.raises(WorkerDied, match=r"killed by SIGABRT during <callable>: no memory left"):
        ask(backend, ref, print_and_die)


def test_progress_says_who_is_waited_for(started: Any) -> None:
    said: list[str] = []
    backend = started()
    backend.place(TWO, ignore, LIMIT, said.append)
    assert said[0] == "workers: 2 processes on this machine"
    assert said[1].startswith("workers 0/2 ready; local-0 is")
    assert said[-2:] == ["workers 2/2 ready", "calls go by direct"]
    assert len(said) == len(set(said))


def test_shutdown_ends_a_place_in_another_thread(started: Any) -> None:
    backend = started()
    constructing = threading.Event()

    def progress(text: str) -> None:
        if "is constructing" in text:
            constructing.set()

    errors: list[BaseException] = []

    def run() -> None:
        try:
            backend.place(Placement(world_size=1, worker_class="contract_worker:HangsAtStart"), ignore, LIMIT, progress)
        except Shutdown as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert constructing.wait(LIMIT)
    backend.shutdown()
    thread.join(LIMIT)
    assert len(errors) == 1


def test_shutdown_may_be_called_from_on_failure(started: Any) -> None:
    backend = started()
    done = threading.Event()

    def on_failure(worker: WorkerRef, died: WorkerDied) -> None:
        backend.shutdown()
        done.set()

    refs = backend.place(TWO, on_failure, LIMIT)
    os.kill(refs[0].pid, signal.SIGKILL)
    assert done.wait(LIMIT)
    wait_until(lambda: gone(refs[1].pid), "the other worker to be gone")


def test_place_is_called_once(started: Any) -> None:
    backend = started()
    place(backend)
    with pytest.raises(ConfigError, match="places once"):
        place(backend)
    backend.shutdown()
    with pytest.raises(Shutdown):
        place(backend)


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_the_limit_of_a_payload_may_be_beyond_that_of_a_grpc_message(started: Any, transport: str) -> None:
    backend = started(max_message_bytes=2**33, transport=transport)
    (ref,) = place(backend)
    assert ask(backend, ref, "echo", bytes(5_000_000)) == bytes(5_000_000)


def test_a_payload_that_is_too_large_is_refused_and_the_worker_goes_on(started: Any) -> None:
    backend = started(max_message_bytes=10_000)
    (ref,) = place(backend)
    with pytest.raises(ConfigError, match=r"the call of echo is 1\d{5} bytes, more than max_message_bytes=10000"):
        ask(backend, ref, "echo", bytes(100_000))
    with pytest.raises(
        ConfigError, match=r"the reply of <callable> is 1\d{5} bytes, more than max_message_bytes=10000"
    ):
        ask(backend, ref, lambda worker: bytes(100_000))
    assert ask(backend, ref, "echo", bytes(5_000)) == bytes(5_000)


DRIVER = f"""
import sys, time
from lightvllm.backends.base import Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.messages import encode_call
backend = KubernetesBackend()
refs = backend.place(Placement(world_size=2, worker_class={WORKER!r}), lambda *_: None, 60)
call = backend.call(refs[0], *encode_call("touch_and_hang", (sys.argv[1],), None))
print(*(ref.pid for ref in refs), flush=True)
if sys.argv[2] == "wait":
    call.result(60)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT", "exit"])
def test_local_workers_and_their_files_end_with_the_driver_however_it_ends(
    temporary: Path, tmp_path: Path, how: str
) -> None:
    """One worker is stuck in a call, one is idle."""
    with script(DRIVER, str(tmp_path / "flag"), "exit" if how == "exit" else "wait") as driver:
        assert driver.stdout is not None
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2
        if how != "exit":
            wait_until((tmp_path / "flag").exists, "the call to begin")
            os.killpg(driver.pid, getattr(signal, how))  # as a terminal would
        ended = time.monotonic()
        driver.wait(LIMIT)
        wait_until(lambda: all(map(gone, pids)), "the workers to be gone")
        assert time.monotonic() - ended < 10  # the call would have taken 60 s
        assert list(temporary.iterdir()) == []


STARTING = """
import sys
from lightvllm.backends.base import Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
request = Placement(world_size=2, worker_class="contract_worker:HangsAtStart")
KubernetesBackend().place(request, lambda *_: None, 60, lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_ends_while_workers_start_leaves_nothing(temporary: Path, number: int) -> None:
    with script(STARTING) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.count("is constructing") == 2:
                break
        children = psutil.Process(driver.pid).children()
        assert len(children) == 2
        os.killpg(driver.pid, number)
        wait_until(lambda: all(gone(child.pid) for child in children), "the workers to be gone", 10.0)
        wait_until(lambda: list(temporary.iterdir()) == [], "the socket directory to be gone", 10.0)


def test_no_token_is_in_the_process_list(started: Any) -> None:
    """The token is in neither arguments nor environment; test_k8s_process.py knows it and looks for it."""
    backend = started()
    (ref,) = place(backend)
    assert psutil.Process(ref.pid).cmdline()[1:] == ["-P", "-m", "lightvllm.backends.k8s.server"]


def test_a_missing_grpc_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "grpc.py").write_text("raise ModuleNotFoundError(\"No module named 'grpc'\", name='grpc')")
    code = (
        "from lightvllm.errors import MissingExtra\n"
        "try:\n    import lightvllm.backends.k8s.backend\n"
        "except MissingExtra as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "--executor k8s needs the package 'grpcio'" in done.stdout, done.stderr
    assert "pip install 'lightvllm[k8s]'" in done.stdout


# ---------------------------------------------------------------------------------------------- static addresses


def test_static_workers_serve_one_backend_after_another(
    started: Any, commands: list[WorkerCommand], token_file: str
) -> None:
    addresses = tuple(command.address() for command in commands)
    for _ in range(2):
        backend = started(addresses, token_file)
        refs = place(backend, TWO)
        assert [ref.address for ref in refs] == list(addresses)
        assert [ref.node for ref in refs] == [backend.driver_node] * 2
        calls = [backend.call(ref, *encode_call("append", (i,), None)) for i in range(20) for ref in refs]
        for call in calls:
            call.result(LIMIT)
        assert [ask(backend, ref, "read_log") for ref in refs] == [(list(range(20)), 0)] * 2
        backend.shutdown()


def test_explicit_variables_win_over_a_servers_own(
    started: Any, token_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them the folder that the worker's class is in; the server was started without it."""
    (tmp_path / "elsewhere.py").write_text("from contract_worker import ContractWorker as Worker")
    monkeypatch.setenv("LIGHTVLLM_TEST_OWN", "own")
    with worker_command("--listen", "127.0.0.1:0", "--token-file", token_file) as command:
        overrides = {"LIGHTVLLM_TEST_OWN": "explicit", "CUDA_VISIBLE_DEVICES": "3,5", "PYTHONPATH": str(tmp_path)}
        request = Placement(
            world_size=1,
            worker_class="elsewhere:Worker",
            env={"LIGHTVLLM_TEST_OWN": "given", "LIGHTVLLM_TEST_NEW": "given"},
            env_overrides=overrides,
        )
        backend = started((command.address(),), token_file)
        (ref,) = place(backend, request)
        assert ref.device_ids == ("3", "5")
        assert {name: ask(backend, ref, "getenv", name) for name in overrides} == overrides
        assert ask(backend, ref, "getenv", "LIGHTVLLM_TEST_NEW") == "given"


def test_local_workers_are_started_with_explicit_variables(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are dealt the GPUs that these show: what is dealt to one is not overwritten by all of them."""
    monkeypatch.setenv("LIGHTVLLM_TEST_OWN", "own")
    backend = started()
    overrides = {"LIGHTVLLM_TEST_OWN": "explicit", "CUDA_VISIBLE_DEVICES": "3,5"}
    refs = place(backend, Placement(world_size=2, worker_class=WORKER, gpus_per_worker=1, env_overrides=overrides))
    assert [ref.device_ids for ref in refs] == [("3",), ("5",)]
    assert [ask(backend, ref, "getenv", "CUDA_VISIBLE_DEVICES") for ref in refs] == ["3", "5"]
    environ = psutil.Process(refs[0].pid).environ()
    assert (environ["LIGHTVLLM_TEST_OWN"], environ["CUDA_VISIBLE_DEVICES"]) == ("explicit", "3")


def test_local_workers_are_dealt_the_gpus_that_are_named(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    refs = place(
        started(local_gpus=["6", "GPU-5ebe", "2"]), Placement(world_size=2, worker_class=WORKER, gpus_per_worker=1)
    )
    assert [ref.device_ids for ref in refs] == [("6",), ("GPU-5ebe",)]
    with pytest.raises(PlacementError, match=r"2 GPUs are needed \(1 each\), local_gpus names 1 \(6\)"):
        place(started(local_gpus=["6"]), Placement(world_size=2, worker_class=WORKER, gpus_per_worker=1))


TALKATIVE = f"""
import sys
from lightvllm.backends.base import Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.messages import encode_call

def talk(worker, name, lines):
    import os, sys
    for number in range(lines):
        print(name * 150, number, file=sys.stderr if number % 2 else sys.stdout)

backend = KubernetesBackend(show_output=True)
workers = backend.place(Placement(world_size=2, worker_class={WORKER!r}), lambda *_: None, 60)
calls = [backend.call(w, *encode_call(talk, (n, 2000), None)) for w, n in zip(workers, "ab")]
for number in range(2000):
    sys.stderr.write("d" * 150 + " %d\\n" % number)
for call in calls:
    call.result(60)
backend.shutdown()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_all_local_workers_print_is_shown_whole_and_in_order(unbuffered: str) -> None:
    with script(TALKATIVE, env={"PYTHONUNBUFFERED": unbuffered}) as driver:
        _, shown = driver.communicate(timeout=LIMIT)
        assert driver.returncode == 0
    lines = shown.splitlines()
    assert len(lines) == 3 * 2000
    for name in "abd":
        assert [line for line in lines if line[0] == name] == [f"{name * 150} {number}" for number in range(2000)]


def test_the_first_addresses_serve_a_smaller_layout(
    started: Any, commands: list[WorkerCommand], token_file: str
) -> None:
    backend = started(tuple(command.address() for command in commands), token_file)
    assert [ref.address for ref in place(backend, ONE)] == [commands[0].address()]


def test_the_death_of_a_static_worker_is_noticed_at_once(
    started: Any, commands: list[WorkerCommand], token_file: str, tmp_path: Path
) -> None:
    backend = started(tuple(command.address() for command in commands), token_file)
    reports: list[WorkerDied] = []
    arrived = threading.Event()

    def on_failure(worker: WorkerRef, died: WorkerDied) -> None:
        reports.append(died)
        arrived.set()

    dying, well = backend.place(TWO, on_failure, LIMIT)
    call = backend.call(dying, *encode_call("touch_and_hang", (str(tmp_path / "flag"),), None))
    wait_until((tmp_path / "flag").exists, "the call to begin")
    os.kill(dying.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="the connection broke"):
        call.result(5.0)
    assert arrived.wait(5.0)
    assert ask(backend, well, "echo", 1) == 1
    backend.shutdown()
    assert [died.worker for died in reports] == [dying.id]


def test_a_silent_node_is_noticed_within_three_seconds(
    started: Any, commands: list[WorkerCommand], token_file: str
) -> None:
    """A stopped process keeps its connection and answers nothing, like a node that is gone."""
    backend = started((commands[0].address(),), token_file)
    silent = threading.Event()
    (ref,) = backend.place(ONE, lambda *_: silent.set(), LIMIT)
    os.kill(ref.pid, signal.SIGSTOP)
    started_at = time.monotonic()
    assert silent.wait(LIMIT)
    assert time.monotonic() - started_at < 4.5  # 3 s, and room for a busy machine


def test_another_token_is_refused(started: Any, commands: list[WorkerCommand], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_token(tmp_path / "other")
    with pytest.raises(AuthError, match="refused this driver: the token is missing or wrong") as caught:
        place(started((commands[0].address(),), other))
    assert Path(other).read_text().strip() not in str(caught.value)


def test_workers_that_come_late_are_waited_for_and_named(started: Any, token_file: str) -> None:
    """The address is known (a server had it before), the server comes while the driver waits."""
    with worker_command("--listen", "127.0.0.1:0", "--token-file", token_file) as before:
        address = before.address()
    said: list[str] = []
    waiting = threading.Event()

    def progress(text: str) -> None:
        said.append(text)
        if "refused" in text:
            waiting.set()

    backend = started((address,), token_file)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(backend.place(ONE, ignore, LIMIT, progress)))
    thread.start()
    assert waiting.wait(LIMIT), said
    with worker_command("--listen", address, "--token-file", token_file):
        thread.join(LIMIT)
        assert ask(backend, results[0], "echo", 1) == 1
    assert any(text.startswith(f"workers 0/1 ready; {address} ") for text in said)


def test_workers_that_never_come_are_named(started: Any, commands: list[WorkerCommand], token_file: str) -> None:
    with worker_command("--listen", "127.0.0.1:0", "--token-file", token_file) as before:
        missing = before.address()
    backend = started((commands[0].address(), missing), token_file)
    with pytest.raises(PlacementError, match=rf"1 of 2 workers ready within 3 s; {missing} .*refused"):
        place(backend, TWO, timeout=3.0)
    again = started((commands[0].address(),), token_file)  # the one that was there is free again
    assert ask(again, place(again)[0], "echo", 1) == 1


def test_an_address_of_something_else_is_no_worker(started: Any, token_file: str) -> None:
    import concurrent.futures

    import grpc

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(PlacementError, match="is no lightvllm worker"):
            place(started((f"127.0.0.1:{port}",), token_file))
    finally:
        server.stop(None).wait(LIMIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": ("127.0.0.1:1",)}, "k8s_workers needs k8s_token_file"),
        ({"token_file": "TOKEN"}, "are for k8s_workers or k8s_service, neither of which is given"),
        ({"workers": ("127.0.0.1:1", "127.0.0.1:1"), "token_file": "TOKEN"}, "127.0.0.1:1 more than once"),
        (
            {"workers": ("127.0.0.1:0",), "token_file": "TOKEN"},
            "127.0.0.1:0 stands for port 0; a worker's port is one of",
        ),
        (
            {"workers": ("127.0.0.1:65530",), "token_file": "TOKEN", "gpus_per_pod": 8},
            r"127.0.0.1:65530 stands for ports 65530 to 65537 \(8 workers\); a worker's port is one of 1 to 65535",
        ),
        (
            {"workers": ("127.0.0.1:9002", "127.0.0.1:9000"), "token_file": "TOKEN", "gpus_per_pod": 3},
            r"127.0.0.1:9002 and 127.0.0.1:9000 both stand for 127.0.0.1:9002 \(each for 3 consecutive ports\); name",
        ),
        ({"workers": ("127.0.0.1:1",) * 2, "token_file": "TOKEN", "gpus_per_pod": 2}, "127.0.0.1:1 more than once"),
        ({"workers": ("127.0.0.1:1",), "token_file": "TOKEN", "gpus_per_pod": 0}, "k8s_gpus_per_pod=0; use 1 or more"),
        ({"gpus_per_pod": 2}, "k8s_gpus_per_pod=2 is for k8s_workers or k8s_service, neither of which"),
        ({"workers": ("10.0.0.1:1",), "token_file": "TOKEN"}, "not a loopback address"),
        ({"workers": ("nonsense",), "token_file": "TOKEN"}, "malformed"),
        ({"workers": ("127.0.0.1:1",), "token_file": "TOKEN", "local_gpus": ["0"]}, r"local_gpus=\['0'\] is for local"),
        ({"local_gpus": "0,1"}, r"local_gpus='0,1'; expected a list of GPUs by index or UUID"),
        ({"local_gpus": ["-1"]}, r"local_gpus=\['-1'\]; expected"),
        ({"local_gpus": [1]}, r"local_gpus=\[1\]; expected"),
        ({"local_gpus": ["3", "4", "3"]}, "local_gpus names 3 more than once"),
        ({"workers": ("127.0.0.1:1",), "token_file": "/no/such/file"}, "No such file"),
        ({"workers": ("127.0.0.1:1",), "token_file": "TOKEN", "tls_ca": "ca"}, "missing: tls_cert, tls_key"),
    ],
)
def test_contradictory_options_are_refused(token_file: str, options: dict[str, Any], message: str) -> None:
    options = {name: token_file if value == "TOKEN" else value for name, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        KubernetesBackend(**options)


def test_too_few_addresses_are_counted(started: Any, token_file: str) -> None:
    with pytest.raises(ConfigError, match="k8s_workers names 1 workers, this layout needs 2"):
        place(started(("127.0.0.1:1",), token_file), TWO)
    with pytest.raises(
        ConfigError,
        match="names 2 pods of 2 workers, 4 in all, this layout needs 5; start more with: lightvllm worker --workers 2",
    ):
        place(
            started(("127.0.0.1:1", "127.0.0.1:3"), token_file, gpus_per_pod=2),
            Placement(world_size=5, worker_class=WORKER),
        )


def test_static_workers_on_one_node_are_not_spread(
    started: Any, commands: list[WorkerCommand], token_file: str
) -> None:
    backend = started(tuple(command.address() for command in commands), token_file)
    with pytest.raises(PlacementError, match="strategy STRICT_SPREAD needs 2 nodes"):
        place(backend, Placement(world_size=2, worker_class=WORKER, strategy="STRICT_SPREAD"))


def test_a_class_that_the_servers_node_lacks_is_named_with_the_server(
    started: Any, commands: list[WorkerCommand], token_file: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{commands[0].address()}: worker class 'nowhere:Worker': No module named"):
        place(started((commands[0].address(),), token_file), Placement(world_size=1, worker_class="nowhere:Worker"))


assert TESTS in os.environ.get("PYTHONPATH", ""), "conftest.py makes the worker classes importable"

"""Connections that are cut, held up or silenced in the middle of a step, by both carriers.

The step ends once, with its result, or with an error of ours inside the set time; it is never executed twice; the other
worker of the group goes on, and the server behind the cut serves the next driver.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import psutil
from k8s_servers import WorkerCommand, worker_command, write_token
from tcp_proxy import WAYS, Proxy
from waiting import LIMIT, gone, wait_until

from lightvllm.backends.base import Placement
from lightvllm.backends.k8s.backend import KubernetesBackend
from lightvllm.config import ParallelConfig
from lightvllm.errors import RpcTimeout, WorkerDied
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.messages import decode_reply, encode_call
from lightvllm.transfer import link

WORKER = "cuts_worker:StepWorker"
STEP_SECONDS = 2.0
"""The time-out of a step whose connection is only silent beside a lease that is well."""
NOTICED_SECONDS = 4.0 + 3.0
"""Until a dead peer is noticed over TCP: keepalive's 3 s, and what a busy machine adds."""


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_token(tmp_path_factory.mktemp("token"))


@contextlib.contextmanager
def server_pair(token_file: str) -> Iterator[list[WorkerCommand]]:
    """Two servers. When all has been done with them they serve one more driver of each carrier."""
    with contextlib.ExitStack() as stack:
        options = ("--listen", "127.0.0.1:0", "--token-file", token_file)
        made = [stack.enter_context(worker_command(*options)) for _ in range(2)]
        first, second = (command.address() for command in made)
        yield made
        for carrier in CARRIERS:
            last = place((first, second), token_file, carrier)
            assert last.collective_rpc("echo", LIMIT, (1,)) == [1, 1]
            last.shutdown()
        assert all(command.process.poll() is None for command in made)


@pytest.fixture(scope="module")
def commands(token_file: str) -> Iterator[list[WorkerCommand]]:
    """Two servers for all tests: every test's driver is also the next one after the cut before."""
    with server_pair(token_file) as made:
        yield made


@dataclass
class Group:
    """Two workers, the first behind ``lease`` (gRPC) and, with the direct carrier, ``data``."""

    executor: DistributedExecutor
    lease: Proxy
    data: Proxy
    folder: Path

    @property
    def pid(self) -> int:
        return self.executor.workers[0].pid

    def step(self, number: int, held: bool = False, timeout: float = LIMIT) -> Any:
        """A future of both workers' results; returns when both have begun, if they are ``held``."""
        future = self.executor.collective_rpc("step", timeout, (str(self.folder), number, held), non_block=True)
        if held:
            wait_until(lambda: self.steps().count(number) == 2, f"step {number} to begin")
        return future

    def go(self) -> None:
        (self.folder / "go").touch()

    def steps(self) -> list[int]:
        """The numbers of the steps that were executed, by either worker."""
        path = self.folder / "steps"
        return [int(line.split()[1]) for line in path.read_text().splitlines()] if path.exists() else []

    def other_answers(self) -> bool:
        backend, worker = self.executor.backend, self.executor.workers[1]
        name, payload = encode_call("echo", ("here",), None)
        future = backend.call(worker, name, payload)
        backend.wait(future, LIMIT)
        return bool(decode_reply(name, future.result(0)) == "here")


SLOW = pytest.mark.slow
CARRIERS = ("grpc", "direct")
Cut = Callable[[Group], None]


class Interposed:
    """Puts a proxy in the direct connection of a driver that is behind one with its lease.

    Attributes:
        proxies: by the address at which the driver reaches the worker's server.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxies: dict[str, Proxy | None] = {}
        connect = link.connect

        def interposed(target: str, *args: Any, **kwargs: Any) -> Any:
            server = threading.current_thread().name.removeprefix("lightvllm-place-")
            if server in self.proxies:
                assert self.proxies[server] is None
                proxy = self.proxies[server] = Proxy(target)
                target = proxy.address
            return connect(target, *args, **kwargs)

        monkeypatch.setattr(link, "connect", interposed)

    @contextlib.contextmanager
    def lease(self, server: str) -> Iterator[Proxy]:
        """A proxy before the worker server; also for the direct connections that come of it."""
        proxy = Proxy(server)
        self.proxies[proxy.address] = None
        try:
            yield proxy
        finally:
            proxy.close()
            if (data := self.proxies.pop(proxy.address)) is not None:
                data.close()


@contextlib.contextmanager
def grouped(
    pair: list[WorkerCommand], token_file: str, carrier: str, folder: Path, interposed: Interposed
) -> Iterator[Group]:
    """A driver's group. Afterwards everything has ended in time, and the next driver is served."""
    first, second = (command.address() for command in pair)
    with interposed.lease(first) as lease, contextlib.ExitStack() as stack:
        executor = place((lease.address, second), token_file, carrier)
        stack.callback(executor.shutdown)
        pids = [worker.pid for worker in executor.workers]
        made = Group(executor, lease, interposed.proxies[lease.address] or lease, folder)
        yield made
        numbers = made.steps()
        assert all(numbers.count(number) <= 2 for number in numbers), f"a step was executed twice: {numbers}"
        started = time.monotonic()
        executor.shutdown()
        assert time.monotonic() - started < 6.0
    wait_until(lambda: all(map(gone, pids)), "the workers to end with their driver")
    for command, pid in zip(pair, pids, strict=True):
        wait_until(lambda command=command, pid=pid: running(command) != pid, "a fresh server process")


@pytest.fixture
def group(
    request: pytest.FixtureRequest,
    commands: list[WorkerCommand],
    token_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Group]:
    """Parameter: the carrier."""
    with grouped(commands, token_file, request.param, tmp_path, Interposed(monkeypatch)) as made:
        yield made


def running(command: WorkerCommand) -> int:
    """The server process that was told of last."""
    lines = [line for line in list(command.lines) if re.search("listening|ready", line)]
    return int(re.findall(r"\(process (\d+)\)", lines[-1])[0])


def place(addresses: tuple[str, str], token_file: str, carrier: Any) -> DistributedExecutor:
    backend = KubernetesBackend(addresses, token_file, transport=carrier)
    return DistributedExecutor(
        backend, Placement(world_size=2, worker_class=WORKER), ParallelConfig(tensor_parallel_size=2)
    )


def fails(future: Any, error: type[Exception], within: float) -> None:
    started = time.monotonic()
    with pytest.raises(error):
        future.result()
    assert time.monotonic() - started < within


def driver_shuts_down(group: Group) -> None:
    """Its own end of the connection that carries calls, behind the back of whoever uses it."""
    found = 0
    port = int(group.data.address.rpartition(":")[2])
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port and connection.status == "ESTABLISHED":
            with socket.socket(fileno=os.dup(connection.fd)) as sock:
                sock.shutdown(socket.SHUT_RDWR)
                found += 1
    assert found == 1


CLOSED: dict[str, Cut] = {
    "closed": lambda group: group.data.cut(),
    "reset": lambda group: group.data.reset(),
    "closed-by-the-driver": driver_shuts_down,
    "ended-downwards": lambda group: group.data.end_way("down"),
    "lease-closed": lambda group: group.lease.cut(),
    "lease-reset": lambda group: group.lease.reset(),
}


@pytest.mark.parametrize(
    ("group", "cut"),
    [
        pytest.param(carrier, cut, id=f"{carrier}-{name}")
        for name, cut in CLOSED.items()
        for carrier in CARRIERS
        if carrier == "direct" or not name.startswith("lease")  # gRPC's lease is what carries its calls
    ],
    indirect=["group"],
)
def test_a_connection_closed_in_the_middle_of_a_step_fails_it_at_once(group: Group, cut: Cut) -> None:
    future = group.step(1, held=True)
    cut(group)
    fails(future, WorkerDied, 2.0)
    group.go()
    assert group.other_answers()
    assert group.steps() == [1, 1]


@pytest.mark.parametrize("group", CARRIERS, indirect=True)
def test_one_end_that_will_send_no_more_is_an_end(group: Group) -> None:
    """gRPC breaks with it at once; by the direct carrier the step that runs is finished and answered first."""
    future = group.step(1, held=True)
    group.data.end_way("up")
    if group.executor.backend.carriers[group.executor.workers[0].id] == "direct":  # type: ignore[attr-defined]
        group.go()
        assert future.result() == [2, 2]
    else:
        fails(future, WorkerDied, 2.0)
        group.go()
    wait_until(lambda: group.executor.is_failed, "the death to be noticed", 2.0)
    assert group.other_answers()
    assert group.steps() == [1, 1]


@pytest.mark.parametrize(
    ("group", "cut"),
    [("grpc", CLOSED["closed"]), ("direct", CLOSED["closed"]), ("direct", CLOSED["lease-closed"])],
    ids=["grpc-closed", "direct-closed", "direct-lease-closed"],
    indirect=["group"],
)
def test_a_connection_closed_between_steps_is_noticed(group: Group, cut: Cut) -> None:
    assert group.step(1).result() == [2, 2]
    cut(group)
    wait_until(lambda: group.executor.is_failed, "the death to be noticed", 2.0)
    with pytest.raises(WorkerDied):
        group.step(2)
    assert group.other_answers()
    assert group.steps() == [1, 1]


LOST: dict[str, Cut] = {
    "both-ways": lambda group: (group.lease.drop(*WAYS), group.data.drop(*WAYS)),  # type: ignore[dict-item]
    "upwards": lambda group: (group.lease.drop("up"), group.data.drop("up")),  # type: ignore[dict-item]
    "downwards": lambda group: (group.lease.drop("down"), group.data.drop("down")),  # type: ignore[dict-item]
    "held-up": lambda group: (group.lease.hold(*WAYS), group.data.hold(*WAYS)),  # type: ignore[dict-item]
}


@pytest.mark.parametrize(
    "loss",
    [pytest.param(loss, id=name, marks=SLOW if name != "both-ways" else []) for name, loss in LOST.items()],
)
@pytest.mark.parametrize("group", CARRIERS, indirect=True)
def test_a_silent_peer_is_noticed_in_the_middle_of_a_step(group: Group, loss: Cut) -> None:
    future = group.step(1, held=True)
    loss(group)
    fails(future, WorkerDied, NOTICED_SECONDS)
    group.go()
    assert group.other_answers()
    assert group.steps() == [1, 1]


@pytest.mark.parametrize("group", ["direct"], indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_calls_that_are_lost_beside_a_lease_that_is_well_end_with_their_timeout(group: Group, way: Any) -> None:
    """The worker lives, so that this is no death; the call fails in its time."""
    group.data.drop(way)
    fails(group.step(1, timeout=STEP_SECONDS), RpcTimeout, STEP_SECONDS + 2.0)
    assert group.other_answers()
    assert group.steps().count(1) == (1 if way == "up" else 2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [3000, pytest.param(300_000, marks=SLOW)])
@pytest.mark.parametrize("group", CARRIERS, indirect=True)
def test_half_a_message_is_none(group: Group, way: Any, size: int) -> None:
    """The call is not executed, or its reply not believed."""
    note = group.executor.collective_rpc("echo", LIMIT, (1,), non_block=True)
    assert note.result() == [1, 1]
    group.data.truncate(way, size // 2)
    future = group.executor.collective_rpc("echo", LIMIT, (os.urandom(size),), non_block=True)
    fails(future, WorkerDied, 2.0)
    assert group.other_answers()


@pytest.mark.parametrize("group", CARRIERS, indirect=True)
def test_a_connection_that_trickles_works(group: Group) -> None:
    group.lease.trickle()
    group.data.trickle()
    blob = os.urandom(3000)
    assert group.executor.collective_rpc("echo", LIMIT, (blob,)) == [blob, blob]
    assert group.step(1).result() == [2, 2]
    assert group.steps() == [1, 1]


@pytest.mark.parametrize("group", CARRIERS, indirect=True)
def test_a_connection_that_is_held_up_for_a_moment_works(group: Group) -> None:
    future = group.step(1, held=True)
    group.data.hold(*WAYS)
    group.go()
    later = group.step(2)
    wait_until(lambda: group.steps().count(2) == 1, "the other worker to have done the next step")
    group.data.release()
    assert future.result() == [2, 2]
    assert later.result() == [4, 4]
    assert sorted(group.steps()) == [1, 1, 2, 2]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        tasks = Path(f"/proc/{pid}/task")
        wait_until(
            lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()),
            "all of the process to be stopped",
        )
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("held", [False, True], ids=["idle", "step"])
@pytest.mark.parametrize("group", CARRIERS, indirect=True)
def test_a_worker_stopped_for_a_moment_goes_on(group: Group, held: bool) -> None:
    future = group.step(1, held=True) if held else None
    with stopped(group.pid):
        group.go()
        future = future or group.step(1)
        wait_until(lambda: group.steps().count(1) >= 1, "the other worker to do its part")
        with pytest.raises(TimeoutError):
            future.result(0.5)
    assert future.result() == [2, 2]
    assert group.steps() == [1, 1]


def stop_for_long(group: Group, held: bool, seconds: float, begin: Callable[[], object] = lambda: None) -> None:
    """A worker behind a proxy is dead to its driver, and knows it when it goes on: it does nothing more for it.

    Calls ``begin`` when the worker is about to be stopped.
    """
    future = group.step(1, held=True) if held else None
    begin()
    until = time.monotonic() + seconds
    with stopped(group.pid):
        if future is not None:
            fails(future, WorkerDied, NOTICED_SECONDS)
        wait_until(lambda: group.executor.is_failed, "the death to be noticed", NOTICED_SECONDS)
        group.go()
        assert group.other_answers()
        wait_until(lambda: time.monotonic() > until, "the worker to have been stopped for long")
    wait_until(lambda: gone(group.pid), "the worker to end")
    assert group.steps().count(1) == (2 if held else 0)


@pytest.mark.parametrize("held", [False, True], ids=["idle", "step"])
@pytest.mark.parametrize("group", CARRIERS, indirect=True)
def test_a_worker_stopped_for_long_is_dead_to_its_driver(group: Group, held: bool) -> None:
    stop_for_long(group, held, seconds=0.0)


def stop_local(
    folder: Path, carrier: Any, held: bool, seconds: float, begin: Callable[[], object] = lambda: None
) -> None:
    """On one machine a process that is suspended is not dead, but waited for."""
    backend = KubernetesBackend(transport=carrier)
    executor = DistributedExecutor(
        backend, Placement(world_size=2, worker_class=WORKER), ParallelConfig(tensor_parallel_size=2)
    )
    group = Group(executor, None, None, folder)  # type: ignore[arg-type]
    try:
        future = group.step(1, held=True) if held else None
        begin()
        with stopped(group.pid):
            group.go()
            future = future or group.step(1)
            with pytest.raises(TimeoutError):
                future.result(seconds)
            assert not executor.is_failed
        assert future.result() == [2, 2]
        assert group.steps() == [1, 1]
    finally:
        executor.shutdown()
    wait_until(lambda: all(gone(worker.pid) for worker in executor.workers), "the workers to end")


@pytest.mark.parametrize("held", [False, True], ids=["idle", "step"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_local_worker_that_is_stopped_is_waited_for(tmp_path: Path, carrier: Any, held: bool) -> None:
    stop_local(tmp_path, carrier, held, seconds=0.7)


@pytest.mark.slow
def test_workers_stopped_for_20_seconds(token_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two above, with a stop that outlasts keepalive many times. They only wait, so they wait side by side."""
    seconds = 20.0
    begin = threading.Barrier(2 * 2 * len(CARRIERS), timeout=LIMIT).wait
    interposed = Interposed(monkeypatch)

    def remote(carrier: str, held: bool, folder: Path) -> None:
        with server_pair(token_file) as pair, grouped(pair, token_file, carrier, folder, interposed) as group:
            stop_for_long(group, held, seconds, begin)

    def local(carrier: str, held: bool, folder: Path) -> None:
        stop_local(folder, carrier, held, seconds, begin)

    cases = list(itertools.product((remote, local), CARRIERS, (False, True)))
    with ThreadPoolExecutor(len(cases)) as pool:
        running = {}
        for case in cases:
            run, carrier, held = case
            name = f"{run.__name__}-{carrier}-{'step' if held else 'idle'}"
            folder = tmp_path / name
            folder.mkdir()
            running[name] = pool.submit(run, carrier, held, folder)
    failed = {name: error for name, future in running.items() if (error := future.exception())}
    for name, error in failed.items():
        error.add_note(name)
    if failed:
        raise BaseExceptionGroup("stopped for 20 seconds", list(failed.values()))


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_local_workers_socket_shut_down_in_the_middle_of_a_step(tmp_path: Path, carrier: Any) -> None:
    backend = KubernetesBackend(transport=carrier)
    before = unix_sockets()
    executor = DistributedExecutor(
        backend, Placement(world_size=2, worker_class=WORKER), ParallelConfig(tensor_parallel_size=2)
    )
    group = Group(executor, None, None, tmp_path)  # type: ignore[arg-type]
    try:
        future = group.step(1, held=True)
        for number in unix_sockets() - before:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as sock:
                sock.shutdown(socket.SHUT_RDWR)
        fails(future, WorkerDied, 2.0)
        assert group.steps() == [1, 1]
    finally:
        executor.shutdown()
    wait_until(lambda: all(gone(worker.pid) for worker in executor.workers), "the workers to end")


def unix_sockets() -> set[int]:
    return {connection.fd for connection in psutil.Process().net_connections("unix") if connection.fd >= 0}

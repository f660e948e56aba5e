"""Our contenders of ``rpc.py``: ``DistributedExecutor.collective_rpc``, and a compiled graph, over each backend."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rpc_child import CALL_SECONDS, Contender

from lightvllm.backends.base import Backend, Placement
from lightvllm.config import ParallelConfig
from lightvllm.executors.distributed import DistributedExecutor
from lightvllm.executors.graph import InputNode, MultiOutputNode

_START_SECONDS = 120.0


@contextlib.contextmanager
def open_contender(spec: dict[str, Any]) -> Iterator[Contender]:
    """``backend``: inprocess, k8s or ray. For k8s: ``transport``; ``carrier`` unix (workers that the backend starts),
    tcp or tls (``lightvllm worker`` servers); ``folder`` with token and certificates. For ray: ``address``.
    ``graph``: whether calls go by a compiled graph."""
    world_size = spec["world_size"]
    with contextlib.ExitStack() as stack:
        executor = DistributedExecutor(
            _backend(spec, stack),
            Placement(world_size=world_size, worker_class="rpc_worker:EchoWorker", env=_environment()),
            ParallelConfig(tensor_parallel_size=world_size),
            start_timeout=_START_SECONDS,
            rpc_timeout=CALL_SECONDS,
        )
        stack.callback(executor.shutdown)
        pids = [worker.pid for worker in executor.workers if worker.pid != os.getpid()]
        prepare = _graph_calls(executor, stack) if spec["graph"] else lambda payload: _plain_calls(executor, payload)
        yield Contender(prepare, pids)


def _environment() -> dict[str, str]:
    """Ray's workers learn from it where ``rpc_worker`` is."""
    return {"PYTHONPATH": str(Path(__file__).resolve().parent)}


def _plain_calls(executor: DistributedExecutor, payload: bytes) -> Any:
    arguments = (payload,)
    return lambda: executor.collective_rpc("echo", args=arguments)


def _graph_calls(executor: DistributedExecutor, stack: contextlib.ExitStack) -> Any:
    """The same as a plain call: the input goes to every worker, every worker's result is got."""
    with InputNode() as given:
        output = MultiOutputNode([handle.echo.bind(given) for handle in executor.handles])
    graph = output.experimental_compile()
    stack.callback(graph.teardown)

    def prepare(payload: bytes) -> Any:
        def call() -> list[Any]:
            refs: Any = graph.execute(payload)  # a list, as the graph has several outputs
            return [ref.get(CALL_SECONDS) for ref in refs]

        return call

    return prepare


def _backend(spec: dict[str, Any], stack: contextlib.ExitStack) -> Backend:
    if spec["backend"] == "inprocess":
        from lightvllm.backends.inprocess import InProcessBackend

        return InProcessBackend()
    if spec["backend"] == "ray":
        from lightvllm.backends.ray.backend import RayBackend

        return RayBackend(spec["address"])
    from lightvllm.backends.k8s.backend import KubernetesBackend

    if spec["carrier"] == "unix":
        return KubernetesBackend(transport=spec["transport"])
    folder = Path(spec["folder"])
    tls = spec["carrier"] == "tls"
    options = ["--token-file", str(folder / "token")]
    if tls:
        options += ["--tls-cert", str(folder / "worker-cert.pem"), "--tls-key", str(folder / "worker-key.pem")]
        options += ["--tls-ca", str(folder / "ca.pem")]
    addresses = start_servers(stack, spec["world_size"], options)
    cert, key, ca = (str(folder / name) if tls else None for name in ("driver-cert.pem", "driver-key.pem", "ca.pem"))
    return KubernetesBackend(tuple(addresses), str(folder / "token"), cert, key, ca, transport=spec["transport"])


def start_servers(stack: contextlib.ExitStack, count: int, options: Sequence[str]) -> list[str]:
    """``lightvllm worker`` on free ports of loopback, with ``options``, ended with ``stack``; their addresses."""
    run = "from lightvllm.cli.main import run; run()"
    command = [sys.executable, "-c", run, "worker", "--listen", "127.0.0.1:0", *options]
    servers = []
    for _ in range(count):
        servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | _python_path()))
        stack.callback(_wait, servers[-1])
    stack.callback(_terminate, servers)  # runs before the waits
    addresses = [_address(server) for server in servers]
    for server in servers:
        threading.Thread(target=_drain, args=(server,), daemon=True).start()
    return addresses


def _python_path() -> dict[str, str]:
    folders = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def _terminate(servers: list[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        server.terminate()


def _wait(server: subprocess.Popen[bytes]) -> None:
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _drain(server: subprocess.Popen[bytes]) -> None:
    """What else it and its workers print goes to standard error; a full pipe would stop them."""
    assert server.stdout is not None
    with server.stdout as said:
        shutil.copyfileobj(said, sys.stderr.buffer)


def _address(server: subprocess.Popen[bytes]) -> str:
    """Of its one line; the pipe is read unbuffered, as ``select`` knows nothing of buffers."""
    assert server.stdout is not None
    said, deadline = b"", time.monotonic() + _START_SECONDS
    while not (found := re.search(rb"listening on (\S+) ", said)):
        ready, _, _ = select.select([server.stdout], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(server.stdout.fileno(), 4096) if ready else b""
        if not more:
            raise RuntimeError(f"'lightvllm worker' did not listen within {_START_SECONDS:.0f} s: {said.decode()!r}")
        said += more
    return found[1].decode()

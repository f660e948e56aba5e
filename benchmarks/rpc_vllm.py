"""vLLM's contenders of ``rpc.py``: its MessageQueue, used as its multiprocessing executor uses it. Runs in its Python.

One queue carries a call from the driver to all workers, and one queue per worker its reply; what is put into them is
what ``vllm/v1/executor/multiproc_executor.py`` puts into them. ``carrier`` "shm" makes all readers local (shared
memory), "tcp" makes them remote (ZMQ over TCP).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

from rpc_child import CALL_SECONDS, Contender, die_with_parent
from rpc_worker import EchoWorker
from vllm import envs
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.version import __version__ as vllm_version

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_END_SECONDS = 5.0


@contextlib.contextmanager
def open_contender(spec: dict[str, Any]) -> Iterator[Contender]:
    world_size, local = spec["world_size"], spec["carrier"] == "shm"
    fork = multiprocessing.get_context("fork")  # vLLM has been imported; no queue has been made yet
    ends = [fork.Pipe() for _ in range(world_size)]
    processes = [
        fork.Process(target=_work, args=(os.getpid(), rank, end, local), daemon=True)
        for rank, (_, end) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    requests = MessageQueue(
        world_size,
        world_size if local else 0,
        max_chunk_bytes=envs.VLLM_MQ_MAX_CHUNK_BYTES_MB * 2**20,
        connect_ip=_HOST,
    )
    try:
        for pipe, _ in ends:
            pipe.send(requests.export_handle())
        replies = [MessageQueue.create_from_handle(_receive(pipe), 0 if local else -1) for pipe, _ in ends]
        requests.wait_until_ready()
        for queue in replies:
            queue.wait_until_ready()
        pids = [int(process.pid or 0) for process in processes]
        yield Contender(lambda payload: _prepare(requests, replies, payload), pids, f"vllm {vllm_version}")
    finally:
        for process in processes:
            process.terminate()
            os.kill(process.pid or 0, signal.SIGCONT)  # the parent may have stopped it
        for process in processes:
            process.join(_END_SECONDS)
            process.kill()
        _unlink(requests)


def _unlink(queue: MessageQueue) -> None:
    """Remove the shared memory of a queue that was made here; otherwise it goes with the last reference."""
    if queue.buffer is not None:
        queue.buffer.is_creator = False
        queue.buffer.shared_memory.unlink()


def _receive(pipe: Any) -> Any:
    if not pipe.poll(_START_SECONDS):
        raise RuntimeError(f"a worker did not answer within {_START_SECONDS:.0f} s")
    return pipe.recv()


def _prepare(requests: MessageQueue, replies: list[MessageQueue], payload: bytes) -> Any:
    def call() -> list[Any]:
        requests.enqueue(("echo", (payload,), {}, None))
        results = []
        for queue in replies:
            status, result = queue.dequeue(timeout=CALL_SECONDS)
            if status != WorkerProc.ResponseStatus.SUCCESS:
                raise RuntimeError(f"a worker failed: {result}")
            results.append(result)
        return results

    return call


def _work(parent: int, rank: int, pipe: Any, local: bool) -> None:
    die_with_parent(parent)
    worker = EchoWorker()
    requests = MessageQueue.create_from_handle(pipe.recv(), rank if local else -1)
    replies = MessageQueue(1, 1 if local else 0, connect_ip=_HOST)

    def end(*_: object) -> NoReturn:
        _unlink(replies)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    pipe.send(replies.export_handle())
    requests.wait_until_ready()
    replies.wait_until_ready()
    while True:
        method, args, kwargs, _ = requests.dequeue(indefinite=True)
        result = getattr(worker, method)(*args, **kwargs)
        replies.enqueue((WorkerProc.ResponseStatus.SUCCESS, result))

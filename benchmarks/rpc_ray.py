"""Ray's own contenders of ``rpc.py``: calls of actors with ``ray.get``, and a compiled graph; nothing of ours.

The Ray cluster is one for all contenders of a run (``address``, with its ``temp_dir``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray.dag import InputNode, MultiOutputNode
from rpc_child import CALL_SECONDS, Contender
from rpc_worker import EchoWorker

_INLINE_BYTES = 100 * 1024  # Ray stores larger arguments; one that all actors get is stored once by ray.put


@contextlib.contextmanager
def open_contender(spec: dict[str, Any]) -> Iterator[Contender]:
    """``carrier``: actor or graph."""
    ray.init(spec["address"], _temp_dir=spec["temp_dir"], log_to_driver=False, logging_level=logging.ERROR)
    try:
        actor = ray.remote(num_cpus=0)(_Actor)
        actors = [actor.remote() for _ in range(spec["world_size"])]
        pids = ray.get([a.pid.remote() for a in actors], timeout=CALL_SECONDS)
        if spec["carrier"] == "actor":
            yield Contender(lambda payload: _actor_calls(actors, payload), pids)
            return
        with InputNode() as given:
            graph = MultiOutputNode([a.echo.bind(given) for a in actors]).experimental_compile()
        try:
            yield Contender(lambda payload: lambda: ray.get(graph.execute(payload), timeout=CALL_SECONDS), pids)
        finally:
            graph.teardown()
    finally:
        ray.shutdown()


class _Actor(EchoWorker):
    def pid(self) -> int:
        return os.getpid()


def _actor_calls(actors: list[Any], payload: bytes) -> Any:
    methods = [a.echo for a in actors]

    def call() -> list[None]:
        argument = payload if len(payload) < _INLINE_BYTES else ray.put(payload)
        replies: list[None] = ray.get([method.remote(argument) for method in methods], timeout=CALL_SECONDS)
        return replies

    return call

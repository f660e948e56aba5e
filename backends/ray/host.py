"""The actor's side: one worker object in one Ray actor. Runs where the worker runs; the driver sends it there by name.

Calls come in the order in which they were sent and run one at a time, on one thread: Ray gives the actor's default
concurrency group a thread of its own, and the lock keeps it so for whoever else may come to call the worker.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import psutil

from lightvllm.backends.base import load_worker_class
from lightvllm.messages import Buffer, encode_failure, invoke


def apply_env(env: Mapping[str, str]) -> None:
    """Set what the process has not been started with.

    Ray sets OMP_NUM_THREADS to the CPUs that it counts for the actor, after the start; that is a guess and no wish of
    anybody's, so it gives way. PYTHONPATH has been read already, so its folders are appended to ``sys.path``.
    """
    if "OMP_NUM_THREADS" not in psutil.Process().environ():
        os.environ.pop("OMP_NUM_THREADS", None)
    for name, value in env.items():
        os.environ.setdefault(name, value)
    for folder in env.get("PYTHONPATH", "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)


class WorkerHost:
    """What the backend makes an actor of."""

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._worker: object = None

    def start(self, worker_class: str, env: Mapping[str, str]) -> dict[str, Any] | bytes:
        """Construct the worker and say where it is; an encoded failure if it cannot be constructed."""
        import ray

        try:
            apply_env(env)
            self._worker = load_worker_class(worker_class)()
        except Exception as error:  # noqa: BLE001  told to the driver, which raises it
            return encode_failure(error)
        return {
            "node": ray.util.get_node_ip_address(),
            "device_ids": tuple(str(gpu) for gpu in ray.get_gpu_ids()),
            "pid": os.getpid(),
        }

    def call(self, method: str, payload: Buffer) -> bytes:
        """One call; see ``messages.invoke``."""
        with self._running:
            return invoke(self._worker, method, payload)

    def watch(self) -> None:
        """Never returns: its failure tells the driver that this process is gone. It waits, and costs no time."""
        threading.Event().wait()

"""A worker class that lets tests of compiled graphs look into its process."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections import Counter
from typing import Any

from graph_worker import GraphWorker

from lightvllm.backends.k8s.edges import Edges


def open_things() -> dict[str, Any]:
    """What a process must not be left with: threads, sockets and the like, by kind."""
    kinds = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            kinds[os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]] += 1
        except OSError:  # the descriptor of this very listing
            continue
    return {
        "threads": sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("lightvllm")),
        "sockets": kinds["socket"],
        "anonymous": kinds["anon_inode"],
        "memory files": kinds["/memfd"],
    }


def _edges() -> list[Edges]:
    return [thing for thing in gc.get_objects() if isinstance(thing, Edges)]


class K8sGraphWorker(GraphWorker):
    """Also knows this backend's edges."""

    def __init__(self) -> None:
        super().__init__()
        self._buffer = bytearray()

    def open_things(self) -> dict[str, Any]:
        return open_things()

    def links(self) -> list[str]:
        """The kinds of the sockets that lead to other workers."""
        made = []
        for edges in _edges():
            for link in edges._links.values():
                kind = type(link._socket).__name__ if link._tls is not None else "plain"
                made.append(f"{kind} {link._socket.family.name}")
        return sorted(made)

    def cut(self, value: object) -> object:
        """End the links to other workers, as a network would: from below."""
        for edges in _edges():
            for link in edges._links.values():
                with socket.socket(fileno=os.dup(link.fileno())) as under:
                    under.shutdown(socket.SHUT_RDWR)
        return value

    def waiting_values(self) -> int:
        """Results that have come and are not wanted yet."""
        return sum(len(edges._arrived) for edges in _edges())

    def blob(self, size: int) -> bytes:
        return bytes(size)

    def length(self, *values: Any) -> int:
        return sum(map(len, values))

    def array(self, value: int, size: int) -> Any:
        """Always the same memory, filled with ``value``."""
        import numpy as np

        if len(self._buffer) != size:
            self._buffer = bytearray(size)
        array = np.frombuffer(self._buffer, np.uint8)
        array[:] = value
        return array

    def is_all(self, array: Any, value: int) -> bool:
        return bool((array == value).all()) and bool(array.flags.writeable)

    def add_one(self, array: Any) -> int:
        """Changes what it is given."""
        array += 1
        return int(array[0])

"""The contenders of ``vllm_executors.py``: what they are, and the parent's end of their processes."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rpc_process import ChildProcess, ContenderFailed, RayCluster, cpu_seconds_of
from serve_load import Stream, Work
from vllm_executors_report import REFERENCE

_CHILD = Path(__file__).with_name("vllm_executors_child.py")
_LOG_LINES = 40
_RAY_V1 = {
    "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "0",
    "VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE": "shm",
    "VLLM_USE_RAY_WRAPPED_PP_COMM": "0",
}


@dataclass(frozen=True)
class Entry:
    """A contender of the catalogue.

    Attributes:
        backend: as for ``--distributed-executor-backend``.
        freeze: whether its workers spin when idle, without end, so that they must be stopped between its bursts.
        certificates: whether its workers are servers on loopback, with mutual TLS.
    """

    title: str
    backend: str
    ray: bool = False
    freeze: bool = False
    certificates: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


_KUBERNETES, _RAY = (f"lightvllm.adapters.vllm.{name}" for name in ("KubernetesExecutor", "RayExecutor"))
CATALOGUE = {
    REFERENCE: Entry("vLLM's multiprocessing", "mp"),
    "ray-v2": Entry("vLLM's Ray V2", "ray", ray=True, environment={"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}),
    "ray-v1": Entry("vLLM's Ray V1, compiled graph", "ray", ray=True, freeze=True, environment=_RAY_V1),
    "k8s-unix": Entry("ours, Unix sockets", _KUBERNETES),
    "k8s-tls": Entry("ours, TCP, mutual TLS", _KUBERNETES, certificates=True),
    "ray": Entry("ours, Ray", _RAY, ray=True),
}


class Contender(ChildProcess):
    """A running contender."""

    start_seconds = 600.0

    def __init__(
        self, name: str, spec: dict[str, Any], environment: Mapping[str, str], log: Path | None, **options: Any
    ) -> None:
        self._log = log
        self._known: set[int] = set()
        self._shared_memory: set[Path] = set()
        self._roles: dict[str, list[psutil.Process]] = {}
        cluster: RayCluster | None = options["cluster"]
        if cluster is not None:
            self._known = set(cluster.members())
        output = log.open("wb") if log is not None else None
        with output or contextlib.nullcontext():
            super().__init__(
                name, [sys.executable, str(_CHILD), json.dumps(spec)], environment, output=output, hint="", **options
            )

    def find_workers(self, answer: dict[str, Any]) -> list[int]:
        """Those in Ray's cluster that have come meanwhile and are not just kept ready; without Ray, its own."""
        if self._cluster is None:
            return [process.pid for process in self._driver.children(recursive=True) if not _is_engine(process)]
        new = set(self._cluster.members()) - self._known
        return [pid for pid in new if not _title(psutil.Process(pid)).startswith("ray::IDLE")]

    def wait_ready(self) -> dict[str, Any]:
        answer = super().wait_ready()
        engines = [process for process in self._others if _is_engine(process)]
        workers = [process for process in self._others if process not in engines]
        self._roles = {"front": [self._driver], "engine": engines, "workers": workers}
        self._shared_memory = {path for process in self._others for path in _shared_memory_of(process.pid)}
        return answer

    def used(self) -> dict[str, float]:
        """CPU seconds of each role, since the processes began."""
        own = {role: cpu_seconds_of(self.name, processes) for role, processes in self._roles.items()}
        return own | {"daemons": self._cluster.cpu_seconds() if self._cluster else 0.0}

    def run(self, works: Sequence[Work], concurrency: int, limit: float) -> list[Stream]:
        """All of ``works``, so many at a time."""
        asked = [{"number": work.number, "prompt": work.prompt, "max_tokens": work.max_tokens} for work in works]
        answer = self.ask({"works": asked, "concurrency": concurrency}, limit, f"answer {len(works)} requests")
        found = []
        for told in answer["streams"]:
            work = works[told.pop("number")]
            stream = Stream(work, outcome="done", usage=len(told["tokens"]), **told)
            if stream.usage != work.max_tokens:
                raise ContenderFailed(f"{self.name} generated {stream.usage} tokens; {work.max_tokens} were asked for")
            found.append(stream)
        return found

    def last_lines(self) -> list[str]:
        """Of what it has printed; none where it goes to the terminal."""
        said = self._log.read_text(errors="replace").splitlines() if self._log is not None else []
        return [line for line in said if line.strip()][-_LOG_LINES:]

    def hang_up(self) -> None:
        if not self._ready:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._others = self._driver.children(recursive=True)
        super().hang_up()

    def close(self) -> None:
        """As ``ChildProcess``; and what a killed vLLM leaves: processes, and files of shared memory."""
        super().close()
        for process in psutil.wait_procs(self._others, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for path in self._shared_memory:
            path.unlink(missing_ok=True)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _is_engine(process: psutil.Process) -> bool:
    return "EngineCore" in _title(process)


def _shared_memory_of(pid: int) -> set[Path]:
    """Files that vLLM would leave behind if it were killed: its queues' and those of torch's CPU communicator."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended
        return set()
    return {Path(found) for found in re.findall(r"(/dev/shm/(?:psm_\S+|\S*cpushm\S*))$", maps, re.MULTILINE)}

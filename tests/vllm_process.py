"""vLLM in processes of its own, for the tests marked ``vllm``: started, asked, ended, and looked after.

Nothing here imports vllm, so that the plain suite collects these tests, too, and skips them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import wait_until

HERE = Path(__file__).parent
KUBERNETES = "lightvllm.adapters.vllm.KubernetesExecutor"
RAY = "lightvllm.adapters.vllm.RayExecutor"
MARK = "LIGHTVLLM_TESTS_MARK"
START_LIMIT, END_LIMIT = 150.0, 30.0  # seconds

MARKS = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),  # starts of vLLM take a minute each where others are at work
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
"""Of every module with such tests."""
SMALL = {"max_model_len": 512, "max_num_seqs": 8, "dtype": "float32", "seed": 0, "disable_log_stats": True}
"""What every engine of these tests is given."""
STAGES = SMALL | {"compilation_config": {"mode": 2, "backend": "eager"}}
"""With pipeline stages: in vLLM 0.32 enforce_eager leaves a CPU stage without its place for what comes in."""
EAGER = SMALL | {"enforce_eager": True}

ON_A_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class VllmError(Exception):
    """What vLLM raised in its process.

    Attributes:
        kinds: the names of the exception's type and of its bases.
    """

    def __init__(self, kinds: list[str], message: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message = kinds, message


class Household:
    """All processes that come of one, whoever their parents are by now, and what they leave behind.

    A process is one of them by its environment or by its working directory: vLLM writes its workers' titles over their
    environment, and Ray's processes change their directory.

    Attributes:
        env, folder: the environment and the working directory for the first of them. In the folder they make their
            temporary files, too.
    """

    def __init__(self, **env: str) -> None:
        self._mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="lightvllm-tests-"))
        self.env = os.environ | ON_A_CPU | {MARK: self._mark, "TMPDIR": str(self.folder)} | env
        self._log = self.folder / "log"
        self._memory: set[int] = set()

    def spawn(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Start the first of them; what it prints, unless ``options`` say otherwise, is in ``log``."""
        with self._log.open("ab") as log:
            given = {"stdout": log, "stderr": log, "env": self.env, "cwd": self.folder, "text": True} | options
            return subprocess.Popen(command, **given)

    def log(self) -> str:
        """What they have printed."""
        return self._log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Those that run, zombies not counted."""
        return [each for each in psutil.process_iter() if self._is_one(each)]

    def _is_one(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return process.cwd() == str(self.folder) or process.environ().get(MARK) == self._mark
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def look(self) -> None:
        """Remember what they have in shared memory now, for `nothing_left`: by inode, for names change."""
        for process in self.processes():
            with contextlib.suppress(OSError):  # it has ended
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self._memory |= {int(line.split()[4]) for line in maps.splitlines() if "/dev/shm/" in line}

    def _named_memory(self) -> list[str]:
        """What of it has a name."""
        with os.scandir("/dev/shm") as entries:
            return [entry.path for entry in entries if entry.inode() in self._memory]

    def only(self, pids: set[int], limit: float = END_LIMIT) -> None:
        """Fails the test unless within ``limit`` seconds no others run."""
        wait_until(lambda: {each.pid for each in self.processes()} <= pids, f"no more than {pids} run", limit)

    def nothing_left(self, limit: float = END_LIMIT) -> None:
        """Fails the test unless all processes end within ``limit`` seconds and leave no shared memory and no files."""

        def gone() -> bool:
            return not self.processes()

        try:
            wait_until(gone, "all processes end", limit)
        except AssertionError:
            raise AssertionError(f"still running: {[(p.pid, p.cmdline()) for p in self.processes()]}") from None
        left = self._named_memory()
        assert not left, f"left in shared memory: {left}"
        ours = [str(path) for path in self.folder.rglob("*") if "lightvllm" in path.name]
        assert not ours, f"left on disk: {ours}"

    def end(self) -> None:
        """Whatever happened: no process, no shared memory and no folder of theirs is left."""
        self.look()
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, 5)
        for path in self._named_memory():
            Path(path).unlink(missing_ok=True)
        shutil.rmtree(self.folder)


class Engine:
    """``vllm_child.py``: vLLM's LLM, asked by the names of its actions."""

    def __init__(self, **env: str) -> None:
        self.household = Household(**env)
        command = [sys.executable, str(HERE / "vllm_child.py")]
        self.process = self.household.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, action: str, **arguments: Any) -> Any:
        """What the action gives. Raises VllmError with what it raises."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": action, "with": arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"vLLM's process has ended with {self.process.wait(END_LIMIT)}:\n{self.household.log()[-8000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise VllmError(*answer["error"])
        return answer["result"]

    def start(self, model: str | Path, backend: str | None, **arguments: Any) -> Engine:
        self.ask("start", model=str(model), backend=backend, **arguments)
        self.household.look()
        return self

    def workers(self) -> list[dict[str, Any]]:
        """See `vllm_calls.who`, in rank order."""
        return self.ask("rpc", method="call:who")  # type: ignore[no-any-return]

    def stop(self) -> int:
        """End it as a user's program ends, by shutting the engines down and leaving; its exit status."""
        self.household.look()
        self.ask("stop")
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(END_LIMIT)

    def end(self) -> None:
        self.household.end()
        self.process.wait(END_LIMIT)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def engine(**env: str) -> Iterator[Engine]:
    """A process for `Engine.start`, and its end."""
    one = Engine(**env)
    try:
        yield one
    finally:
        one.end()

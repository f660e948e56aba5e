"""What ``serve.py`` puts load on: our server, vLLM's, our engine without one; started, asked and ended with care."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from serve_load import BIAS, Work

_END_SECONDS = 60.0
_OFFLINE_SECONDS = 3600.0  # for one list of requests

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class ContenderFailed(Exception):
    """One did not start, ended, or left something behind; the text says which, and where its output is."""


@dataclass(frozen=True)
class Setting:
    """What is equal for all contenders."""

    model: str  # a folder
    dtype: str
    threads: int
    max_num_seqs: int
    max_model_len: int
    prefix_caching: bool
    start_timeout: float  # seconds
    kv_cache_memory: str | None = None  # per worker; None leaves it to the engine. Not for vLLM


def environment(setting: Setting, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    equal = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "0"}
    return {**os.environ, **equal, **(extra or {})}


class Server:
    """A server process in a session of its own, serving when the block begins, and gone with all its children when it
    ends.

    Attributes:
        url: without ``/v1``.
        model: what requests are to call it.
        pid: of the first process.
        log: the file with what it says; removed at an orderly end, kept when the block ends by an error.
    """

    name = "server"

    def __init__(self, command: list[str], setting: Setting, extra: Mapping[str, str] | None = None) -> None:
        self.model = setting.model
        self.url = ""
        self._start_timeout = setting.start_timeout
        self._log = tempfile.NamedTemporaryFile(prefix=f"serve-{self.name}-", suffix=".log", delete=False)  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment(setting, extra),
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.log = self._log.name

    def find_url(self) -> str:
        """Where it listens, or "" while that is not known."""
        raise NotImplementedError

    def said(self) -> str:
        return Path(self.log).read_text(errors="replace")

    def __enter__(self) -> Self:
        try:
            until = time.monotonic() + self._start_timeout
            while not (self.url and self._ready()):
                if self._process.poll() is not None or time.monotonic() > until:
                    raise ContenderFailed(f"{self.name} has not started; its output: {self.log}\n{self.said()[-2000:]}")
                self.url = self.url or self.find_url()
                time.sleep(0.2)
        except BaseException:
            self.end()
            raise
        return self

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        left = self.end()
        if left and kind is None:
            raise ContenderFailed(f"{self.name} has left processes: {left}; its output: {self.log}")
        if kind is None:
            os.unlink(self.log)

    def end(self) -> list[str]:
        """SIGTERM, and SIGKILL for what is still there then; the names of such children."""
        try:
            family = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(family, timeout=5)
        left = [f"{process.pid} {' '.join(process.cmdline())[:80]}" for process in alive if process.is_running()]
        for process in alive:
            process.kill()
        self._log.close()
        return left


class LightvllmServer(Server):
    """``lightvllm serve`` with ``options`` besides."""

    name = "lightvllm"

    def __init__(self, setting: Setting, options: Sequence[str] = ()) -> None:
        run = "from lightvllm.cli.main import run; run()"
        caching = "--enable-prefix-caching" if setting.prefix_caching else "--no-enable-prefix-caching"
        command = [sys.executable, "-c", run, "serve", setting.model, "--port", "0", "--dtype", setting.dtype]
        command += ["--threads", str(setting.threads), "--max-num-seqs", str(setting.max_num_seqs)]
        command += ["--max-model-len", str(setting.max_model_len), caching]
        if setting.kv_cache_memory is not None:
            command += ["--kv-cache-memory", setting.kv_cache_memory]
        super().__init__([*command, *options], setting)

    def find_url(self) -> str:
        found = re.search(r"listening on (http://\S+?);", self.said())
        return found[1] if found else ""


class VllmServer(Server):
    """vLLM's own server."""

    name = "vllm"

    def __init__(self, setting: Setting, python: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]  # may be taken meanwhile: then it ends, and says so
        caching = "--enable-prefix-caching" if setting.prefix_caching else "--no-enable-prefix-caching"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", setting.model]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--dtype", setting.dtype]
        command += ["--max-num-seqs", str(setting.max_num_seqs), "--max-model-len", str(setting.max_model_len)]
        command += [caching, "--disable-uvicorn-access-log"]
        cores = f"0-{setting.threads - 1}"
        chosen = {key: value for key, value in os.environ.items() if key.startswith("VLLM_")}
        super().__init__(command, setting, {**VLLM_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": cores, **chosen})

    def find_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"


class Offline:
    """Our engine without a server: a process of its own that runs lists of requests, all of them given at once."""

    name = "offline"

    def __init__(self, setting: Setting, debug: bool = False) -> None:
        self._start_timeout = setting.start_timeout
        given = json.dumps(setting.__dict__)
        self._process = subprocess.Popen(
            [sys.executable, __file__, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else subprocess.DEVNULL,
            text=True,
            env=environment(setting),
        )

    def __enter__(self) -> Self:
        try:
            self._answer(self._start_timeout)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def run(self, works: Sequence[Work]) -> tuple[float, dict[int, list[int]]]:
        """Seconds, and each request's tokens by its number."""
        assert self._process.stdin is not None
        asked = [{**work.__dict__, "own": sorted(work.own)} for work in works]
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._answer(_OFFLINE_SECONDS)
        return answer["seconds"], {int(number): tokens for number, tokens in answer["tokens"].items()}

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            raise ContenderFailed(f"the offline engine gave no answer (status {self._process.poll()}); see --debug")
        return json.loads(line)


def _serve_offline(setting: Setting) -> None:
    """The child's end: lists of requests from standard input, answers to standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from lightvllm import LLM, SamplingParams

    llm = LLM(
        setting.model,
        dtype=setting.dtype,
        threads=setting.threads,
        max_num_seqs=setting.max_num_seqs,
        max_model_len=setting.max_model_len,
        enable_prefix_caching=setting.prefix_caching,
        kv_cache_memory=setting.kv_cache_memory,
    )
    with llm:
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            works = json.loads(line)
            params = [
                SamplingParams(
                    temperature=work["temperature"],
                    seed=work["seed"],
                    max_tokens=work["max_tokens"],
                    ignore_eos=True,
                    logit_bias=dict.fromkeys(work["own"], BIAS) or None,
                )
                for work in works
            ]
            started = time.perf_counter()
            outputs = llm.generate([{"prompt_token_ids": w["prompt"]} for w in works], params, use_tqdm=False)
            seconds = time.perf_counter() - started
            tokens = {w["number"]: list(o.outputs[0].token_ids) for w, o in zip(works, outputs, strict=True)}
            print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    _serve_offline(Setting(**json.loads(sys.argv[1])))

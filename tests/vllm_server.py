"""vLLM's OpenAI-compatible server as a process, on a Unix socket, for the tests marked ``vllm``."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
from vllm_models import GREEDY
from vllm_process import START_LIMIT, Household
from waiting import wait_until

NAME = "served"


class Server:
    """One that has been started, and two clients for it.

    Attributes:
        http: for what OpenAI's client has no word for.
        openai: OpenAI's, without retries.
        remote_pids: its workers' processes, where they are not its children.
    """

    remote_pids: Sequence[int] = ()

    def __init__(self, model: Path, backend: str, *options: str, **env: str) -> None:
        self.household = Household(**env)
        # A Unix socket's path is short, and no port is anybody else's.
        self._socket = str(self.household.folder / "s")
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--uds", self._socket, "--served-model-name", NAME, "--distributed-executor-backend", backend]
        self.process = self.household.spawn([*command, *options])
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=self._socket), base_url="http://vllm", timeout=60)
        self.openai = openai.OpenAI(
            base_url="http://vllm/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.Client(transport=httpx.HTTPTransport(uds=self._socket), timeout=60),
        )

    def ready(self) -> None:
        """Wait until it answers."""
        wait_until(lambda: self.health() == 200, "vLLM's server is ready", START_LIMIT)
        self.household.look()

    def health(self) -> int | None:
        """The status of ``/health``; None if nobody answers."""
        assert self.process.poll() is None, (
            f"it has ended with {self.process.returncode}:\n{self.household.log()[-8000:]}"
        )
        return self.answers_health()

    def answers_health(self) -> int | None:
        """Likewise, of a server that may have ended."""
        if not self._accepts():
            return None
        try:
            return self.http.get("/health").status_code
        except httpx.TransportError:
            return None

    def complete(self, prompts: list[str]) -> list[str]:
        """The likeliest continuations, as `vllm_models.answers` asks for them."""
        answer = self.openai.completions.create(
            model=NAME,
            prompt=prompts,
            temperature=0.0,
            max_tokens=GREEDY["max_tokens"],
            extra_body={"ignore_eos": True},
        )
        return [choice.text for choice in answer.choices]

    def _accepts(self) -> bool:
        """Whether anybody listens: httpx leaves open the sockets whose connection is refused."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self._socket) == 0

    def end(self) -> None:
        self.http.close()
        self.openai.close()
        self.household.end()
        self.process.wait()


def options(arguments: dict[str, Any]) -> list[str]:
    """vLLM's arguments as its command line has them."""
    written = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            written.append(flag)
        else:
            written += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return written


@contextlib.contextmanager
def server(model: Path, backend: str, *given: str, **env: str) -> Iterator[Server]:
    one = Server(model, backend, *given, **env)
    try:
        yield one
    finally:
        one.end()

"""The router in front of real servers: two models, three replicas, each restarted while requests keep coming."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tiny_llama
from server_process import ServerProcess, started
from waiting import LIMIT, wait_until

COMMAND = [sys.executable, "-c", "from lightvllm.cli.main import run; run()"]
CLIENTS = 8
TOKENS = 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Replicas:
    """Servers by name; one that was ended can be started anew where it was."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._commands: dict[str, list[str]] = {}
        self.running: dict[str, ServerProcess] = {}

    def start(self, name: str, model: str, folder: Path) -> str:
        options = ["--served-model-name", model]
        self._commands[name] = [*COMMAND, "serve", str(folder), *options, "--port"]
        return self._start(name, "0")

    def _start(self, name: str, port: str) -> str:
        server = self.running[name] = self._stack.enter_context(started([*self._commands[name], port]))
        return server.url

    async def restart(self, name: str, number: signal.Signals) -> None:
        server = self.running[name]
        port = server.url.rpartition(":")[2]
        server.signal(number)
        await asyncio.to_thread(server.wait)
        await asyncio.to_thread(self._start, name, port)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[tuple[Replicas, str]]:
    folders = {
        model: tiny_llama.build(tmp_path_factory.mktemp(model), seed=seed) for seed, model in enumerate(("one", "two"))
    }
    with ExitStack() as stack, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        replicas = Replicas(stack)
        urls = [
            f"{model}={replicas.start(name, model, folders[model])}"
            for name, model in (("one-0", "one"), ("one-1", "one"), ("two-0", "two"))
        ]
        for server in replicas.running.values():
            server.ready()
        options = [option for url in urls for option in ("--backend", url)]
        options += ["--port", "0", "--health-interval", "0.2", "--access-log"]
        router = stack.enter_context(started([*COMMAND, "router", *options]))
        yield replicas, wait_until(lambda: router.seen(r"router listens on \S+"), "it listens").rpartition(" ")[2]


class Load:
    """Clients that ask again and again, and what they got."""

    def __init__(self, client: aiohttp.ClientSession, url: str) -> None:
        self.client, self.url = client, url
        self.outcomes: Counter[str] = Counter()
        self.failures: list[Any] = []
        self.texts: dict[tuple[str, str], set[str]] = {}
        self.stop = False

    async def run(self, number: int) -> None:
        model, streams = ("one", "one", "two")[number % 3], number % 2 == 0
        count = 0
        while not self.stop:
            count += 1
            prompt = f"client {number} says {count % 3}"
            await self.ask(model, prompt, streams)

    async def ask(self, model: str, prompt: str, streams: bool) -> None:
        content = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": streams}
        try:
            async with self.client.post(self.url + "/v1/completions", json={**content, "ignore_eos": True}) as answer:
                body = await answer.text()
        except aiohttp.ClientError as error:
            self.failures.append((prompt, error))
            return
        if answer.status != 200:
            self.failures.append((prompt, answer.status, body))
            return
        if not streams:
            chunks = [json.loads(body)]
        else:
            events = [event.removeprefix("data: ") for event in body.split("\n\n") if event]
            chunks = [json.loads(event) for event in events if event != "[DONE]"]
        if "error" in chunks[-1]:
            begun = any("choices" in chunk for chunk in chunks)
            self.outcomes["broke off" if begun else "failed"] += 1
            if not begun:
                self.failures.append((prompt, body))
            return
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        self.texts.setdefault((model, prompt), set()).add(text)
        self.outcomes["whole"] += 1


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", ["one-0", "two-0"])
async def test_a_restart_under_load_fails_no_request_that_has_not_begun_to_stream(cluster, name, number):
    """Of a model with another replica, and of one without, whose requests are held meanwhile."""
    replicas, url = cluster
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LIMIT * 3)) as client:
        load = Load(client, url)
        for model in ("one", "two"):
            await load.ask(model, "warm up", False)
        assert not load.failures
        tasks = [asyncio.create_task(load.run(number)) for number in range(CLIENTS)]
        await asyncio.sleep(1)  # under load, that is
        await replicas.restart(name, number)
        async with asyncio.timeout(LIMIT):
            while not await is_healthy(client, url, replicas.running[name].url):
                await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        load.stop = True
        await asyncio.gather(*tasks)
    assert load.failures == []
    assert load.outcomes["whole"] > CLIENTS
    if number == signal.SIGTERM:
        assert not load.outcomes["broke off"], "a server that is told to end finishes what it streams"
    assert all(len(texts) == 1 for texts in load.texts.values()), "no answer of one request went to another"


async def is_healthy(client: aiohttp.ClientSession, router: str, url: str) -> bool:
    async with client.get(router + "/backends") as answer:
        return any(r["url"] == url and r["state"] == "healthy" for r in (await answer.json())["data"])

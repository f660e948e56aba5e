"""Clients that come and leave while replicas are killed, misbehave and drain: nothing fails, is mixed up, or stays."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter

import pytest
from fake_replica import FakeReplica, Running, replicas, routing, until

SECONDS = 4.0
CLIENTS = 40
MODES = ("reset_mid", "reset", "disconnect", "tear", "close_mid", "503", "502", "429", "headers_only", "garbage")


def events(body: bytes) -> list[bytes]:
    """A stream that nobody else gets."""
    who = json.loads(body)["messages"][0]["content"].encode()
    return [b'data: {"i": %d, "for": "%b"}\n\n' % (i, who) for i in range(30)]


async def client(router: Running, name: str, chance: random.Random, until_: float, outcomes: Counter[str]) -> None:
    count = 0
    while time.monotonic() < until_:
        count += 1
        text = f"{name} {count}"
        wanted = b"".join(events(json.dumps({"messages": [{"content": text}]}).encode()))
        async with router.ask(text=text) as answer:
            if chance.random() < 0.1:
                await answer.content.readany()
                answer.close()
                outcomes["left"] += 1
                continue
            body = await answer.read()
        begun, error, _ = body.partition(b'data: {"error"')
        assert answer.status == 200, body
        assert begun, "what has not begun is tried again"
        assert wanted.startswith(begun)
        assert error or begun == wanted
        outcomes["broke off" if error else "whole"] += 1


async def trouble(all_: list[FakeReplica], chance: random.Random, until_: float) -> None:
    """Of all but the first."""
    while time.monotonic() < until_:
        await asyncio.sleep(chance.uniform(0.02, 0.1))
        replica = chance.choice(all_[1:])
        match chance.choice(("kill", "mode", "mode", "drain")):
            case "kill":
                await replica.stop()
                await asyncio.sleep(chance.uniform(0, 0.2))
                await replica.start()
            case "mode":
                replica.mode = chance.choice(MODES)
                await asyncio.sleep(0.1)
                replica.mode = "stream"
            case "drain":
                replica.health = 503
                await asyncio.sleep(0.1)
                replica.health = 200


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", [1, 2])
async def test_chaos(seed):
    chance, outcomes = random.Random(seed), Counter[str]()
    async with replicas(*["stream"] * 4) as all_:
        for replica in all_:
            replica.answers = events
        async with routing(all_, max_losses=10) as router:
            await router.healthy(4)
            end = time.monotonic() + SECONDS
            await asyncio.gather(
                trouble(all_, chance, end - 1),
                *(client(router, f"client {number}", chance, end, outcomes) for number in range(CLIENTS)),
            )
            pool = router.router.pool
            await until(lambda: not pool.pending.total() and not router.router.busy, "all are done")
            assert not any(replica.in_flight for replica in pool)
            assert not pool.num_held("m")
            await until(lambda: not any(replica.open for replica in all_), "no replica works for nobody")
            assert await router.metric("lightvllm_router_failed_tries_total") > 0
        assert outcomes["whole"] > CLIENTS
        assert outcomes["left"]

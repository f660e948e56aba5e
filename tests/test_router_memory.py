"""The bound on bodies that are kept, in itself and as clients see it; and bodies that cannot be read."""

from __future__ import annotations

import asyncio
import io
import json
import logging

import pytest
from fake_replica import replicas, routing, until

from lightvllm.errors import ConfigError
from lightvllm.router.memory import Memory, Share
from lightvllm.router.settings import RouterSettings


def test_shares_are_bounded_together_and_given_back_once():
    memory = Memory(10)
    one, two = Share(memory), Share(memory)
    assert one.take(6)
    assert not two.take(5)
    assert two.take(4)
    assert memory.used == 10
    for _ in range(2):
        one.give_back()
    assert memory.used == 4
    two.give_back()
    assert memory.used == 0


def test_the_longest_body_must_fit():
    with pytest.raises(ConfigError, match="max_body_memory=99 must be at least 100"):
        RouterSettings(max_request_bytes=100, max_body_memory=99)


@pytest.mark.asyncio
async def test_held_bodies_are_bounded_and_their_room_comes_back():
    settings = {"models": ("m",), "max_request_bytes": 4000, "max_body_memory": 5000}
    async with replicas("stream") as (one,), routing([], **settings) as router:
        memory = router.router.proxy.memory
        held = asyncio.create_task(router.ask(text="x" * 3000).__aenter__())
        await until(lambda: router.router.pool.num_held("m") == 1, "it is held")
        kept = memory.used
        assert 3000 < kept < 4000
        assert await router.metric("lightvllm_router_body_bytes") == kept
        async with router.ask(text="x" * 3000) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert (await answer.json())["error"]["code"] == "router_overloaded"
        assert memory.used == kept, "what was taken of a refused one is given back"
        held.cancel()
        await until(lambda: memory.used == 0, "who leaves takes nothing along")
        assert not one.seen


@pytest.mark.asyncio
async def test_a_stream_keeps_no_body():
    async with replicas("stream") as (one,), routing([one]) as router:
        await router.healthy(1)
        one.gate = asyncio.Semaphore(1)
        async with router.ask(text="x" * 3000) as answer:
            await answer.content.readany()
            assert router.router.proxy.memory.used == 0
            for _ in one.events:
                one.gate.release()
            await answer.read()


@pytest.mark.asyncio
async def test_without_room_an_answer_is_passed_on_as_it_comes():
    text = "x" * 3000
    settings = {"max_request_bytes": 4000, "max_body_memory": 4000}
    async with replicas("echo") as (one,), routing([one], **settings) as router:
        await router.healthy(1)
        async with router.ask(text=text) as answer:
            assert answer.status == 200
            assert json.loads(await answer.read())["messages"][0]["content"] == text
        assert router.router.proxy.memory.used == 0


@pytest.mark.asyncio
async def test_a_body_that_cannot_be_read_is_the_clients_fault(caplog):
    caplog.set_level(logging.ERROR)
    async with replicas("json") as (one,), routing([one]) as router:
        await router.healthy(1)
        async with router.client.post(
            router.url + "/v1/completions", data=io.BytesIO(b"no gzip"), headers={"Content-Encoding": "gzip"}
        ) as answer:
            assert answer.status == 400
            assert "the body is not what its Content-Encoding says" in (await answer.json())["error"]["message"]
        assert not one.seen
    assert not [record for record in caplog.records if record.name.startswith("lightvllm")]


@pytest.mark.asyncio
async def test_who_leaves_amid_a_body_is_no_defect(caplog):
    caplog.set_level(logging.ERROR)
    async with replicas("json") as (one,), routing([one]) as router:
        await router.healthy(1)
        _, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + b"{" * 50)
        await until(lambda: router.router.proxy.memory.used == 50, "it has come")
        writer.transport.abort()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        await until(lambda: not router.router.busy, "it has been noticed")
        assert router.router.proxy.memory.used == 0
    assert not caplog.records

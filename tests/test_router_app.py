"""The router's own answers: models, keys, errors, queue, backends, metrics; and holding seen from outside."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from fake_replica import FakeReplica, replicas, routing, until

from lightvllm.keys import ApiKeys
from lightvllm.router.sources import StaticList


async def get(router, path, **more):
    async with router.client.get(router.url + path, **more) as answer:
        return answer.status, await answer.json()


async def post(router, content: bytes, path="/v1/completions", **more):
    async with router.client.post(router.url + path, data=io.BytesIO(content), **more) as answer:
        return answer.status, (await answer.json())["error"]


@pytest.mark.asyncio
async def test_models_are_the_union_and_requests_go_by_them():
    async with (
        replicas("json", "json") as (one, two),
        routing([StaticList([one.url, two.url])], models=("asleep",), models_interval=0.05) as router,
    ):
        one.models, two.models = ("a", "shared"), ("b", "shared")
        await until(lambda: router.router.pool.models == ["a", "asleep", "b", "shared"], "both have been asked")
        status, listed = await get(router, "/v1/models")
        assert (status, listed["object"]) == (200, "list")
        assert [card["id"] for card in listed["data"]] == ["a", "asleep", "b", "shared"]
        assert listed["data"][0]["owned_by"] == "0", "as the replica tells it"
        assert (await get(router, "/v1/models/b"))[1]["owned_by"] == "1"
        for model, name in (("a", "0"), ("b", "1")):
            async with router.ask(model) as answer:
                assert await answer.json() == {"from": name}
        assert (await get(router, "/v1/models/nothing"))[0] == 404


@pytest.mark.asyncio
async def test_a_replica_is_asked_again_what_it_serves():
    async with replicas("json") as (one,), routing([StaticList([one.url])], models_interval=0.05) as router:
        await until(lambda: router.router.pool.models == ["m"], "it has been asked")
        one.models = ("new",)
        await until(lambda: router.router.pool.models == ["new"], "it has been asked again")


@pytest.mark.asyncio
async def test_errors_have_openais_shape_and_say_what_to_do():
    async with (
        replicas("json", "json") as (one, two),
        routing([StaticList([f"a={one.url}", f"b={two.url}"])]) as router,
    ):
        await router.healthy(2)
        status, error = await post(router, b'{"model": "c"}')
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["message"] == "the model 'c' does not exist; known: a, b"
        assert await post(router, b'{"prompt": "x"}') == (
            400,
            {
                "message": "'model' is missing; known: a, b",
                "type": "invalid_request_error",
                "param": "model",
                "code": "missing_required_parameter",
            },
        )
        assert (await post(router, b"{"))[0] == 400
        assert (await post(router, b"{}", "/v1/nothing"))[0] == 404
        assert (await post(router, b"{}", "/sleep"))[0] == 404, "a replica's administration cannot be reached"
        status, error = await post(router, b"{}", "/v1/models")
        assert (status, error["message"]) == (405, "this path does not know the method; use GET,HEAD")
        long = await post(router, b'{"model": "%b"}' % (b"x" * 100_000))
        assert (long[0], len(long[1]["message"]) < 500) == (404, True)
        assert not one.seen
        assert not two.seen


@pytest.mark.asyncio
async def test_without_a_name_the_only_model_is_meant():
    async with replicas("json") as all_, routing(all_) as router:
        await router.healthy(1)
        async with router.client.post(router.url + "/tokenize", json={"prompt": "x"}) as answer:
            assert answer.status == 200


@pytest.mark.asyncio
async def test_the_size_and_the_time_of_a_body_are_bounded():
    async with replicas("json") as all_, routing(all_, max_request_bytes=1000, body_timeout=0.1) as router:
        await router.healthy(1)
        status, error = await post(router, b'{"model": "m", "x": "%b"}' % (b"x" * 2000))
        assert (status, error["code"]) == (413, "request_too_large")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = await reader.read()  # to the end: the connection is closed
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not come within 0.1 s" in answer
        writer.close()
        assert not all_[0].seen


@pytest.mark.asyncio
async def test_keys_are_asked_for_everywhere_but_at_the_probes():
    keys = ApiKeys(["first", "second"])
    async with replicas("json") as all_, routing(all_, keys) as router:
        await router.healthy(1)
        for path in ("/v1/models", "/backends", "/metrics", "/queue.json", "/nothing"):
            assert (await get(router, path))[0] == 401
        for path in ("/health", "/version"):
            assert (await get(router, path))[0] == 200
        for header in ("", "Bearer", "Bearer ", "Bearer third", "Basic first", "first", "Bearer first second"):
            async with router.ask(headers={"Authorization": header}) as answer:
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                assert (await answer.json())["error"]["code"] == "invalid_api_key"
        assert not all_[0].seen
        for header in ("Bearer first", "bearer second", "Bearer  second"):
            async with router.ask(headers={"Authorization": header}) as answer:
                assert answer.status == 200
    async with replicas("json") as all_, routing(all_, keys, metrics_without_key=True) as router:
        assert await router.metric("lightvllm_router_pending_requests") == 0
        assert (await get(router, "/queue.json"))[0] == 200
        assert (await get(router, "/backends"))[0] == 401


@pytest.mark.asyncio
async def test_requests_for_a_model_without_replicas_are_held_until_one_comes():
    replica = FakeReplica(mode="json", name="late")
    await replica.start()
    await replica.stop()
    try:
        async with routing([StaticList([f"m={replica.url}"])], affinity_bytes=0) as router:
            asked = [asyncio.create_task(router.ask(text=str(number)).__aenter__()) for number in range(5)]
            await until(lambda: router.router.pool.num_held("m") == 5, "all are held")
            assert await router.metric('lightvllm_router_pending_requests{model="m"}') == 5
            assert await router.metric('lightvllm_router_waiting_requests{model="m"}') == 5
            assert (await get(router, "/queue.json?model=m"))[1] == {"pending": 5, "waiting": 5, "in_flight": 0}
            asked[3].cancel()
            await until(lambda: router.router.pool.num_held("m") == 4, "a client has given up")
            await replica.start()
            for number in (0, 1, 2, 4):
                answer = await asked[number]
                assert (answer.status, await answer.json()) == (200, {"from": "late"})
            assert len(replica.seen) == 4, "nothing was sent for the one who gave up"
            await until(lambda: not router.router.pool.pending.total(), "all are done")
            assert (await get(router, "/queue.json"))[1] == {
                "models": {"m": {"pending": 0, "waiting": 0, "in_flight": 0}}
            }
            assert await router.metric("lightvllm_router_held_requests_total") == 5
            assert await router.metric("lightvllm_router_hold_seconds_count") == 5
    finally:
        await replica.stop()


@pytest.mark.asyncio
async def test_held_requests_are_bounded_in_number_and_time():
    async with routing([StaticList([])], models=("m",), max_held=1, hold_timeout=0.2) as router:
        first = asyncio.create_task(router.ask().__aenter__())
        await until(lambda: router.router.pool.num_held("m") == 1, "it is held")
        async with router.ask() as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert "1 are waiting already" in (await answer.json())["error"]["message"]
        answer = await first
        assert answer.status == 503
        assert "within 0.2 s" in (await answer.json())["error"]["message"]


@pytest.mark.asyncio
async def test_health_and_return_of_replicas():
    async with replicas("json", "json") as (one, two), routing([one, two], eject_after=1, healthy_after=2) as router:
        await router.healthy(2)
        one.health = 503
        await router.healthy(1)
        _, listed = await get(router, "/backends")
        assert [(entry["state"], entry["reason"]) for entry in listed["data"]] == [
            ("unready", "/health says 503"),
            ("healthy", ""),
        ]
        for number in range(5):
            async with router.ask(text=str(number)) as answer:
                assert await answer.json() == {"from": "1"}
        one.health = 500
        await until(lambda: router.router.pool.replicas[0].state == "ejected", "it is ejected")
        one.health = 200
        await router.healthy(2)
        two.health = None
        await two.stop()
        await router.healthy(1)
        assert (await get(router, "/backends"))[1]["data"][1]["reason"].startswith("cannot connect: ")
        assert await router.metric("lightvllm_router_ejections_total") == 2
        two.health = 200
        await two.start()
        await router.healthy(2)
        assert (await get(router, "/health")) == (200, {"status": "ready"})


@pytest.mark.asyncio
async def test_a_draining_replica_finishes_what_it_has():
    async with replicas("stream", "stream") as all_, routing(all_) as router:
        await router.healthy(2)
        for replica in all_:
            replica.gate = asyncio.Semaphore(1)
        async with router.ask() as answer:
            await answer.content.readany()
            busy = next(replica for replica in all_ if replica.open)
            busy.health = 503
            await router.healthy(1)
            busy.gate.release()
            for replica in all_:
                for _ in range(100):
                    replica.gate.release()
            rest = await answer.read()
            assert rest == b"".join(busy.events[1:])
        for number in range(4):
            async with router.ask(text=str(number)) as answer:
                await answer.read()
        assert len(busy.seen) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("told", ["load", "metrics"])
async def test_what_a_replica_is_busy_with_elsewhere_counts(told):
    async with replicas("json", "json") as (one, two), routing([one, two], affinity_bytes=0) as router:
        if told == "load":
            one.load = {"num_running": 3, "num_waiting": 4, "other": 1}
        else:
            one.load = {"server_load": 99}
            one.metrics = 'vllm:num_requests_running{model_name="a{b"} 3.0\nvllm:num_requests_waiting 4\nx 9\n'
        await router.healthy(2)
        await until(lambda: router.router.pool.replicas[0].load == 7, "it is known")
        for _ in range(6):
            async with router.ask() as answer:
                assert await answer.json() == {"from": "1"}
        assert json.loads(two.seen[0][2])["model"] == "m"

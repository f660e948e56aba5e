"""Through the router to replicas that misbehave: retries before the first byte, none after, nothing mixed up."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random

import aiohttp
import pytest
from fake_replica import FakeReplica, replicas, routing, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import LIMIT

from lightvllm.router.balance import capacity
from lightvllm.router.events import WholeEvents
from lightvllm.router.replies import ApiError

BAD = ("disconnect", "reset", "headers_only", "short", "giant_header", "garbage", "429", "502", "503", "refuse")


async def ask(router, **more):
    """Status and body."""
    async with router.ask(**more) as answer:
        return answer.status, await answer.read()


async def broken(bad: list[FakeReplica]) -> None:
    """Replicas whose mode is "refuse" no longer listen."""
    for replica in bad:
        if replica.mode == "refuse":
            await replica.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", BAD)
@pytest.mark.parametrize("good", ["stream", "json"])
async def test_what_has_not_begun_is_tried_on_another_replica(mode, good):
    async with replicas(mode, good) as (bad, well), routing([bad, well], affinity_bytes=0) as router:
        await router.healthy(2)
        await broken([bad])
        for number in range(200):
            status, body = await ask(router)
            assert status == 200
            assert body == (b"".join(well.events) if good == "stream" else b'{"from": "1"}')
            if bad.seen or (mode == "refuse" and number > 8):  # the first choice is a matter of chance
                break
        if mode != "refuse":  # of which a probe may have been the first to know
            assert bad.seen
            assert await router.metric("lightvllm_router_failed_tries_total") > 0


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(bad=st.lists(st.sampled_from([*BAD, "silent"]), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_request_that_has_not_begun_to_stream_never_fails_while_one_good_replica_exists(bad, seed):
    async def check() -> None:
        modes = [*bad, "stream"]
        random.Random(seed).shuffle(modes)
        async with (
            replicas(*modes) as all_,
            routing(all_, header_timeout=0.1, max_losses=10, max_tries=12) as router,
        ):
            await router.healthy(len(all_))
            await broken(all_)
            good = all_[modes.index("stream")]
            answers = await asyncio.gather(*(ask(router, text=str(number)) for number in range(6)))
            assert answers == [(200, b"".join(good.events))] * 6

    asyncio.run(check())


@pytest.mark.asyncio
async def test_a_request_without_a_good_replica_ends_with_what_the_last_one_said():
    for mode, expected in (("429", 429), ("502", 502), ("disconnect", 502), ("silent", 504)):
        async with replicas(mode) as all_, routing(all_, header_timeout=0.1, max_tries=2, eject_after=9) as router:
            await router.healthy(1)
            async with router.ask() as answer:
                assert answer.status == expected
                if mode == "429":
                    assert (answer.headers["Retry-After"], await answer.read()) == ("1", b"busy")
                elif expected != 502 or mode == "disconnect":
                    assert "2 tries failed" in (await answer.json())["error"]["message"]


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["400", "404", "500", "429 without"])
async def test_other_errors_are_the_clients_and_are_passed_on(mode):
    async with replicas(mode) as (bad,), routing([bad]) as router:
        await router.healthy(1)
        status, body = await ask(router)
        assert (str(status), len(bad.seen)) == (mode[:3], 1)
        assert body in (b"error", b"busy")


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["reset_mid", "close_mid", "stall_mid", "tear"])
async def test_a_stream_that_breaks_off_ends_with_an_error_event(mode):
    """After whole events only, with a complete transfer, and not tried again."""
    async with replicas(mode, mode) as all_, routing(all_, idle_timeout=0.2) as router:
        await router.healthy(2)
        status, body = await ask(router)
        assert status == 200
        *events, last, rest = body.split(b"\n\n")
        assert rest == b""
        assert [event + b"\n\n" for event in events] in (replica.events[:2] for replica in all_)
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert (error["code"], error["type"]) == ("stream_broken", "server_error")
        assert sum(len(replica.seen) for replica in all_) == 1
        assert await router.metric('lightvllm_router_requests_total{backend="') == 1
        assert not any(replica.in_flight for replica in router.router.pool)


@pytest.mark.asyncio
async def test_an_answer_that_is_no_stream_is_complete_or_fails():
    """Beyond what is kept for a retry it is passed on as it comes, and its connection ends early when it breaks off."""
    async with replicas("short") as all_, routing(all_, max_buffered_bytes=2) as router:
        await router.healthy(1)
        with pytest.raises(aiohttp.ClientPayloadError):
            await ask(router)


@pytest.mark.asyncio
async def test_a_large_body_and_answer_pass_unchanged():
    async with replicas("echo") as all_, routing(all_, max_buffered_bytes=1000) as router:
        await router.healthy(1)
        content = b'{"model": "m", "prompt": "%b"}' % (b"x" * 3_000_000)
        async with router.client.post(router.url + "/v1/completions", data=io.BytesIO(content)) as answer:
            assert (answer.status, await answer.read()) == (200, content)


@pytest.mark.asyncio
async def test_a_body_is_sent_as_it_came():
    async with replicas("echo") as all_, routing(all_) as router:
        await router.healthy(1)
        content = b'{ "model" : "m",\n "x": 1.0, "x": 2e400, "\\u00e4": "\\ud83d\\ude00" }'
        async with router.client.post(router.url + "/v1/completions?a=%20b&c", data=content) as answer:
            assert await answer.read() == content
        assert all_[0].seen[0][0] == "/v1/completions?a=%20b&c"


@pytest.mark.asyncio
async def test_a_compressed_body_is_sent_as_what_it_holds():
    async with replicas("echo") as all_, routing(all_, max_request_bytes=10_000) as router:
        await router.healthy(1)
        for size, expected in ((100, 200), (100_000, 413)):
            content = b'{"model": "m", "prompt": "%b"}' % (b"x" * size)
            sent = {"data": gzip.compress(content), "headers": {"Content-Encoding": "gzip"}}
            async with router.client.post(router.url + "/v1/completions", **sent) as answer:
                assert answer.status == expected
                assert expected == 413 or await answer.read() == content
        ((_, headers, _),) = all_[0].seen
        assert "content-encoding" not in headers


@pytest.mark.asyncio
async def test_nothing_of_the_clients_authorization_or_connection_goes_upstream():
    async with replicas("json") as (replica,), routing([replica], backend_key="own") as router:
        await router.healthy(1)
        sent = {
            "Authorization": "Bearer client",
            "X-Api-Key": "client",
            "Api-Key": "client",
            "Cookie": "session=client",
            "Proxy-Authorization": "client",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "client",
            "X-Forwarded-For": "client",
            "Forwarded": "for=client",
            "Accept-Encoding": "gzip",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "X-Request-Id": "my-id.1",
            "OpenAI-Organization": "kept",
        }
        async with router.ask(headers=sent) as answer:
            assert answer.headers["X-Request-Id"] == "my-id.1"
        ((_, headers, _),) = replica.seen
        assert headers["authorization"] == "Bearer own"
        assert "client" not in "".join(headers.values())
        assert headers["x-request-id"] == "my-id.1"
        assert headers["traceparent"] == sent["traceparent"]
        assert headers["openai-organization"] == "kept"
        assert (headers["x-forwarded-for"], headers["accept-encoding"]) == ("127.0.0.1", "identity")
        async with router.ask(headers={"X-Request-Id": "bad id"}) as answer:
            made = answer.headers["X-Request-Id"]
        assert len(made) == 32
        assert replica.seen[1][1]["x-request-id"] == made


@pytest.mark.asyncio
@pytest.mark.parametrize("when", ["before the headers", "in the stream"])
async def test_a_client_who_leaves_ends_its_request_upstream(when):
    mode = "silent" if when == "before the headers" else "stream"
    async with replicas(mode) as (replica,), routing([replica]) as router:
        await router.healthy(1)
        replica.gate = asyncio.Semaphore(2)
        if when == "before the headers":
            task = asyncio.create_task(ask(router))
            await until(lambda: replica.open, "the request arrives")
            task.cancel()
        else:
            async with router.ask() as answer:
                assert await answer.content.readany()
                answer.close()
        await until(lambda: replica.left == 1 and not replica.open, "the replica sees it")
        await until(lambda: not router.router.pool.pending.total(), "the router has forgotten it")
        assert await router.metric('lightvllm_router_requests_total{backend="') == 1
        assert not any(r.in_flight for r in router.router.pool)
        assert [r.state for r in router.router.pool] == ["healthy"], "it is no fault of the replica"


@pytest.mark.asyncio
async def test_chunks_are_passed_on_as_they_come():
    async with replicas("stream") as (replica,), routing([replica]) as router:
        await router.healthy(1)
        replica.gate = asyncio.Semaphore(0)
        async with asyncio.TaskGroup() as group:
            opened = group.create_task(router.ask().__aenter__())
            await until(lambda: replica.open, "the request arrives")
            replica.gate.release()
            answer = await opened
        for event in replica.events:
            assert await answer.content.readany() == event
            replica.gate.release()
        assert await answer.content.readany() == b""
        answer.release()


@pytest.mark.asyncio
async def test_a_slow_client_slows_its_replica_and_takes_no_memory():
    async with replicas("stream") as (replica,), routing([replica]) as router:
        await router.healthy(1)
        event = b"data: " + b"x" * 100_000 + b"\n\n"
        replica.events = [event] * 1000  # 100 MB, more than all buffers on the way
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
        body = b'{"model": "m"}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: replica.sent, "something was sent")
        before = -1
        while before != (before := replica.sent):  # until everything on the way is full
            await asyncio.sleep(0.1)
        assert before < 30_000_000
        assert replica.open == 1
        writer.close()
        await until(lambda: replica.left == 1, "the replica sees that the client has left")


@pytest.mark.asyncio
@pytest.mark.parametrize("lost", [aiohttp.ClientConnectionError("Connection lost"), ConnectionResetError()])
async def test_a_connection_that_the_client_loses_is_no_failure_of_the_replica(lost, monkeypatch):
    """However the web framework says so: once something was passed on, nothing is tried again."""

    async def write(self, chunk: bytes) -> None:
        raise lost

    async with replicas("stream", "stream") as all_, routing(all_) as router:
        await router.healthy(2)
        monkeypatch.setattr("aiohttp.web.StreamResponse.write", write)
        with pytest.raises(aiohttp.ClientError):
            await ask(router)
        assert sum(len(replica.seen) for replica in all_) == 1
        assert [replica.failures for replica in router.router.pool] == [0, 0]


@pytest.mark.asyncio
async def test_the_last_event_waits_for_no_client_without_end():
    class Unread:
        prepared = True

        async def write(self, chunk: bytes) -> None:
            await asyncio.Event().wait()

    async with replicas("stream") as (replica,), routing([replica], idle_timeout=0.05) as router:
        error = ApiError(502, "it broke off")
        async with asyncio.timeout(LIMIT):
            with pytest.raises(aiohttp.ClientConnectionResetError, match="took nothing"):
                await router.router.proxy._end_broken(None, Unread(), WholeEvents(), error)


@pytest.mark.asyncio
async def test_every_connection_header_names_what_is_for_one_hop():
    async with replicas("echo") as (replica,), routing([replica]) as router:
        await router.healthy(1)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rpartition(":")[2]))
        body = b'{"model": "m"}'
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Connection: close", "Connection: X-Hop", "X-Hop: 1"]
        writer.write("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        assert (await reader.read()).endswith(body)
        writer.close()
        assert "x-hop" not in replica.seen[0][1]


@pytest.mark.asyncio
async def test_a_hundred_streams_at_once_are_complete_in_order_and_not_mixed_up():
    async with replicas("stream", "stream", "stream") as all_, routing(all_) as router:
        await router.healthy(3)

        def events(body: bytes) -> list[bytes]:
            who = json.loads(body)["messages"][0]["content"].encode()
            return [
                b'data: {"i": %d, "for": "%b", "pad": "%b"}\n\n' % (i, who, b"p" * (i * 37 % 500)) for i in range(200)
            ]

        for replica in all_:
            replica.answers, replica.gate = events, asyncio.Semaphore(0)
        asked = [asyncio.create_task(ask(router, text=f"client {number}")) for number in range(100)]
        await until(lambda: sum(replica.open for replica in all_) == 100, "all are there")
        assert max(replica.open for replica in all_) <= capacity(99, 3, 1.25, 4), "bounded load"
        for replica in all_:
            gate, replica.gate = replica.gate, None
            for _ in range(100):
                gate.release()
        for number, (status, body) in enumerate(await asyncio.gather(*asked)):
            own = json.dumps({"messages": [{"content": f"client {number}"}]}).encode()
            assert (status, body) == (200, b"".join(events(own)))


@pytest.mark.asyncio
async def test_conversations_stay_with_their_replica_also_when_others_come_and_go():
    async with replicas("json", "json", "json", "json") as all_, routing(all_) as router:
        await router.healthy(4)

        async def homes() -> list[bytes]:
            return [(await ask(router, text=f"conversation {number}"))[1] for number in range(40)]

        before = await homes()
        assert before == await homes()
        assert len(set(before)) == 4
        await all_[2].stop()
        after = await homes()
        assert all(old == new for old, new in zip(before, after, strict=True) if old != b'{"from": "2"}')


@pytest.mark.asyncio
async def test_a_kept_connection_that_the_replica_has_closed_is_no_failure():
    async with replicas("json") as (replica,), routing([replica], eject_after=1) as router:
        await router.healthy(1)
        assert (await ask(router))[0] == 200
        await replica.stop()
        await replica.start()
        assert (await ask(router))[0] == 200
        assert [(r.state, r.ejections) for r in router.router.pool] == [("healthy", 0)]


@pytest.mark.asyncio
async def test_500s_are_no_reason_to_eject_and_no_reason_to_trust():
    async with replicas("500", "json") as (bad, _), routing([bad], eject_after=2) as router:
        await router.healthy(1)
        (replica,) = router.router.pool
        replica.failures = 1
        for _ in range(3):
            assert (await ask(router))[0] == 500
        assert (replica.state, replica.failures) == ("healthy", 1)
        bad.mode = "json"
        assert (await ask(router))[0] == 200
        assert replica.failures == 0


@pytest.mark.asyncio
async def test_a_request_that_kills_replicas_does_not_kill_them_all():
    async with replicas(*["reset"] * 6) as all_, routing(all_, max_losses=2, eject_after=9) as router:
        await router.healthy(6)
        status, body = await ask(router)
        assert (status, json.loads(body)["error"]["code"]) == (502, "bad_gateway")
        assert sum(bool(replica.seen) for replica in all_) == 2

"""Rate limits: never more than allowed, everything that is allowed, and bounded memory."""

from __future__ import annotations

import random

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from server_process import scripted

from lightvllm.server.rate_limit import Buckets, RateLimiter
from lightvllm.server.settings import RateLimit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_evenly():
    clock = Clock()
    buckets = Buckets(RateLimit(count=3, seconds=60), 10, clock)
    assert [buckets.take("a").remaining for _ in range(3)] == [2, 1, 0]
    refused = buckets.take("a")
    assert (refused.allowed, refused.remaining) == (False, 0)
    assert refused.retry_after == pytest.approx(20, rel=1e-2)
    clock.now += 19
    assert not buckets.take("a").allowed
    clock.now += 1
    assert buckets.take("a").allowed
    assert not buckets.take("a").allowed
    assert buckets.take("b").allowed, "another client has a bucket of its own"
    clock.now += 60
    assert [buckets.take("a").allowed for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(("count", "seconds"), [(1, 1.0), (7, 1.0), (60, 60.0), (1000, 3600.0)])
def test_against_counting(count, seconds):
    """In any window, at most a burst and what was earned in it; and a client that waits as told is never refused."""
    clock, dice = Clock(), random.Random(0)
    buckets = Buckets(RateLimit(count=count, seconds=seconds), 10, clock)
    passed: list[float] = []
    for _ in range(5 * count + 200):
        verdict = buckets.take("a")
        if verdict.allowed:
            passed.append(clock.now)
        elif dice.random() < 0.5:
            clock.now += verdict.retry_after
            assert buckets.take("a").allowed
            passed.append(clock.now)
        clock.now += dice.random() * seconds / count
    for start in range(0, len(passed), max(1, len(passed) // 50)):
        for end in range(start, len(passed)):
            earned = (passed[end] - passed[start]) / seconds * count
            assert end - start + 1 <= count + earned + 0.01


def test_memory_is_bounded_and_who_is_full_is_forgotten():
    clock = Clock()
    buckets = Buckets(RateLimit(count=2, seconds=10), 100, clock)
    for number in range(1000):
        buckets.take(f"client-{number}")
    assert len(buckets) == 100
    clock.now += 11
    for _ in range(60):
        buckets.take("late")
    assert len(buckets) == 1


def client(limit: RateLimit, address: tuple[str, int] = ("10.0.0.1", 1)) -> TestClient:
    app = FastAPI()

    @app.get("/v1/x")
    @app.get("/health")
    def x() -> int:
        return 1

    return TestClient(RateLimiter(app, limit, 10), client=address)


def test_answers_say_how_one_stands():
    c = client(RateLimit(count=2, seconds=60))
    first, second, third = (c.get("/v1/x") for _ in range(3))
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert [a.headers["x-ratelimit-remaining-requests"] for a in (first, second, third)] == ["1", "0", "0"]
    assert (third.status_code, third.headers["retry-after"]) == (429, "30")
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    health = c.get("/health")
    assert health.status_code == 200
    assert "x-ratelimit-limit-requests" not in health.headers


def test_one_ipv6_network_is_one_client():
    limit = RateLimit(count=1, seconds=60)
    c = client(limit, ("2001:db8::1", 1))
    assert c.get("/v1/x").status_code == 200
    other = TestClient(c.app, client=("2001:db8::ffff:2", 1))
    assert other.get("/v1/x").status_code == 429
    assert TestClient(c.app, client=("2001:db8:0:1::1", 1)).get("/v1/x").status_code == 200


@pytest.mark.parametrize(("trusted", "statuses"), [("127.0.0.1", [200, 200, 429]), ("192.0.2.1", [200, 429, 429])])
def test_who_is_counted_behind_a_proxy(trusted, statuses):
    """``X-Forwarded-For`` is believed from the proxies that are named, and from nobody else."""
    settings = {"rate_limit": {"count": 1, "seconds": 3600}}
    with scripted(server=settings, listen={"forwarded_allow_ips": trusted}) as server:
        address = server.ready()
        answers = [
            httpx.get(f"{address}/v1/stream?n=1", headers={"X-Forwarded-For": client})
            for client in ("198.51.100.1", "198.51.100.2", "198.51.100.2")
        ]
    assert [answer.status_code for answer in answers] == statuses


def test_keys_are_counted_apart():
    settings = {"rate_limit": {"count": 1, "seconds": 3600}, "api_keys": ["one", "two"]}
    with scripted(server=settings) as server:
        address = server.ready()
        keys = ("one", "two", "one", "wrong")
        answers = [httpx.get(f"{address}/v1/stream?n=1", headers={"Authorization": f"Bearer {key}"}) for key in keys]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 401]
    assert answers[2].headers["retry-after"] == "3600"

"""Holding, release in order, ejection and return; without HTTP."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from lightvllm.errors import ConfigError
from lightvllm.router.pool import Pool, Snapshot
from lightvllm.router.replica import Target, check_url, is_private
from lightvllm.router.replies import ApiError
from lightvllm.router.settings import RouterSettings


def pool(*urls: str, healthy: bool = True, models: tuple[str, ...] | None = ("m",), **settings) -> Pool:
    made = Pool(RouterSettings(**{"models": ("m",), "max_ejection": 0, **settings}))
    made.update("test", snapshot(*urls, models=models))
    if healthy:
        for replica in made:
            made.probed(replica)
    return made


def snapshot(*urls: str, models: tuple[str, ...] | None = ("m",), ready: bool = True) -> Snapshot:
    return Snapshot(tuple(Target(name=url, url=url, models=models, ready=ready) for url in urls))


async def waiting(made: Pool, count: int, done: list[int] | None = None, key: bytes | None = None):
    """So many requests that wait, and the order in which they are let through."""
    done = [] if done is None else done

    async def one(number: int) -> object:
        request = made.enter("m", key)
        try:
            replica = await made.acquire(request)
            done.append(number)
            return replica
        finally:
            made.leave(request)

    before = made.num_held("m")
    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    while made.num_held("m") < before + count:
        await asyncio.sleep(0)
    return tasks, done


@pytest.mark.asyncio
async def test_requests_are_held_and_released_in_order_of_arrival():
    made = pool()
    tasks, done = await waiting(made, 10)
    assert (made.num_held("m"), made.pending["m"]) == (10, 10)
    made.update("test", snapshot("http://a"))
    await asyncio.sleep(0)
    assert done == [], "a replica that has not been asked gets nothing"
    made.probed(made.replicas[0])
    await asyncio.gather(*tasks)
    assert done == list(range(10))
    assert (made.num_held("m"), made.pending["m"], made.replicas[0].in_flight) == (0, 0, 10)


@pytest.mark.asyncio
async def test_a_full_replica_holds_the_others_and_a_newcomer_does_not_overtake():
    made = pool("http://a", max_in_flight=2)
    request = made.enter("m", None)
    first, second = await made.acquire(request), await made.acquire(request)
    assert first is second
    tasks, done = await waiting(made, 3)
    made.release(first)
    late, _ = await waiting(made, 1, done=[])
    for _ in range(3):
        await asyncio.sleep(0)
        made.release(first)
    await asyncio.gather(*tasks)
    assert done == [0, 1, 2]
    await asyncio.gather(*late)
    assert first.in_flight == 2


@pytest.mark.asyncio
async def test_a_request_that_tries_again_goes_before_those_that_came_later():
    made = pool()
    early = made.enter("m", None)
    tasks, done = await waiting(made, 2)

    async def again() -> None:
        await made.acquire(early)
        done.append("early")

    retried = asyncio.create_task(again())
    await asyncio.sleep(0)
    made.update("test", snapshot("http://a"))
    made.probed(made.replicas[0])
    await asyncio.gather(retried, *tasks)
    assert made.replicas[0].in_flight == 3
    assert done == ["early", 0, 1]


@pytest.mark.asyncio
async def test_who_gives_up_while_held_loses_nothing_for_the_others():
    made = pool(max_in_flight=1)
    tasks, done = await waiting(made, 4)
    tasks[0].cancel()
    made.update("test", snapshot("http://a"))
    made.probed(made.replicas[0])  # grants to the second, who gives up in the same moment
    tasks[1].cancel()
    await asyncio.sleep(0)
    replica = await tasks[2]
    assert (done, replica.in_flight, made.num_held("m")) == ([2], 1, 1)
    made.release(replica)
    await tasks[3]
    results = await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert (replica.in_flight, made.pending["m"], made.num_held("m")) == (1, 0, 0)


@pytest.mark.asyncio
async def test_the_queue_and_the_wait_are_bounded():
    made = pool(max_held=2)
    tasks, _ = await waiting(made, 2)
    with pytest.raises(ApiError, match="2 are waiting already") as refused:
        await made.acquire(made.enter("m", None))
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "5")
    for task in tasks:
        task.cancel()
    for settings in ({"hold_timeout": 0.01}, {"hold_timeout": 0}, {"max_held": 0}):
        made = pool(**settings)
        with pytest.raises(ApiError, match="no replica of 'm' could take the request") as refused:
            await made.acquire(made.enter("m", None))
        assert (refused.value.status, refused.value.code, made.num_held("m")) == (503, "no_replica", 0)


@pytest.mark.asyncio
async def test_those_already_tried_come_last():
    made = pool("http://a", "http://b")
    one, two = made
    request = made.enter("m", b"key")
    assert await made.acquire(request, [one]) is two
    assert await made.acquire(request, [two]) is one
    assert await made.acquire(request, [one, two]) in (one, two)
    two.busy_until = float("inf")
    assert await made.acquire(request) is one
    assert await made.acquire(request, [one]) is two


def test_failures_in_a_row_eject_and_good_probes_bring_back():
    ejected = []
    made = Pool(RouterSettings(eject_after=3, healthy_after=2, max_ejection=0), on_eject=ejected.append)
    made.update("test", snapshot("http://a"))
    (replica,) = made
    assert not replica.usable
    made.probed(replica)
    made.failed(replica, "why")
    made.failed(replica, "why")
    made.succeeded(replica)
    made.failed(replica, "why")
    made.failed(replica, "why")
    assert replica.usable
    made.failed(replica, "why")
    assert (replica.state, replica.reason, ejected) == ("ejected", "why", [replica])
    made.probed(replica)
    assert not replica.usable
    made.failed(replica, "still")
    made.probed(replica)
    assert not replica.usable, "successes are counted in a row"
    made.probed(replica)
    assert replica.usable
    made.failed(replica, "refused", at_once=True)
    assert not replica.usable


def test_one_that_fails_after_each_return_stays_out_longer():
    made = pool("http://a", max_ejection=60, healthy_after=1)
    (replica,) = made
    pauses = []
    for _ in range(8):
        made.failed(replica, "refused", at_once=True)
        loop_time = replica.out_until
        made.probed(replica)
        assert not replica.usable, "not before its time"
        replica.out_until = 0
        made.probed(replica)
        assert replica.usable
        pauses.append(loop_time)
    steps = [round(later - earlier) for earlier, later in itertools.pairwise(pauses)]
    assert steps == [1, 2, 4, 8, 16, 28, 0]
    made.succeeded(replica)
    assert replica.ejections == 0


def test_a_draining_or_unready_replica_gets_nothing_and_is_not_ejected():
    made = pool("http://a", healthy_after=1)
    (replica,) = made
    made.unready(replica, "/health says 503")
    assert (replica.state, replica.usable, replica.ejections) == ("unready", False, 0)
    made.probed(replica)
    assert replica.usable
    made.update("test", snapshot("http://a", ready=False))
    assert not replica.usable
    assert replica.describe()["state"] == "not ready"
    made.update("test", snapshot("http://a"))
    assert replica.usable


def test_sources_come_and_go_and_what_is_the_same_stays():
    came, went = [], []
    made = Pool(RouterSettings(models=("always",)), added=came.append, removed=went.append)
    made.update("1", snapshot("http://a", "http://b"))
    made.update("2", Snapshot((Target(name="other", url="http://b"),), frozenset({"known"})))
    assert [replica.name for replica in came] == ["http://a", "http://b"], "one replica, told by two sources"
    assert made.models == ["always", "known", "m"]
    (a, _) = made
    made.update("1", snapshot("http://a"))
    assert made.replicas[0] is a
    assert [replica.name for replica in went] == ["http://b"]
    assert made.replicas[1].name == "other"
    assert not went[0].usable
    made.serves(made.replicas[1], {"new": {"id": "new", "extra": 1}})
    assert made.models == ["always", "known", "m", "new"]
    assert made.card("new")["extra"] == 1
    assert made.card("always") == {"id": "always", "object": "model", "created": 0, "owned_by": "lightvllm"}
    made.serves(a, {"surprise": {"id": "surprise"}})
    assert not made.knows("surprise"), "what was named is what counts"


@pytest.mark.parametrize(
    "url",
    ["", "a", "ftp://a", "http://", "http://a:0", "http://a:b", "http://a b", "http://u:p@a", "http://a?x", "//a"],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError) as refused:
        check_url(url)
    assert "u:p" not in str(refused.value)


def test_addresses():
    assert check_url("http://a:8000/") == "http://a:8000"
    assert check_url("https://[::1]:8000/base/") == "https://[::1]:8000/base"
    private = ["https://far", "http://127.0.0.9:1", "http://[::1]", "http://localhost"]
    assert [url for url in [*private, "http://far", "http://10.0.0.1"] if is_private(url)] == private


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_tries": 0}, "max_tries=0 must be at least 1"),
        ({"balance_factor": 0.5}, "balance_factor=0.5 must be at least 1"),
        ({"hold_timeout": float("nan")}, "hold_timeout=nan must be at least 0"),
        ({"idle_timeout": 0}, "idle_timeout=0 must be more than 0 seconds"),
        ({"paths": ("v1",)}, "path 'v1' must begin with a slash"),
        ({"models": ("",)}, "must not be empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        RouterSettings(**wrong)


@pytest.mark.asyncio
async def test_models_of_one_replica_are_served_in_order_of_arrival():
    made = pool(models=("a", "b"), max_in_flight=1)
    done: list[str] = []

    async def one(model: str) -> None:
        replica = await made.acquire(made.enter(model, None))
        done.append(model)
        made.release(replica)

    tasks = []
    for model in ("a", "b", "a", "b", "b", "a"):
        tasks.append(asyncio.create_task(one(model)))
        await asyncio.sleep(0)
    assert (made.num_held("a"), made.num_held("b")) == (3, 3)
    made.update("test", snapshot("http://x", models=("a", "b")))
    made.probed(made.replicas[0])
    await asyncio.gather(*tasks)
    assert done == ["a", "b", "a", "b", "b", "a"]
    assert (made.num_held("a"), made.num_held("b"), made.replicas[0].in_flight) == (0, 0, 0)

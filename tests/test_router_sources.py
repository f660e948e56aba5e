"""A list, a file that changes, names that resolve to others; mistakes at the start and later."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket

import pytest
from fake_replica import replicas, routing, until

from lightvllm.errors import ConfigError
from lightvllm.router.pool import Pool, Snapshot
from lightvllm.router.settings import RouterSettings
from lightvllm.router.sources import BackendsFile, CheckedUrl, DnsName, StaticList, follow, from_options


def shown(snapshot: Snapshot) -> list[tuple[str, str, tuple[str, ...] | None]]:
    return [(target.name, target.url, target.models) for target in snapshot.targets]


async def first(source) -> Snapshot:
    async with contextlib.aclosing(source.snapshots()) as snapshots:
        return await anext(snapshots)


@pytest.mark.asyncio
async def test_a_list():
    source = StaticList(["http://a:1", "m=http://b:2/base/", "m,n=https://[::1]:3", "org/m:tag=http://c"])
    assert shown(await first(source)) == [
        ("a:1", "http://a:1", None),
        ("b:2/base", "http://b:2/base", ("m",)),
        ("[::1]:3", "https://[::1]:3", ("m", "n")),
        ("c", "http://c", ("org/m:tag",)),
    ]


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        (["a:1"], "'a:1' is no address; expected http://host:port"),
        (["=http://a"], "names no model before '='"),
        (["http://a", "http://a/"], "url http://a is given more than once"),
        (["m=ftp://a"], "'ftp://a' is no address"),
        (["http://user:secret@a"], "backend a: put its key into --backend-api-key-file"),
        (["dns+http://"], "is no address"),
        (["dns+ftp://a"], "is no address"),
    ],
)
def test_mistakes_in_a_list(backends, words):
    with pytest.raises(ConfigError, match=words):
        from_options(backends)


def test_a_key_is_not_sent_where_it_could_be_read():
    check = CheckedUrl(has_key=True)
    assert check("https://far") == "https://far"
    assert check("http://127.0.0.1:1") == "http://127.0.0.1:1"
    for backend in ("http://far", "m=http://10.0.0.1", "dns+http://far"):
        with pytest.raises(ConfigError, match="would cross the network in the clear"):
            from_options([backend], check)
    assert CheckedUrl(has_key=True, plaintext=True)("http://far") == "http://far"
    assert CheckedUrl()("http://far") == "http://far"


@pytest.mark.parametrize("suffix", [".yaml", ".json", ""])
@pytest.mark.asyncio
async def test_a_file(tmp_path, suffix):
    path = tmp_path / f"backends{suffix}"
    content = {
        "backends": ["n=http://a:1", {"url": "http://b:2", "model": "m", "name": "two"}, {"url": "http://c:3"}],
        "models": ["asleep"],
    }
    path.write_text(json.dumps(content))
    snapshot = await first(BackendsFile(path))
    assert shown(snapshot) == [
        ("a:1", "http://a:1", ("n",)),
        ("two", "http://b:2", ("m",)),
        ("c:3", "http://c:3", None),
    ]
    assert snapshot.models == {"asleep"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backends: [", "neither JSON nor YAML"),
        ("backends: 5", r"Expected `array`, got `int` - at `\$.backends`"),
        ("- http://a", "Expected `object`, got `array`"),
        ("backends: [{url: 'http://a', modle: m}]", "unknown field `modle`"),
        ("backends: [{url: 'http://a', model: m, models: [n]}]", "both 'model' and 'models'"),
        ("backends: [{url: 'http://a', models: []}]", "names no model"),
        ("backends: [http://a, http://a]", "more than once"),
        ("backends: [{url: 'http://a', name: x}, {url: 'http://b', name: x}]", "name x is given more than once"),
        ("backends: [{url: a}]", "is no address"),
        ("!!python/object/apply:os.system [true]", "neither JSON nor YAML"),
    ],
)
def test_mistakes_in_a_file_at_the_start(tmp_path, text, words):
    path = tmp_path / "backends.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        BackendsFile(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        BackendsFile(tmp_path / "none.yaml")


@pytest.mark.asyncio
async def test_a_file_is_read_again_and_a_mistake_changes_nothing(tmp_path, caplog):
    """Also where a ConfigMap puts a link in place of another."""
    versions = []
    for number, text in enumerate(
        ['{"backends": ["http://a"]}', '{"backends": ["http://b"]}', "{", '{"backends": []}']
    ):
        versions.append(tmp_path / f"v{number}.json")
        versions[-1].write_text(text)
    path = tmp_path / "backends.json"

    def show(version: int) -> None:
        (tmp_path / "new").symlink_to(versions[version])
        os.replace(tmp_path / "new", path)

    show(0)
    pool = Pool(RouterSettings())
    async with follow([BackendsFile(path, interval=0.01)], pool):
        urls = lambda: [replica.target.url for replica in pool]  # noqa: E731
        await until(lambda: urls() == ["http://a"], "it is read")
        show(1)
        await until(lambda: urls() == ["http://b"], "it is read again")
        show(2)
        await until(lambda: "is no valid JSON; what was read before stays" in caplog.text, "the mistake is told")
        path.unlink()
        await until(lambda: "No such file" in caplog.text, "that it is gone is told")
        assert urls() == ["http://b"]
        show(3)
        await until(lambda: urls() == [], "it is read again")


@pytest.mark.asyncio
async def test_requests_go_where_the_file_says_now(tmp_path):
    path = tmp_path / "backends.yaml"
    async with replicas("json", "json") as (one, two):
        path.write_text(f"backends: ['m={one.url}']")
        async with routing([BackendsFile(path, interval=0.01)]) as router:
            await router.healthy(1)
            async with router.ask() as answer:
                assert await answer.json() == {"from": "0"}
            path.write_text(f"backends: ['m={two.url}']\nmodels: [other]")
            await until(lambda: router.router.pool.knows("other"), "it is read again")
            async with router.ask() as answer:
                assert await answer.json() == {"from": "1"}
            asked = len(one.seen)
        assert asked == 1


@pytest.mark.asyncio
async def test_a_name_stands_for_all_of_its_addresses(caplog):
    answers: list[object] = [
        ["10.0.0.2", "10.0.0.1", "10.0.0.2"],
        socket.gaierror(socket.EAI_AGAIN, "try again"),
        ["10.0.0.1", "fd00::1"],
        socket.gaierror(socket.EAI_NONAME, "not known"),
        ["10.0.0.1"],
    ]
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        answer = answers[min(len(asked), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    source = DnsName("m=dns+https://leaders.ns.svc:8443/base", interval=0.001, resolve=resolve)
    async with contextlib.aclosing(source.snapshots()) as snapshots:
        seen = [await anext(snapshots) for _ in range(5)]
    assert asked[0] == ("leaders.ns.svc", 8443)
    assert [[target.url for target in snapshot.targets] for snapshot in seen] == [
        [],
        ["https://10.0.0.1:8443/base", "https://10.0.0.2:8443/base"],
        ["https://10.0.0.1:8443/base", "https://[fd00::1]:8443/base"],
        [],
        ["https://10.0.0.1:8443/base"],
    ]
    assert all(snapshot.models == {"m"} for snapshot in seen), "known while there are no pods"
    assert {target.host for target in seen[1].targets} == {"leaders.ns.svc"}, "what its certificate proves"
    assert "what was known stays" in caplog.text


@pytest.mark.asyncio
async def test_a_name_is_resolved_and_sent_as_the_host():
    async with replicas("json") as (one,):
        source = DnsName(f"m=dns+http://localhost:{one.port}", interval=0.01)
        async with routing([source]) as router:
            await until(lambda: any(replica.usable for replica in router.router.pool), "it is found")
            async with router.ask() as answer:
                assert answer.status == 200
        assert one.seen[0][1]["host"] == f"localhost:{one.port}"


@pytest.mark.asyncio
async def test_a_source_that_fails_takes_nothing_away(caplog):
    class Failing:
        name = "failing"

        async def snapshots(self):
            yield Snapshot(models=frozenset({"m"}))
            raise OSError("gone")

    pool = Pool(RouterSettings())
    async with follow([Failing()], pool):
        await until(lambda: "defect in failing" in caplog.text, "it is told")
        await asyncio.sleep(0)
        assert pool.models == ["m"]


@pytest.mark.asyncio
async def test_a_name_that_cannot_be_one_does_not_end_its_source(caplog):
    answers: list[object] = [UnicodeError("label too long"), OSError("no file left"), ["10.0.0.1"]]

    async def resolve(host: str, port: int) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    snapshots = DnsName("m=dns+http://name:80", interval=0, resolve=resolve).snapshots()
    assert (await anext(snapshots)).targets == ()
    assert [target.url for target in (await anext(snapshots)).targets] == ["http://10.0.0.1:80"]
    assert "label too long; what was known stays" in caplog.text
    await snapshots.aclose()


@pytest.mark.parametrize(
    ("text", "words"), [("models: [2001-99-99]", "neither JSON nor YAML"), ("[" * 100_000, "nested too deeply")]
)
def test_what_the_parser_trips_over_is_a_mistake_like_others(tmp_path, text, words):
    path = tmp_path / "backends.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        BackendsFile(path)

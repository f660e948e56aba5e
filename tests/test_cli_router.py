"""``lightvllm router`` as a process: what it refuses, signals, draining, TLS on both sides, and what it prints."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import psutil
import pytest
import yaml
from fake_replica import FakeReplica, replicas, until
from server_process import ServerProcess, started
from typer.main import get_command
from waiting import LIMIT

from lightvllm.backends.k8s import labels
from lightvllm.cli.main import app, main
from lightvllm.errors import ConfigError
from lightvllm.keys import ApiKeys, read_word
from lightvllm.router.memory import Memory
from lightvllm.router.metrics import Metrics
from lightvllm.router.pool import Pool
from lightvllm.router.run import client_tls, server_tls
from lightvllm.router.settings import RouterSettings

COMMAND = [sys.executable, "-c", "from lightvllm.cli.main import run; run()", "router"]


@pytest.fixture
def refused(capsys):
    """A function that gives the one line which options are refused with."""

    def refused(*options: object) -> str:
        assert main(["router", *map(str, options)]) in (1, 2)
        shown = capsys.readouterr()
        (line,) = shown.err.strip().splitlines()
        assert shown.out == ""
        return line

    return refused


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


async def url_of(server: ServerProcess) -> str:
    line = await until(lambda: server.seen(r"router listens on \S+"), "it listens")
    return line.rpartition(" ")[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no replicas: give --backend URL, --backends-file FILE or --kubernetes"),
        (["--backend", "nonsense"], "backend 'nonsense' is no address; expected http://host:port"),
        (["--backend", "http://a", "--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines"),
        (["--backend", "http://a", "--kube-context", "x"], "an option of Kubernetes is given, but not --kubernetes"),
        (
            ["--backend", "http://a", "--ssl-certfile", "x"],
            "TLS needs --ssl-certfile and --ssl-keyfile; only x is given",
        ),
        (["--backend", "http://a", "--backend-ssl-keyfile", "x"], "needs both --backend-ssl-certfile"),
        (["--backend", "http://a", "--backend-plaintext"], "--backend-plaintext is about --backend-api-key-file"),
        (["--backend", "http://a", "--extra-path", "x"], "path 'x' must begin with a slash"),
        (["--backend", "http://a", "--max-request-bytes", "much"], "'much' is no size"),
        (
            ["--backend", "http://a", "--host", "192.0.2.1", "--allow-unauthenticated"],
            "cannot listen on 192.0.2.1:8080",
        ),
        (["--backends-file", "/nowhere.yaml"], "file /nowhere.yaml: No such file"),
        (["--kubernetes", "--kubeconfig", "/nowhere"], "no Kubernetes API server"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, words, refused):
    assert words in refused(*options)


def test_keys_must_be_private_and_are_not_sent_in_the_clear(tmp_path, refused):
    keys = private(tmp_path / "keys", "# ours\nfirst\n\nsecond\n")
    assert [ApiKeys.read(keys).find(f"Bearer {key}") for key in ("first", "second")] == [1, 2]
    assert ApiKeys.read(keys).find("Bearer # ours") is None
    assert read_word(private(tmp_path / "key", "one\n"), "key") == "one"
    line = refused("--backend", "http://10.0.0.1", "--backend-api-key-file", tmp_path / "key")
    assert "would cross the network in the clear" in line
    keys.chmod(0o644)
    assert "is open to others (mode 0644); run: chmod 600" in refused("--backend", "http://a", "--api-key-file", keys)
    for text, words in (("", "holds no key"), ("with space", "without spaces"), ("ä", "expected ASCII text")):
        assert words in refused("--backend", "http://a", "--api-key-file", private(tmp_path / "wrong", text))
    with pytest.raises(ConfigError, match=r"TLS key .* is open to others"):
        client_tls(None, keys, keys)
    assert "must hold one word" in refused(
        "--backend", "http://a", "--backend-api-key-file", private(tmp_path / "wrong", "a\nb")
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_signal_lets_requests_finish_and_takes_no_new_ones(number, status):
    async with replicas("stream") as (replica,), aiohttp.ClientSession() as client:
        replica.gate = asyncio.Semaphore(1)
        with started([*COMMAND, "--backend", f"m={replica.url}", "--port", "0", "--access-log"]) as server:
            url = await url_of(server)
            files, hard = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)
            assert files >= min(65536, hard), "a connection is a file"
            async with client.post(url + "/v1/completions", json={"model": "m"}) as answer:
                first = await answer.content.readany()
                server.signal(number)
                await until(lambda: server.seen("draining: 1 requests"), "it drains")
                with pytest.raises(aiohttp.ClientConnectorError):
                    await client.get(url + "/health")
                for _ in replica.events:
                    replica.gate.release()
                assert first + await answer.read() == b"".join(replica.events)
            assert await asyncio.to_thread(server.wait) == status
            line = server.seen(r".*POST /v1/completions 200 in .*")
            said = (
                r"model=m backend=\S+ tries=1 (held_seconds=\S+ )?first_byte_seconds=0\.\d+ client=\S+ request_id=\w+"
            )
            assert re.search(said, line)
            assert "Traceback" not in server.text


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["the time is over", "a second signal"])
async def test_what_does_not_finish_is_ended_with_an_error_event(how):
    async with replicas("stream") as (replica,), aiohttp.ClientSession() as client:
        replica.gate = asyncio.Semaphore(1)
        seconds = "0.1" if how == "the time is over" else "600"
        with started([*COMMAND, "--backend", f"m={replica.url}", "--port", "0", "--drain-timeout", seconds]) as server:
            url = await url_of(server)
            async with client.post(url + "/v1/completions", json={"model": "m"}) as answer:
                first = await answer.content.readany()
                server.signal(signal.SIGTERM)
                await until(lambda: server.seen("draining"), "it drains")
                if how == "a second signal":
                    server.signal(signal.SIGTERM)
                rest = await answer.read()
            assert first == replica.events[0]
            assert b"the router is shutting down; try again" in rest
            assert await asyncio.to_thread(server.wait) == 143
            await until(lambda: replica.left == 1, "the replica sees that nobody waits any more")


@pytest.mark.asyncio
async def test_a_held_request_is_waited_for_and_a_kept_connection_is_told_to_close():
    replica = FakeReplica(mode="json")
    await replica.start()
    await replica.stop()
    options = ["--backend", f"m={replica.url}", "--port", "0", "--health-interval", "0.05"]
    try:
        with started([*COMMAND, *options]) as server:
            url = await url_of(server)
            async with aiohttp.ClientSession() as client:
                held = asyncio.create_task(client.post(url + "/v1/completions", json={"model": "m"}).__aenter__())
                while (await (await client.get(url + "/queue.json?model=m")).json())["waiting"] == 0:
                    await asyncio.sleep(0.01)
                server.signal(signal.SIGTERM)
                await until(lambda: server.seen("draining: 1"), "it drains")
                await replica.start()
                answer = await held
                assert (answer.status, answer.headers["Connection"]) == (200, "close")
                assert await asyncio.to_thread(server.wait) == 143
    finally:
        await replica.stop()


@pytest.mark.asyncio
async def test_connections_that_send_nothing_are_closed():
    async with replicas("json") as (replica,):
        options = ["--backend", f"m={replica.url}", "--port", "0", "--connection-timeout", "0.2"]
        with started([*COMMAND, *options]) as server:
            port = int((await url_of(server)).rpartition(":")[2])
            for sent in (
                b"",
                b"POST /v1/completions HTTP/1.1\r\nX-Half:",
                b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                answer = b""
                try:
                    async with asyncio.timeout(LIMIT):
                        answer = await reader.read()
                except ConnectionResetError:
                    pass
                assert answer == b"" or answer.startswith(b"HTTP/1.1 200")
                writer.close()


@pytest.mark.asyncio
async def test_a_connection_that_is_used_again_and_again_is_kept():
    """Short requests, between two of which nothing is being answered whenever somebody looks."""
    async with replicas("json") as (replica,):
        options = ["--backend", f"m={replica.url}", "--port", "0", "--connection-timeout", "1"]
        with started([*COMMAND, *options]) as server:
            port = int((await url_of(server)).rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            began = time.monotonic()
            while time.monotonic() - began < 2.5:  # the time itself is what is tested
                writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                async with asyncio.timeout(LIMIT):
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(len(b'{"status": "ready"}'))
                assert head.startswith(b"HTTP/1.1 200")
                await asyncio.sleep(0.1)
            writer.close()


@pytest.mark.asyncio
async def test_a_held_request_is_told_when_the_time_is_over():
    async with aiohttp.ClientSession() as client:
        with started(
            [*COMMAND, "--backend", "m=http://127.0.0.1:9", "--port", "0", "--drain-timeout", "0.1"]
        ) as server:
            url = await url_of(server)
            held = asyncio.create_task(client.post(url + "/v1/completions", json={"model": "m"}).__aenter__())
            while (await (await client.get(url + "/queue.json?model=m")).json())["waiting"] == 0:
                await asyncio.sleep(0.01)
            server.signal(signal.SIGTERM)
            answer = await held
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            assert (await answer.json())["error"]["code"] == "shutting_down"
            assert await asyncio.to_thread(server.wait) == 143
            assert "Traceback" not in server.text


@pytest.mark.asyncio
async def test_tls_on_both_sides(tmp_path):
    """Clients must show a certificate; the replica's is checked, for its name, too."""
    pytest.importorskip("cryptography", reason="the k8s extra is not installed")
    from lightvllm.certs import Authority

    authority = Authority.new()
    files = {"ca": authority.cert}
    for name, usage in (("server", "server"), ("client", "client")):
        made = authority.issue(name, usage, ["127.0.0.1"] if usage == "server" else [])
        files |= {name: made.cert, f"{name}-key": made.key}
    wrong = authority.issue("wrong", "server", ["elsewhere.example"])
    files |= {"wrong": wrong.cert, "wrong-key": wrong.key}
    paths = {name: private(tmp_path / f"{name}.pem", content.decode()) for name, content in files.items()}

    async def upstream(cert: str) -> tuple[FakeReplica, str, asyncio.Server]:
        replica = FakeReplica(mode="json", name=cert)
        tls = server_tls(paths[cert], paths[f"{cert}-key"], paths["ca"])
        server = await asyncio.start_server(replica._connected, "127.0.0.1", 0, ssl=tls)
        return replica, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", server

    good, good_url, good_server = await upstream("server")
    bad, bad_url, bad_server = await upstream("wrong")
    options = ["--backend", f"m={good_url}", "--backend", f"m={bad_url}", "--port", "0"]
    for option, name in (
        ("ssl-certfile", "server"),
        ("ssl-keyfile", "server-key"),
        ("ssl-ca-certs", "ca"),
        ("backend-ssl-ca-certs", "ca"),
        ("backend-ssl-certfile", "client"),
        ("backend-ssl-keyfile", "client-key"),
    ):
        options += [f"--{option}", str(paths[name])]
    try:
        with started([*COMMAND, *options]) as server:
            url = await url_of(server)
            assert url.startswith("https://")
            shown = client_tls(paths["ca"], paths["client"], paths["client-key"])
            async with aiohttp.ClientSession() as client:
                for number in range(4):
                    content = {"model": "m", "prompt": str(number)}
                    async with client.post(url + "/v1/completions", json=content, ssl=shown) as answer:
                        assert await answer.json() == {"from": "server"}
                async with client.get(url + "/backends", ssl=shown) as answer:
                    states = [(entry["state"], entry["reason"]) for entry in (await answer.json())["data"]]
                    assert states[0] == ("healthy", "")
                    assert states[1][0] == "ejected"
                    assert "certificate" in states[1][1]
                with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                    await client.get(url + "/health", ssl=client_tls(paths["ca"], None, None))
            assert not bad.seen
            assert len(good.seen) == 4
    finally:
        for listener in (good_server, bad_server):
            listener.close()
        for replica in (good, bad):
            await replica.stop()


def test_an_address_that_cannot_be_had_is_an_error_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [*COMMAND, "--backend", "http://a", "--port", port]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    advice = "Address already in use; use another --port, or 0 for a free one"
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"error: cannot listen on 127.0.0.1:{port}: {advice}\n"


def test_the_documentation_and_the_samples_name_what_there_is():
    root = Path(__file__).parent.parent
    page, sample = (root / "docs/router.md").read_text(), (root / "manifests/samples/router.yaml").read_text()
    options = {name for parameter in get_command(app).commands["router"].params for name in parameter.opts}
    for text in (page, sample):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help", "--from-file", "--cert", "--key"}
        assert named <= options, named - options
    for path in set(re.findall(r"`((?:router|backends/k8s|cli)/\w+\.py)`", page)):
        assert any((root / folder / path).exists() for folder in (".", "lightvllm")), path
    metrics = Metrics()
    metrics.watch(Pool(RouterSettings(models=("m",))), Memory(1))
    shown = metrics.text().decode()
    for name in re.findall(r"`(?:lightvllm_router|…)_(\w+)", page):
        assert f"lightvllm_router_{name}" in shown, name
    objects = [
        *yaml.safe_load_all(sample),
        *yaml.safe_load_all((root / "manifests/samples/keda-scaledobject.yaml").read_text()),
    ]
    target = next(o for o in objects if o["kind"] == "ScaledObject")["spec"]["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"]) == (f"{labels.GROUP}/{labels.VERSION}", labels.KIND)
    (role,) = (o for o in objects if o["kind"] == "Role")
    assert role["rules"][0] == {"apiGroups": [labels.GROUP], "resources": [labels.PLURAL], "verbs": ["list", "watch"]}

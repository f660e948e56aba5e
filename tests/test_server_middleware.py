"""Ids, keys, CORS and bodies, as a client sees them over a socket."""

from __future__ import annotations

import json
import logging
import socket
import time
import urllib.parse
from collections.abc import Iterator

import httpx2 as httpx
import pytest
from fastapi.testclient import TestClient
from scripted_client import ScriptedClient
from server_process import ServerProcess, scripted

from lightvllm.server.app import create_app
from lightvllm.server.paths import is_open, route_path
from lightvllm.server.settings import ServerSettings

KEYS = ("first-key", "second-key")
BEARER = {"Authorization": "Bearer second-key"}


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    with scripted(server={"max_request_bytes": 1000, "body_timeout": 0.5}) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def keyed() -> Iterator[ServerProcess]:
    with scripted(server={"api_keys": KEYS, "allowed_origins": ["https://page.example"]}) as server:
        server.ready()
        yield server


def exchange(url: str, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send the parts over a plain connection; all that comes back until the server closes it or is silent for 1.5 s."""
    host = urllib.parse.urlsplit(url)
    with socket.create_connection((host.hostname, host.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        connection.settimeout(1.5)
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
        except TimeoutError:
            pass
        return received


@pytest.mark.parametrize("given", ["my-id.1", "a" * 128, "0123:abc_DEF"])
def test_a_sane_id_is_kept(plain, given):
    assert httpx.get(f"{plain}/version", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "x\ttab", "<script>", "-x", '"', "a;b", "%0a"])
def test_any_other_is_replaced(plain, given):
    made = httpx.get(f"{plain}/version", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert made != given
    assert len(made) == 32


@pytest.mark.parametrize("path", ["/version", "/nowhere", "/v1/defect", "/v1/stream?n=1", "/health?deep=x"])
def test_every_answer_has_an_id(plain, path):
    ids = {httpx.get(plain + path).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


def test_a_defect_is_told_without_a_traceback(plain):
    answer = httpx.get(f"{plain}/v1/defect", headers={"X-Request-Id": "r1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error (request r1); the server's log has the details"
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{plain}/v1/late-defect")


def test_a_defect_is_in_the_log_with_its_id(caplog):
    app = create_app(ScriptedClient(), ServerSettings())

    @app.get("/defect")
    def defect() -> None:
        raise ZeroDivisionError("what the log is told")

    with caplog.at_level(logging.ERROR):
        assert TestClient(app).get("/defect", headers={"X-Request-Id": "r2"}).status_code == 500
    assert "r2" in caplog.text
    assert "what the log is told" in caplog.text


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "no API key was sent"),
        ({"Authorization": "Bearer"}, "no API key was sent"),
        ({"Authorization": "Bearer wrong"}, "the API key is not valid"),
        ({"Authorization": "Bearer first-key second-key"}, "not valid"),
        ({"Authorization": "Basic second-key"}, "not valid"),
        ({"Authorization": b"Bearer \xff\xfe"}, "not valid"),
        ({"Authorization": "Bearer second-ke"}, "not valid"),
        ({"api-key": "second-key"}, "no API key was sent"),
    ],
)
def test_without_a_key(keyed, headers, words):
    answer = httpx.get(f"{keyed.url}/v1/stream", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert words in error["message"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Bearer "])
def test_with_a_key(keyed, key, scheme):
    answer = httpx.get(f"{keyed.url}/v1/stream?n=1", headers={"Authorization": f"{scheme} {key}"})
    assert (answer.status_code, answer.text) == (200, "0\n")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/live", 200),
        ("/ping", 200),
        ("/docs", 200),
        ("/openapi.json", 200),
        ("/metrics", 401),
        ("/version", 401),
        ("/load", 401),
        ("/nowhere", 401),
        ("//health", 401),
        ("/health/", 401),
        ("/health/../v1/stream", 401),
        ("/static/../v1/stream", 404),
        ("/health%2f..%2fv1%2fstream", 401),
        ("/HEALTH", 401),
    ],
)
def test_what_needs_no_key(keyed, path, status):
    answer = exchange(keyed.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_metrics_can_be_opened():
    app = create_app(ScriptedClient(), ServerSettings(api_keys=KEYS, metrics_without_key=True))  # type: ignore[arg-type]
    client = TestClient(app)
    assert [client.get(path).status_code for path in ("/metrics", "/version")] == [200, 401]


@pytest.mark.parametrize(
    ("path", "root", "route"),
    [("/a/health", "/a", "/health"), ("/ab", "/a", "/ab"), ("/a", "/a", ""), ("/health", "/a", "/health")],
)
def test_paths_below_a_proxy(path, root, route):
    assert route_path({"path": path, "root_path": root}) == route
    assert is_open(route, metrics_without_key=False) == (route == "/health")


def test_keys_are_not_in_the_output(keyed):
    httpx.get(f"{keyed.url}/v1/defect", headers=BEARER)
    assert keyed.seen("unexpected error")
    assert not any(key in keyed.text for key in KEYS)


def test_cors(keyed):
    origin = {"Origin": "https://page.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = httpx.options(f"{keyed.url}/v1/echo", headers=origin | asked)
    assert preflight.status_code == 200, "a browser sends no key with it"
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    refused = httpx.get(f"{keyed.url}/v1/stream", headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example", "so that the page can read why"
    assert "X-Request-Id" in refused.headers["access-control-expose-headers"]
    other = httpx.options(f"{keyed.url}/v1/echo", headers=asked | {"Origin": "https://other.example"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


def test_no_cors_unless_asked_for(plain):
    answer = httpx.get(f"{plain}/version", headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_not_too_large(plain, size, chunked):
    content = iter([b"x" * (size // 2), b"x" * (size - size // 2)]) if chunked else b"x" * size
    assert httpx.post(f"{plain}/v1/echo", content=content).json() == {"bytes": size}


def test_bodies_that_are(plain):
    refused = httpx.post(f"{plain}/v1/echo", content=b"x" * 1001)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    chunked = httpx.post(f"{plain}/v1/echo", content=iter([b"x" * 400] * 3))
    assert chunked.status_code == 413


def test_a_connection_survives_a_body_that_is_too_large(plain):
    with httpx.Client() as client:
        for _ in range(3):
            assert client.post(f"{plain}/v1/echo", content=b"x" * 3_000_000).status_code == 413
            assert client.post(f"{plain}/v1/echo", content=b"x").json() == {"bytes": 1}


@pytest.mark.parametrize("length", [b"1001", b"1" + b"0" * 30])
def test_what_is_announced_as_too_large_is_not_waited_for(plain, length):
    head = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: " + length + b"\r\n\r\n"
    answer = exchange(plain, head)
    assert b" 100 " not in answer
    assert answer.startswith(b"HTTP/1.1 413 ") or (len(length) > 18 and answer.startswith(b"HTTP/1.1 400 "))


def test_a_slow_body(plain):
    started = time.monotonic()
    answer = exchange(plain, b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert b"connection: close" in answer
    assert time.monotonic() - started < 10


def test_a_client_that_leaves_in_its_body_is_no_error(plain):
    host = urllib.parse.urlsplit(plain)
    with socket.create_connection((host.hostname, host.port)) as connection:
        connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
    assert httpx.get(f"{plain}/health").status_code == 200

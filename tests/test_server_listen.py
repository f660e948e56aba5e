"""Sockets and TLS are checked before a model is loaded; connections that do nothing do not last."""

from __future__ import annotations

import socket
import ssl
import stat
import time
import urllib.parse
from pathlib import Path

import httpx2 as httpx
import pytest
from server_process import scripted
from waiting import wait_until

from lightvllm.certs import Authority
from lightvllm.errors import ConfigError
from lightvllm.server.listen import ListenSettings, bind, closing, tls_context, url


def test_a_free_port_is_told():
    listener = bind(ListenSettings(port=0), authenticated=False)
    with closing(listener):
        assert url(listener, tls=False) == f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert url(listener, tls=True).startswith("https://")
        with pytest.raises(ConfigError, match=r"Address already in use; use another --port, or 0 for a free one"):
            bind(ListenSettings(port=listener.getsockname()[1]), authenticated=False)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "1.2.3.4.5", "a" * 300])
def test_no_address(host):
    with pytest.raises(ConfigError, match="is no address of this machine"):
        bind(ListenSettings(host=host, port=0), authenticated=True)


def test_an_address_of_another_machine():
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        bind(ListenSettings(host="192.0.2.1", port=0), authenticated=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.1"])
def test_nobody_unknown_from_other_machines(host):
    with pytest.raises(ConfigError, match=r"--api-key-file.*--allow-unauthenticated"):
        bind(ListenSettings(host=host, port=0), authenticated=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost"])
def test_loopback_needs_no_key(host):
    bind(ListenSettings(host=host, port=0), authenticated=False).close()


def test_what_lets_everybody_in():
    bind(ListenSettings(host="0.0.0.0", port=0), authenticated=True).close()
    bind(ListenSettings(host="0.0.0.0", port=0, allow_unauthenticated=True), authenticated=False).close()


def test_a_unix_socket(tmp_path):
    path = tmp_path / "s"
    settings = ListenSettings(uds=str(path))
    listener = bind(settings, authenticated=False)
    assert url(listener, tls=False) == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with closing(listener), pytest.raises(ConfigError, match="a server listens there"):
        bind(settings, authenticated=False)
    assert not path.exists()


def test_a_unix_socket_of_a_killed_server_is_taken_over(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    bind(ListenSettings(uds=str(path)), authenticated=False).close()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="the file is no socket"):
        bind(ListenSettings(uds=str(tmp_path / "file")), authenticated=False)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority, other = Authority.new(), Authority.new()
    server = authority.issue("server", usage="server", hosts=["localhost", "127.0.0.1"])
    client = authority.issue("client", usage="client")
    (folder / "ca.pem").write_bytes(authority.cert)
    (folder / "other-ca.pem").write_bytes(other.cert)
    for name, made in (("server", server), ("client", client)):
        (folder / f"{name}.pem").write_bytes(made.cert)
        (folder / f"{name}-key.pem").write_bytes(made.key)
        (folder / f"{name}-key.pem").chmod(0o600)
    (folder / "open-key.pem").write_bytes(server.key)
    (folder / "open-key.pem").chmod(0o644)
    (folder / "nonsense.pem").write_text("nonsense")
    (folder / "nonsense.pem").chmod(0o600)
    return folder


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ssl_certfile": "server.pem"}, "needs both --ssl-certfile and --ssl-keyfile"),
        ({"ssl_keyfile": "server-key.pem"}, "needs both"),
        ({"ssl_ca_certs": "ca.pem"}, "need --ssl-certfile and --ssl-keyfile"),
        ({"ssl_certfile": "missing.pem", "ssl_keyfile": "server-key.pem"}, "cannot read the TLS certificate"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "missing.pem"}, "cannot read the TLS key"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "client-key.pem"}, "no certificate and its key"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "nonsense.pem"}, "no certificate and its key"),
        ({"ssl_certfile": "server.pem", "ssl_keyfile": "open-key.pem"}, r"mode 0644\); run: chmod 600"),
        (
            {"ssl_certfile": "server.pem", "ssl_keyfile": "server-key.pem", "ssl_cert_reqs": 2},
            "--ssl-cert-reqs needs --ssl-ca-certs",
        ),
        (
            {"ssl_certfile": "server.pem", "ssl_keyfile": "server-key.pem", "ssl_ca_certs": "nonsense.pem"},
            "holds no CA certificates",
        ),
        (
            {"ssl_certfile": "server.pem", "ssl_keyfile": "server-key.pem", "ssl_ca_certs": "missing.pem"},
            "cannot read --ssl-ca-certs",
        ),
    ],
)
def test_wrong_tls(given, words, certificates):
    paths = {name: value if name == "ssl_cert_reqs" else str(certificates / value) for name, value in given.items()}
    with pytest.raises(ConfigError, match=words):
        tls_context(ListenSettings(**paths))


def test_tls_round_trip(certificates):
    listen = {"ssl_certfile": str(certificates / "server.pem"), "ssl_keyfile": str(certificates / "server-key.pem")}
    with scripted(listen=listen) as server:
        address = server.ready()
        assert address.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        assert httpx.get(f"{address}/v1/stream", verify=trusting).text == "0\n1\n2\n"
        with pytest.raises(httpx.ConnectError):
            httpx.get(address, verify=ssl.create_default_context(cafile=str(certificates / "other-ca.pem")))
        with pytest.raises(httpx.HTTPError):
            httpx.get(address.replace("https", "http"))


def test_clients_with_certificates_only(certificates):
    listen = {
        "ssl_certfile": str(certificates / "server.pem"),
        "ssl_keyfile": str(certificates / "server-key.pem"),
        "ssl_ca_certs": str(certificates / "ca.pem"),
        "ssl_cert_reqs": 2,
    }
    with scripted(listen=listen) as server:
        address = server.ready()
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{address}/health", verify=context)
        context.load_cert_chain(certificates / "client.pem", certificates / "client-key.pem")
        assert httpx.get(f"{address}/health", verify=context).status_code == 200


def connection_to(address: str) -> socket.socket:
    host = urllib.parse.urlsplit(address)
    return socket.create_connection((host.hostname, host.port), timeout=20)


def closed_after(connection: socket.socket) -> float:
    """Seconds until the server closes it."""
    started = time.monotonic()
    while connection.recv(65536):
        pass
    return time.monotonic() - started


@pytest.fixture(scope="module")
def hasty():
    listen = {"header_timeout": 0.5, "write_timeout": 0.5, "keep_alive_timeout": 1, "max_connections": 20}
    with scripted(listen=listen) as server:
        server.ready()
        yield server


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_headers_that_do_not_come(hasty, sent):
    with connection_to(hasty.url) as connection:
        connection.sendall(sent)
        assert closed_after(connection) < 10


def test_headers_that_come_byte_by_byte(hasty):
    with connection_to(hasty.url) as connection:
        connection.settimeout(0.1)
        deadline = time.monotonic() + 10
        closed = False
        while not closed:
            assert time.monotonic() < deadline
            try:
                connection.sendall(b"x")
                closed = connection.recv(1) == b""
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                closed = True


def test_headers_of_a_second_request_that_do_not_come(hasty):
    with connection_to(hasty.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
        assert closed_after(connection) < 10


def test_a_long_answer_is_not_cut_short(hasty):
    assert httpx.get(f"{hasty.url}/v1/stream?n=40", timeout=30).text.endswith("39\n")


def test_an_answer_that_nobody_reads(hasty):
    with connection_to(hasty.url) as connection:
        connection.sendall(b"GET /v1/endless HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: hasty.seen("left its answer unread"), "the server gives up", limit=20)
    wait_until(lambda: httpx.get(f"{hasty.url}/load").json()["server_load"] == 0, "the request has ended")


def test_connections_are_bounded(hasty):
    connections = [connection_to(hasty.url) for _ in range(40)]
    try:
        wait_until(lambda: hasty.seen("more than 20 connections"), "the server says so", limit=10)
        for connection in connections[20:]:
            assert closed_after(connection) < 10
        assert hasty.text.count("more than 20 connections") == 1, "a flood of connections is not one of lines"
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: httpx.get(f"{hasty.url}/health").status_code == 200, "it serves again", limit=10)

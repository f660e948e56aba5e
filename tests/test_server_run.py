"""The life of a server: it listens first, ends in order, and says what it waits for."""

from __future__ import annotations

import signal
import socket
import threading
import urllib.parse

import httpx2 as httpx
import pytest
from server_process import ServerProcess, scripted
from waiting import wait_until


class Streaming:
    """A request for ``n`` lines that runs in a thread; ``lines`` grows."""

    def __init__(self, url: str, n: int) -> None:
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(url, n), daemon=True)
        self._thread.start()
        wait_until(lambda: self.lines, "the stream begins")

    def _run(self, url: str, n: int) -> None:
        try:
            with httpx.stream("GET", f"{url}/v1/stream?n={n}", timeout=30) as answer:
                self.lines.extend(answer.iter_lines())
        except httpx.HTTPError as error:
            self.error = error

    def end(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def status(server: ServerProcess) -> str:
    return str(httpx.get(f"{server.url}/health").json()["status"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_idle_server_ends_at_once(number, code):
    with scripted() as server:
        server.ready()
        server.signal(number)
        assert server.wait(10) == code
        assert server.err == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_it_loads(number):
    with scripted(start_seconds=1000) as server:
        wait_until(lambda: server.url and status(server) == "starting", "it answers while it loads")
        answer = httpx.get(f"{server.url}/v1/stream")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_starting")
        assert "loading weights" in answer.json()["error"]["message"]
        server.signal(number)
        assert server.wait(10) == 128 + number
        assert "ready" not in server.text


def test_a_start_that_fails_ends_the_process():
    with scripted(start_error="model 'x' is not known") as server:
        assert server.wait(10) == 1
        assert server.err == ["error: model 'x' is not known\n"]


def test_requests_may_finish():
    with scripted() as server:
        address = server.ready()
        streaming = Streaming(address, 30)
        server.signal(signal.SIGTERM)
        wait_until(lambda: status(server) == "stopping", "readiness says no")
        assert httpx.get(f"{address}/live").status_code == 200
        refused = httpx.get(f"{address}/v1/stream")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"] == "1"
        streaming.end()
        assert streaming.lines == [str(number) for number in range(30)]
        assert server.wait(10) == 143
        assert "finishing 1 requests" in server.text


@pytest.mark.parametrize("how", ["timeout", "second signal"])
def test_requests_that_do_not_finish_are_told_so(how):
    with scripted(run={"shutdown_timeout": 0.5 if how == "timeout" else 1000}) as server:
        streaming = Streaming(server.ready(), 10_000)
        server.signal()
        wait_until(lambda: server.seen("finishing 1 requests"), "it waits for the stream")
        if how == "second signal":
            server.signal()
        streaming.end()
        assert streaming.error is None, "the stream ends as a stream should"
        assert "shutting_down" in streaming.lines[-1]
        assert server.wait(10) == 130


def test_a_third_signal_ends_by_force():
    with scripted(run={"shutdown_timeout": 1000}) as server:
        Streaming(server.ready(), 10_000)
        for number, said in enumerate(["finishing 1 requests", "ending now; once more ends it by force", ""]):
            server.signal()
            if said:
                wait_until(lambda said=said: server.seen(said), f"signal {number}")  # type: ignore[misc]
        assert server.wait(10) == 130


def test_an_engine_that_fails_leaves_the_server_up():
    with scripted(fail_after=0) as server:
        address = server.ready()
        wait_until(lambda: status(server) == "failed", "it says so")
        assert httpx.get(f"{address}/live").status_code == 503
        assert httpx.get(f"{address}/v1/stream").json()["error"]["code"] == "engine_failed"
        server.signal(signal.SIGTERM)
        assert server.wait(10) == 143


def test_unless_it_is_to_end_then():
    with scripted(fail_after=0, run={"exit_on_engine_failure": True}) as server:
        assert server.wait(10) == 1
        assert server.err[-1] == ("error: the engine has failed: worker worker-1 (rank 1) died: killed by SIGKILL\n")


def test_the_port_is_free_afterwards():
    with scripted() as server:
        host = urllib.parse.urlsplit(server.ready())
        server.signal()
        assert server.wait(10) == 130
        assert host.port is not None
        socket.create_server(("127.0.0.1", host.port)).close()


def test_a_unix_socket(tmp_path):
    path = tmp_path / "socket"
    with scripted(listen={"uds": str(path)}) as server:
        assert server.ready() == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://x/v1/stream").text == "0\n1\n2\n"
        server.signal()
        assert server.wait(10) == 130
        assert not path.exists()


def test_two_at_once():
    with scripted() as one, scripted() as other:
        assert one.ready() != other.ready()
        for server in (one, other):
            assert httpx.get(f"{server.url}/v1/stream").text == "0\n1\n2\n"


def test_a_client_that_leaves_is_not_waited_for():
    with scripted(run={"shutdown_timeout": 1000}) as server:
        host = urllib.parse.urlsplit(server.ready())
        with socket.create_connection((host.hostname, host.port)) as connection:
            connection.sendall(b"GET /v1/stream?n=100000 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: httpx.get(f"{server.url}/load").json()["server_load"] == 0, "the request is over")
        server.signal()
        assert server.wait(10) == 130


def test_idle_connections_do_not_hold_it_up():
    with scripted() as server, httpx.Client() as client:
        assert client.get(f"{server.ready()}/health").status_code == 200
        server.signal()
        assert server.wait(10) == 130


def test_a_body_that_does_not_come_does_not_hold_it_up():
    with scripted() as server:
        host = urllib.parse.urlsplit(server.ready())
        with socket.create_connection((host.hostname, host.port), timeout=20) as connection:
            connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            assert httpx.get(f"{server.url}/health").status_code == 200  # the server has seen the connection
            server.signal()
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert server.wait(10) == 130
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"shutting_down" in answer
    assert "Traceback" not in server.text

"""``lightvllm.client``: questions, batches and streams against a server that does what a test wants."""

from __future__ import annotations

import asyncio
import gc
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="the client extra is not installed")
pytest.importorskip("aiohttp", reason="the server extra is not installed")

from aiohttp import web
from fake_openai import FakeOpenAI, begin_stream, chunk, refusal, send
from pydantic import BaseModel
from waiting import LIMIT, wait_until

from lightvllm.client import Client
from lightvllm.client import http as client_http
from lightvllm.errors import AuthError, ConfigError, InvalidOutput, LightvllmError, RpcTimeout, ServerError, Shutdown


class City(BaseModel):
    name: str
    people: int


PARIS = '{"name": "Paris", "people": 2100000}'


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTVLLM_API_KEY", raising=False)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_http, "_FIRST_WAIT", 0.01)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as made:
        yield made


@pytest.fixture
def client(server: FakeOpenAI) -> Iterator[Client]:
    with Client(server.url, timeout=LIMIT) as made:
        yield made


# ----------------------------------------------------------------------------------------------------- one prompt


def test_a_question_is_a_chat_completion(server: FakeOpenAI, client: Client) -> None:
    assert client.inference("hello", system="Be brief.", temperature=0, max_tokens=5, seed=7) == "you said hello"
    assert server.requests == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
            "temperature": 0,
            "max_tokens": 5,
            "seed": 7,
        }
    ]
    assert "Authorization" not in server.headers[0]


def test_messages_go_as_they_are(server: FakeOpenAI, client: Client) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert client.inference(messages) == "you said c"
    assert server.requests[0]["messages"] == messages


def test_asynchronously_and_from_any_loop(client: Client) -> None:
    async def ask(text: str) -> str:
        return await client.a_inference(text)

    assert asyncio.run(ask("one")) == "you said one"
    assert asyncio.run(ask("two")) == "you said two"


def test_the_synchronous_call_works_inside_a_running_loop(client: Client) -> None:
    async def ask() -> str:
        return client.inference("here")

    assert asyncio.run(ask()) == "you said here"


def test_from_several_threads(client: Client) -> None:
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: client.inference(str(i))}))  # type: ignore[misc]
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert answers == {i: f"you said {i}" for i in range(8)}


def test_a_pydantic_class_is_the_schema_and_the_answer_an_instance(server: FakeOpenAI, client: Client) -> None:
    server.answer = lambda body: PARIS
    assert client.inference("a city", structured_output=City) == City(name="Paris", people=2_100_000)
    assert server.requests[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {
            "name": "City",
            "schema": {**City.model_json_schema(), "additionalProperties": False},
            "strict": True,
        },
    }


def test_no_room_for_properties_that_would_be_dropped(server: FakeOpenAI, client: Client) -> None:
    class Inner(BaseModel):
        type: str = "object"

    class Open(BaseModel, extra="allow"):
        counts: dict[str, int]

    class Outer(BaseModel):
        inner: list[Inner | None]
        open: Open
        properties: Any = {"type": "object"}

    server.answer = lambda body: '{"inner": [{}, null], "open": {"counts": {"a": 1}, "more": 2}}'
    client.inference("x", structured_output=Outer)
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["properties"] == {"default": {"type": "object"}, "title": "Properties"}
    assert schema["$defs"]["Inner"]["additionalProperties"] is False
    assert schema["$defs"]["Inner"]["properties"]["type"] == {"default": "object", "title": "Type", "type": "string"}
    assert schema["$defs"]["Open"]["additionalProperties"] is True
    assert schema["$defs"]["Open"]["properties"]["counts"]["additionalProperties"] == {"type": "integer"}


def test_text_that_is_no_instance(server: FakeOpenAI, client: Client) -> None:
    server.answer = lambda body: '{"name": "Paris"}'
    with pytest.raises(InvalidOutput, match=r"no City: people: Field required$") as caught:
        client.inference("a city", structured_output=City)
    assert (caught.value.text, caught.value.finish_reason) == ('{"name": "Paris"}', "stop")


def test_text_that_was_cut_off_says_so(server: FakeOpenAI, client: Client) -> None:
    async def cut(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response({"choices": [{"message": {"content": PARIS[:9]}, "finish_reason": "length"}]})

    server.handler = cut
    with pytest.raises(InvalidOutput, match="cut off: raise max_tokens"):
        client.inference("a city", structured_output=City)


def test_the_model_is_asked_for_once_and_must_be_named_where_there_are_several(server: FakeOpenAI) -> None:
    server.models = ["a", "b"]
    with Client(server.url) as client, pytest.raises(ConfigError, match="serves a, b; say which with model="):
        client.inference("x")
    with Client(server.url, model="b") as client:
        client.inference("x")
    assert server.requests[-1]["model"] == "b"


# ------------------------------------------------------------------------------------------------------- batches


def test_a_batch_keeps_the_order_and_its_bound(server: FakeOpenAI) -> None:
    async def backwards(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0.002 * (20 - int(body["messages"][-1]["content"])))
        return await server.answers(request, body)

    server.handler = backwards
    with Client(server.url, max_concurrency=3) as client:
        answers = client.inference_batch(map(str, range(20)), system="s", max_tokens=3)
    assert answers == [f"you said {i}" for i in range(20)]
    assert server.most_active == 3
    assert all(body["max_tokens"] == 3 and body["messages"][0]["role"] == "system" for body in server.requests)


def test_an_empty_batch(client: Client) -> None:
    assert client.inference_batch([]) == []
    assert list(client.streaming_batch([])) == []


def test_a_batch_of_instances_asynchronously(server: FakeOpenAI, client: Client) -> None:
    server.answer = lambda body: json.dumps({"name": body["messages"][-1]["content"], "people": 1})
    cities = asyncio.run(client.a_inference_batch(["Rome", "Oslo"], structured_output=City))
    assert cities == [City(name="Rome", people=1), City(name="Oslo", people=1)]


def refuse_b(server: FakeOpenAI) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["messages"][-1]["content"] == "b":
            return refusal(400, "no b", code="bad", param="messages")
        return await server.answers(request, body)

    server.handler = handler


def test_an_error_ends_a_batch(server: FakeOpenAI, client: Client) -> None:
    refuse_b(server)
    with pytest.raises(ServerError, match="400 Bad Request: no b") as caught:
        client.inference_batch(["a", "b", "c"])
    assert caught.value.__notes__ == ["prompt 1 of the batch"]


def test_or_stands_in_its_place(server: FakeOpenAI, client: Client) -> None:
    refuse_b(server)
    first, second, third = client.inference_batch(["a", "b", "c"], return_exceptions=True)
    assert (first, third) == ("you said a", "you said c")
    assert isinstance(second, ServerError)
    assert (second.status, second.kind, second.code, second.param) == (400, "invalid_request_error", "bad", "messages")
    assert second.request_id == "req-7"


# ------------------------------------------------------------------------------------------------------- streams


def test_streams_of_several_prompts(server: FakeOpenAI, client: Client) -> None:
    texts = ["", ""]
    deltas = 0
    for index, delta in client.streaming_batch(["one two", "three"]):
        assert isinstance(delta, str)
        texts[index] += delta
        deltas += 1
    assert texts == ["you said one two", "you said three"]
    assert deltas == 7
    assert all(body["stream"] for body in server.requests)


def test_streams_come_as_they_grow(server: FakeOpenAI, client: Client) -> None:
    go = asyncio.Event()

    async def half(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await send(response, chunk("first"))
        await go.wait()
        await send(response, chunk("second", "stop"))
        await response.write(b"data: [DONE]\n\n")
        return response

    server.handler = half
    stream = client.streaming_batch(["x"])
    assert next(stream) == (0, "first")
    server._loop.call_soon_threadsafe(go.set)
    assert list(stream) == [(0, "second")]


def test_an_instance_ends_a_stream(server: FakeOpenAI, client: Client) -> None:
    server.answer = lambda body: PARIS

    async def collect() -> list[Any]:
        return [item async for item in client.a_streaming_batch(["a city"], structured_output=City)]

    items = asyncio.run(collect())
    assert "".join(delta for _, delta in items[:-1]) == PARIS
    assert items[-1] == (0, City(name="Paris", people=2_100_000))


def test_errors_in_a_stream_of_several(server: FakeOpenAI, client: Client) -> None:
    refuse_b(server)
    items = list(client.streaming_batch(["a", "b"], return_exceptions=True))
    assert "".join(item for index, item in items if index == 0 and isinstance(item, str)) == "you said a"
    assert [type(item) for index, item in items if index == 1] == [ServerError]
    with pytest.raises(ServerError, match="no b"):
        list(client.streaming_batch(["a", "b"]))


async def endless(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await begin_stream(request)
    while True:
        await send(response, chunk("more "))
        await asyncio.sleep(0.005)


def test_closing_a_stream_ends_the_requests(server: FakeOpenAI, client: Client) -> None:
    server.handler = endless
    stream = client.streaming_batch(["a", "b"])
    next(stream)
    stream.close()
    wait_until(lambda: server.active == 0, "the server to see that nobody listens")


def test_dropping_a_stream_does_too(server: FakeOpenAI, client: Client) -> None:
    server.handler = endless
    next(client.streaming_batch(["a"]))
    gc.collect()
    wait_until(lambda: server.ended == 1, "the server to see that nobody listens")


def test_a_cancelled_call_ends_its_request(server: FakeOpenAI, client: Client) -> None:
    async def never(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    server.handler = never

    async def ask() -> None:
        task = asyncio.create_task(client.a_inference("x"))
        while not server.active:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    wait_until(lambda: server.ended == 1, "the server to see that nobody listens")


# -------------------------------------------------------------------------------------------------------- errors


def test_a_busy_server_is_asked_again_when_it_says(server: FakeOpenAI, client: Client) -> None:
    waits = ["0", formatdate(time.time() - 5, usegmt=True), None]

    async def busy(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if waits:
            return refusal(429 if len(waits) % 2 else 503, "too many", waits.pop())
        return await server.answers(request, body)

    server.handler = busy
    assert client.inference("x") == "you said x"
    assert len(server.requests) == 4


def test_up_to_a_bound(server: FakeOpenAI) -> None:
    async def busy(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return refusal(429, "too many", "0")

    server.handler = busy
    with Client(server.url, max_retries=2) as client, pytest.raises(ServerError, match=r"429.*too many") as caught:
        client.inference("x")
    assert (caught.value.status, len(server.requests)) == (429, 3)


def test_and_not_beyond_the_time_that_there_is(server: FakeOpenAI) -> None:
    async def busy(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return refusal(503, "starting", "3600")

    server.handler = busy
    started = time.monotonic()
    with Client(server.url, timeout=30) as client, pytest.raises(ServerError, match="503"):
        client.inference("x")
    assert time.monotonic() - started < 10
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422, 500, 502])
def test_other_refusals_are_final(server: FakeOpenAI, client: Client, status: int) -> None:
    async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return refusal(status, "no")

    server.handler = refuse
    with pytest.raises(ServerError, match=f"{status} .*: no"):
        client.inference("x")
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"<h1>Bad gateway</h1>", b'{"error": "plain"}', b'{"detail": "other"}', b"", b"\xff"])
def test_refusals_in_another_shape(server: FakeOpenAI, client: Client, body: bytes) -> None:
    async def refuse(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=502, body=body)

    server.handler = refuse
    said = {b'{"error": "plain"}': "plain", b"\xff": "�"}.get(body, body.decode(errors="replace"))
    with pytest.raises(ServerError) as caught:
        client.inference("x")
    assert str(caught.value).endswith(f"502 Bad Gateway{': ' if said else ''}{said}")


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_is_sent_and_may_be_refused(server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return refusal(status, "wrong key")

    server.handler = refuse
    monkeypatch.setenv("LIGHTVLLM_API_KEY", "of-the-environment")
    for given, sent in (("given", "given"), (None, "of-the-environment")):
        with Client(server.url, api_key=given) as client, pytest.raises(AuthError, match="wrong key") as caught:
            client.inference("x")
        assert server.headers[-1]["Authorization"] == f"Bearer {sent}"
        assert sent not in str(caught.value)


def test_of_several_keys_in_the_environment_the_first_is_sent(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTVLLM_API_KEY", " one two ")
    with Client(server.url) as client:
        client.inference("x")
    assert server.headers[-1]["Authorization"] == "Bearer one"


def test_a_batch_for_nobody_fails_as_one() -> None:
    with Client("http://127.0.0.1:9", max_retries=0) as client, pytest.raises(ServerError, match="cannot reach"):
        client.inference_batch(["x"] * 1000, return_exceptions=True)


def test_https_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the k8s extra is not installed")
    from lightvllm.certs import Authority

    authority = Authority.new()
    issued = authority.issue("server", usage="server", hosts=["127.0.0.1"])
    for name, pem in (("ca", authority.cert), ("server", issued.cert), ("key", issued.key)):
        (tmp_path / name).write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server", tmp_path / "key")
    with FakeOpenAI(context) as server:
        with Client(server.url, tls_ca=tmp_path / "ca") as client:
            assert client.inference("x") == "you said x"
        with Client(server.url, max_retries=0) as client, pytest.raises(ServerError, match=r"(?i)certificate"):
            client.inference("x")


def test_nobody_listens() -> None:
    with (
        Client("http://127.0.0.1:9", max_retries=1) as client,
        pytest.raises(ServerError, match="cannot reach") as caught,
    ):
        client.inference("x")
    assert caught.value.status is None


def test_no_answer_in_time(server: FakeOpenAI) -> None:
    server.handler = endless
    with Client(server.url, timeout=0.2) as client, pytest.raises(RpcTimeout, match=r"in 0\.2 s"):
        for _ in client.streaming_batch(["x"]):
            pass


def test_a_slow_reader_is_not_a_slow_server(server: FakeOpenAI) -> None:
    with Client(server.url, timeout=1.0) as client:
        stream = client.streaming_batch(["x"])
        next(stream)
        time.sleep(1.2)
        assert "".join(delta for _, delta in stream) == " said x"  # type: ignore[misc]


@pytest.mark.parametrize("way", ["ended", "cut", "error"])
def test_a_stream_that_breaks_off_is_not_asked_for_again(server: FakeOpenAI, client: Client, way: str) -> None:
    async def breaks(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        await send(response, chunk("half"))
        if way == "error":
            await send(response, {"error": {"message": "the engine died", "type": "server_error", "code": 500}})
        elif way == "cut":
            assert request.transport is not None
            request.transport.abort()
        return response

    server.handler = breaks
    stream = client.streaming_batch(["x"])
    assert next(stream) == (0, "half")
    expected = {"error": "broke off the stream: the engine died", "ended": r"without \[DONE\]", "cut": "broke off"}
    with pytest.raises(ServerError, match=expected[way]):
        next(stream)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [{"choices": [{"message": {"content": 5}}]}, {"choices": []}, [], {"choices": [{"message": {"content": ""}}]}],
)
def test_answers_that_are_none(server: FakeOpenAI, client: Client, answer: Any) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(answer)

    server.handler = handler
    with pytest.raises(ServerError, match=r"no chat completion|not whole"):
        client.inference("x")


@pytest.mark.parametrize(
    ("prompt", "arguments", "said"),
    [
        ("x", {"stream": True}, "stream cannot be given here; leave it out"),
        ("x", {"response_format": {}}, "use structured_output"),
        ("x", {"structured_output": dict}, "derived from BaseModel"),
        ("x", {"logit_bias": {1: object()}}, "no JSON"),
        ("\ud800", {}, "no JSON"),
        ([], {}, "expected text, or a list of messages"),
        ([1], {}, "expected text, or a list of messages"),
        (5, {}, "expected text, or a list of messages"),
        ([{"role": "system", "content": "a"}], {"system": "b"}, "leave one out"),
    ],
)
def test_questions_that_are_none(
    server: FakeOpenAI, client: Client, prompt: Any, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        client.inference(prompt, **arguments)
    with pytest.raises(ConfigError, match=said):
        list(client.streaming_batch([prompt], **arguments))
    assert server.requests == []


@pytest.mark.parametrize("prompts", ["text", [{"role": "user", "content": "text"}]])
def test_one_prompt_is_no_batch(server: FakeOpenAI, client: Client, prompts: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a list of prompts|expected text, or a list of messages"):
        client.inference_batch(prompts)
    assert server.requests == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"base_url": "localhost:8000"}, "use http://host:port/v1"),
        ({"base_url": "ftp://a/b"}, "use http://host:port/v1"),
        ({"base_url": "http://[::1"}, "is no URL"),
        ({"base_url": "http://me:hidden@127.0.0.1/v1"}, "^base_url holds a name or a password; use http://host"),
        ({"api_key": "a\nb"}, "^api_key cannot be sent in a header; use printable ASCII without spaces$"),
        ({"api_key": "schlüssel"}, "^api_key cannot be sent"),
        ({"timeout": 0}, "timeout=0"),
        ({"connect_timeout": -1}, "connect_timeout=-1"),
        ({"max_concurrency": 0}, "at least 1"),
        ({"max_retries": -1}, "at least 1 and 0"),
        ({"tls_ca": "/nowhere"}, "tls_ca='/nowhere' cannot be used"),
    ],
)
def test_clients_that_are_none(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Client(**arguments)


# ----------------------------------------------------------------------------------------------------------- end


def test_close_ends_what_is_under_way(server: FakeOpenAI) -> None:
    server.handler = endless
    client = Client(server.url)
    raised: list[LightvllmError] = []

    def ask() -> None:
        try:
            client.inference_batch(["a", "b"])
        except LightvllmError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: server.active == 2, "both requests to be there")
    client.close()
    client.close()
    thread.join(LIMIT)
    assert [type(error) for error in raised] == [Shutdown]
    wait_until(lambda: server.active == 0, "the server to see that nobody listens")
    with pytest.raises(Shutdown):
        client.inference("x")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lightvllm-client")]


def test_an_asynchronous_call_is_told_of_the_end(server: FakeOpenAI) -> None:
    server.handler = endless

    async def ask() -> None:
        async with Client(server.url) as client:
            task = asyncio.create_task(client.a_inference("x"))
            while not server.active:
                await asyncio.sleep(0.005)
        with pytest.raises(Shutdown):
            await task

    asyncio.run(ask())


def test_a_client_that_is_dropped_leaves_no_thread(server: FakeOpenAI) -> None:
    client = Client(server.url)
    client.inference("x")
    del client
    gc.collect()
    wait_until(
        lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("lightvllm-client")],
        "its thread to end",
    )


def test_a_stream_outlives_the_last_name_of_its_client(server: FakeOpenAI) -> None:
    stream = Client(server.url).streaming_batch(["x"])
    gc.collect()
    assert "".join(delta for _, delta in stream) == "you said x"  # type: ignore[misc]


def test_an_interpreter_ends_beside_an_open_client(server: FakeOpenAI) -> None:
    code = (
        "import sys; from lightvllm.client import Client; client = Client(sys.argv[1]); print(client.inference('x'));"
        "stream = client.streaming_batch(['y']); print(next(stream)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, server.url], capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.stdout, done.stderr, done.returncode) == ("you said x\n(0, 'you')\n", "", 0)


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['httpx2'] = None; import lightvllm.client; lightvllm.client.Client"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT)
    assert "pip install 'lightvllm[client]'" in done.stderr

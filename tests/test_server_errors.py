"""Every error reaches a client in OpenAI's shape, with the right status, and without a word of a traceback."""

from __future__ import annotations

import logging
from typing import Literal

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field, ValidationError

from lightvllm import errors as base
from lightvllm.server import errors
from lightvllm.server.errors import ApiError, ErrorResponse, as_api_error, invalid_request


class Message(BaseModel):
    role: Literal["user", "system"]
    content: str | list[str]


class Body(BaseModel):
    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    prompt: str | list[int] | list[list[int]] | None = None


GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    errors.install(app)

    @app.post("/body")
    def body(body: Body) -> None: ...

    @app.get("/http")
    def http() -> None:
        raise HTTPException(418, "no coffee", headers={"X-Tea": "yes"})

    @app.get("/number/{n}")
    def number(n: int, q: int = 0) -> int:
        return n + q

    @app.get("/config")
    def config() -> None:
        raise base.ConfigError("top_p=2 is not allowed; use a number in (0, 1]")

    return TestClient(app)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "model", "model: Field required; messages: Field required"),
        (GOOD | {"messages": []}, "messages", "at least 1 item"),
        (GOOD | {"temperature": 3}, "temperature", "temperature: Input should be less than or equal to 2 (got 3)"),
        (GOOD | {"messages": [{"role": "x", "content": ""}]}, "messages[0].role", "'user' or 'system' (got 'x')"),
        (GOOD | {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "messages[0].content: "),
        (GOOD | {"prompt": [[1], ["x"]]}, "prompt", "prompt: "),
        (GOOD | {"temperature": "\ud800"}, "temperature", "temperature: "),
        (GOOD | {"model": 10**400}, "model", "an integer of 1329 bits"),
        ([], None, "valid dictionary"),
        (None, None, "a JSON body is expected"),
    ],
)
def test_a_wrong_body_names_the_field(client, body, param, words):
    import json

    answer = client.post(
        "/body", content=b"" if body is None else json.dumps(body), headers={"content-type": "application/json"}
    )
    error = ErrorResponse.model_validate(answer.json()).error
    assert (answer.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert words in error.message


def test_a_thousand_wrong_messages_are_told_in_short(client):
    error = client.post("/body", json=GOOD | {"messages": [{"role": i} for i in range(1000)]}).json()["error"]
    assert error["message"].count(";") == errors.MAX_REPORTED_ERRORS
    assert error["message"].endswith("; and 1997 more")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b'{"model": ', "invalid_json", "at character 10"),
        (b"\xff\xfe{}", "invalid_json", "the body is no valid JSON"),
        (b"[" * 100_000, "invalid_json", "the body is no valid JSON"),
    ],
)
def test_no_json(client, content, code, words):
    answer = client.post("/body", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "param", "words"),
    [
        ("GET", "/nowhere", 404, None, "/docs, where it is on, lists all"),
        ("DELETE", "/body", 405, None, "use POST"),
        ("GET", "/http", 418, None, "no coffee"),
        ("GET", "/number/x", 400, "n", "n: Input should be a valid integer"),
        ("GET", "/number/1?q=x", 400, "q", "q: Input should be a valid integer"),
        ("GET", "/config", 400, None, "top_p=2 is not allowed"),
    ],
)
def test_other_errors_of_the_client(client, method, path, status, param, words):
    answer = client.request(method, path)
    error = ErrorResponse.model_validate(answer.json()).error
    assert (answer.status_code, error.param) == (status, param)
    assert words in error.message
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)
    assert answer.headers.get("x-tea") == ("yes" if status == 418 else None)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (base.ConfigError("bad"), 400, None, None),
        (base.MissingExtra("x", "y", "z"), 501, "missing_extra", None),
        (base.QueueFull("full", 2.2), 429, "engine_overloaded", "3"),
        (base.Shutdown("gone"), 503, "shutting_down", "1"),
        (base.WorkerDied("w1", "killed by SIGKILL", 1), 503, "engine_failed", None),
        (base.WorkerError(0, "execute_model", "ValueError", "x", "a traceback"), 503, "engine_failed", None),
        (base.RpcTimeout("late"), 503, "engine_failed", None),
        (base.PlacementError("2 of 4"), 503, "engine_failed", None),
        (ApiError(404, "no model", param="model", code="model_not_found"), 404, "model_not_found", None),
    ],
)
def test_expected_errors(error, status, code, retry_after, caplog):
    answer = as_api_error(error)
    assert (answer.status, answer.code, answer.headers.get("Retry-After")) == (status, code, retry_after)
    assert "traceback" not in answer.message
    assert not caplog.records
    ErrorResponse.model_validate(answer.body())


def test_every_error_of_ours_has_a_status():
    """A new one must be thought of here: it would be an unexpected 500."""
    unexpected = set()
    for name, kind in vars(base).items():
        if isinstance(kind, type) and not issubclass(kind, base.ServerError):  # those are what clients of servers see
            error = kind.__new__(kind, "")  # without what its __init__ needs
            error.retry_after = 1.0  # type: ignore[attr-defined]
            if as_api_error(error).status == 500:
                unexpected.add(name)
    assert unexpected == {"LightvllmError", "GraphCapacityExceeded", "InvalidOutput"}


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), base.LightvllmError("secret")])
def test_a_defect_is_logged_and_its_text_kept(error, caplog):
    with caplog.at_level(logging.ERROR):
        answer = as_api_error(error, request_id="r-1")
    assert answer.status == 500
    assert "secret" not in answer.message
    assert "r-1" in answer.message
    assert "r-1" in caplog.text
    assert "secret" in caplog.text


def test_requests_that_fastapi_has_not_checked():
    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"model": "m", "messages": 3})
    error = invalid_request(caught.value)
    assert (error.status, error.param) == (400, "messages")

"""The server's own and uvicorn's messages in one format."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator

import pytest

from lightvllm import logs
from lightvllm.server.logging import configure_logging

NAMES = ("", "lightvllm", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(each.handlers[:], each.level, each.propagate, each.disabled) for each in loggers]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(logs.ENVIRONMENT, "")  # put back as it was
        yield
    for each, (handlers, level, propagate, disabled) in zip(loggers, before, strict=True):
        each.handlers[:] = handlers
        each.setLevel(level)
        each.propagate, each.disabled = propagate, disabled
    logging.captureWarnings(False)


def test_uvicorn_joins_in_and_its_access_log_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler())
    configure_logging("json", "info")
    logging.getLogger("uvicorn.error").info("Uvicorn running", extra={"color_message": "\x1b[1mUvicorn"})
    logging.getLogger("uvicorn.access").info("GET / 200")
    logging.getLogger("lightvllm.server").info("ours")
    assert os.environ[logs.ENVIRONMENT] == "json:info", "processes that this one starts do the same"
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in told] == ["Uvicorn running", "ours"]
    assert "color_message" not in told[0]

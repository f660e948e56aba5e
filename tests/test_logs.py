"""How a line of log looks, for people and for machines."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

from lightvllm import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The process's logging is left as it was."""
    root, ours = logging.getLogger(), logging.getLogger("lightvllm")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(logs.ENVIRONMENT, raising=False)
        yield
    logs._process_fields.clear()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)


def test_json_is_one_object_a_line() -> None:
    stream = io.StringIO()
    logs.configure("json", "info", stream=stream, rank=3)
    logger = logging.getLogger("lightvllm.some.module")
    token = logs.request_id.set("r-1")
    logger.info("a\nb %s", "ü", extra={"model": "m", "nothing": None})
    logs.request_id.reset(token)
    logger.warning("%(path)s took %(seconds)d s", {"path": "/x", "seconds": 2})
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("it failed", extra={"request_id": "r-2", "worker": object})
    first, second, third = (json.loads(line) for line in stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "lightvllm.some.module",
        "message": "a\nb ü",
        "rank": 3,
        "model": "m",
        "request_id": "r-1",
    }
    assert (second["message"], second["path"], second["seconds"]) == ("/x took 2 s", "/x", 2)
    assert "request_id" not in second
    assert (third["level"], third["request_id"]) == ("error", "r-2")
    assert "ValueError: no" in third["exception"]


def test_text_is_for_people() -> None:
    stream = io.StringIO()
    logs.configure("text", "debug", stream=stream)
    logging.getLogger("lightvllm.x").debug("%(path)s is %(what)s", {"path": "/x", "what": "there"}, extra={"rank": 1})
    logging.getLogger("lightvllm.x").error("one\n12:00:00 ERROR forged: line")
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d DEBUG lightvllm\.x: /x is there \[rank=1\]", lines[0])
    assert lines[2].startswith("    "), "what follows a line break is no record of its own"


def test_levels() -> None:
    stream = io.StringIO()
    logs.configure("json", "info", stream=stream)
    logging.getLogger("lightvllm").debug("too little")
    logging.getLogger("somebody.else").info("nobody asked")
    logging.getLogger("somebody.else").warning("this matters")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("so does this", stacklevel=1)
    told = [json.loads(line)["logger"] for line in stream.getvalue().splitlines()]
    assert told == ["somebody.else", "py.warnings"]
    logs.configure("json", "error", stream=stream)
    logging.getLogger("somebody.else").warning("this does not")
    assert len(stream.getvalue().splitlines()) == 2, "configured again, nothing is written twice"


def test_processes_log_as_the_one_that_started_them() -> None:
    program = """
import logging, sys
from lightvllm import logs
logs.add_fields(rank=7)
logs.inherit(process="worker")
logging.getLogger("lightvllm.x").info("before it has a rank")
logs.add_fields(rank=1)
logging.getLogger("lightvllm.x").warning("with one")
"""

    def says(environment: dict[str, str]) -> list[str]:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    first, second = (json.loads(line) for line in says({logs.ENVIRONMENT: "json:info"}))
    assert (first["process"], second["rank"], second["message"]) == ("worker", 1, "with one")
    assert first["pid"] == second["pid"] > 0
    assert "rank" not in first
    assert all(logs.is_json_record(line) for line in says({logs.ENVIRONMENT: "json:info"}))
    assert len(says({logs.ENVIRONMENT: "json:error"})) == 0
    for nothing_said in ({}, {logs.ENVIRONMENT: "rubbish"}, {logs.ENVIRONMENT: "json:loud"}):
        assert says(nothing_said) == ["with one"], "as Python does by itself"


@pytest.mark.parametrize("given", ["", ".first", "a b", "a\n", "ä", "x" * 129])
def test_an_id_that_could_forge_something_is_not_taken(given: str) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", logs.accepted_id(given))


def test_a_sane_id_is_taken() -> None:
    assert logs.accepted_id("0.my_id:1-" + "x" * 118) == "0.my_id:1-" + "x" * 118


def test_nothing_in_a_text_moves_the_cursor_or_makes_a_line_that_is_not_there() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    forged = "a\x1b[2J\r\u2028\x9b\x7f\n12:00:00 INFO forged"
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("lightvllm.test").exception("%s", forged, extra={"path": forged})
    lines = stream.getvalue().removesuffix("\n").split("\n")
    assert "a\\x1b[2J\\r\\u2028\\x9b\\x7f" in lines[0]
    assert all(line.startswith("    ") for line in lines[1:])
    assert stream.getvalue().count("forged") == 3 + 1, "the message, the field, the exception, and its source line"

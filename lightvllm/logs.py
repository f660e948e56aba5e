"""How lines of log look: text for people, or one JSON object a line for collectors.

Modules log as Python does (``logging.getLogger(__name__)``) and give what a machine should find by ``extra``; this
decides only how a record is written, once per process: ``configure`` in the one that the user started, ``inherit`` in
those that it starts. Any module may import this one; it imports
nothing of lightvllm. Keys and prompts are the callers' business: neither is ever given to a logger.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal, TextIO, cast, get_args

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
LOG_FORMATS: tuple[str, ...] = get_args(LogFormat)
LOG_LEVELS: tuple[str, ...] = get_args(LogLevel)

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being answered, wherever something is logged for it; empty outside requests."""

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")

ENVIRONMENT = "LIGHTVLLM_LOG"
"""Tells the processes that this one starts how to log: ``FORMAT:LEVEL``, or nothing."""

_CONTROL = {
    code: chr(code).encode("unicode_escape").decode()
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
    if chr(code) not in "\t\n"
}
"""What moves a terminal's cursor or ends a line somewhere, and what stands for it in a text."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def configure(
    log_format: LogFormat = "text", level: LogLevel = "info", *, stream: TextIO | None = None, **fields: Any
) -> None:
    """Have this process's records written in one way; a later call replaces what an earlier one set.

    Args:
        log_format: ``"text"`` or ``"json"``.
        level: the least important that is written. Other people's loggers are held at ``"warning"`` at least, for
            they log at ``"info"`` what nobody asked for.
        stream: None takes stderr.
        fields: what every record of this process shall say, e.g. ``rank=1`` in a worker.
    """
    _process_fields.clear()
    _process_fields.update(fields)
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root, ours = logging.getLogger(), logging.getLogger("lightvllm")
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    ours.setLevel(level.upper())
    ours.propagate = True
    logging.captureWarnings(True)


def inherit(**fields: Any) -> None:
    """In a process that was started by another: log as that one does, if it has said how.

    Args:
        fields: as for ``configure``, e.g. ``process="worker"``.
    """
    log_format, _, level = os.environ.get(ENVIRONMENT, "").partition(":")
    if log_format in LOG_FORMATS and level in LOG_LEVELS:
        configure(cast(LogFormat, log_format), cast(LogLevel, level), **fields)
        _process_fields.setdefault("pid", os.getpid())


def accepted_id(given: str) -> str:
    """The id of a request whose client calls it ``given``: that, if it can forge neither lines of log nor headers (at
    most 128 letters, digits and ``._:-``), else a new one."""
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def add_fields(**fields: Any) -> None:
    """More for every record of a process that has called ``inherit``; nothing elsewhere, where others log too."""
    if "pid" in _process_fields:
        _process_fields.update(fields)


def is_json_record(line: str) -> bool:
    """Whether a line of some process's output is what ``JsonFormatter`` writes."""
    return line.startswith('{"time": "') and line.endswith("}")


_process_fields: dict[str, Any] = {}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the record says beyond its message, the process's own fields first."""
    said = {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}
    if current := request_id.get():
        said.setdefault("request_id", current)
    return {**_process_fields, **{key: value for key, value in said.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (RFC 3339, UTC, milliseconds), ``level``, ``logger``, ``message``, then
    what was put into the message by name (``logger.info("%(path)s", {"path": …})``) and what was given by ``extra``;
    ``exception`` holds a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(record.args if isinstance(record.args, Mapping) else {}),
            **_extra(record),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """``14:03:59 INFO lightvllm.server: message [request_id=… rank=1]``. What follows a line break in a message is
    indented, and control characters are escaped, so that nobody can write lines that are not there."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extra = " ".join(f"{key}={value}" for key, value in _extra(record).items())
        line = f"{clock} {record.levelname} {record.name}: {record.getMessage()}" + (f" [{extra}]" if extra else "")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line.translate(_CONTROL).replace("\n", "\n    ")

"""``ServerSettings``: everything that can be set about the HTTP side, checked once when it is made.

Knows neither engine nor command line: ``lightvllm serve`` makes one from its options, tests make one by hand. Handlers
find it at ``request.app.state.settings``. API keys are held as ``SecretStr``, so that no log or repr shows them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from lightvllm.keys import is_sendable
from lightvllm.sampling_params import MAX_LOGPROBS

_UNITS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_RATE = re.compile(rf"\s*(\d+)\s*/\s*({'|'.join(_UNITS)})\s*", re.IGNORECASE)

MiB = 1 << 20


class RateLimit(BaseModel):
    """At most ``count`` in any ``seconds``, on average; ``count`` may come at once.

    Attributes:
        count: requests, at least 1.
        seconds: in which they may come.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1)
    seconds: float = Field(gt=0, allow_inf_nan=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``"60/minute"``; also second, hour and day. Raises ValueError."""
        match = _RATE.fullmatch(text)
        if match is None or int(match[1]) < 1:
            raise ValueError(f"{text!r} is no rate; write it like 60/minute, with second, minute, hour or day")
        return cls(count=int(match[1]), seconds=_UNITS[match[2].lower()])


class ServerSettings(BaseModel):
    """How the server answers.

    Attributes:
        served_model_names: what requests may call the model; the first is what answers say. Empty: the name that the
            engine was given.
        response_role: the role of chat answers.
        chat_template: Jinja text in place of the model's own; None keeps that.
        tool_call_parser: how the model writes tool calls; None decides by the chat template.
        max_logprobs: most ``logprobs`` and ``top_logprobs`` that a request may ask for, 0 to 20.
        request_timeout: seconds after which a request is ended where it stands, with the finish reason "timeout";
            None waits. A request may ask for less.
        api_keys: one of them must come as ``Authorization: Bearer``; empty: none is needed.
        metrics_without_key: /metrics needs no key although there are some.
        allowed_origins: web pages that may call, ``("*",)`` for all; empty: CORS is off.
        allowed_methods, allowed_headers: what those pages may send.
        allow_credentials: whether they may send cookies and Authorization by themselves; not with ``"*"``.
        max_request_bytes: longest body; more is 413.
        body_timeout: seconds within which a body must have come in full; then 408.
        rate_limit: requests per API key, or per client address where there are no keys; None: no limit.
        max_rate_limit_clients: clients that the rate limit remembers at a time.
        root_path: the path below which a proxy serves this app, which it strips: for links in the API's description.
        docs: serve /docs and /openapi.json.
        log_requests: a line per request.
        log_format: of all lines.
        otlp_traces_endpoint: where OpenTelemetry spans go; None: nowhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    served_model_names: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    response_role: str = Field(default="assistant", min_length=1)
    chat_template: str | None = None
    tool_call_parser: str | None = None
    max_logprobs: int = Field(default=MAX_LOGPROBS, ge=0, le=MAX_LOGPROBS)
    request_timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    api_keys: tuple[SecretStr, ...] = ()
    metrics_without_key: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_request_bytes: int = Field(default=32 * MiB, ge=1)
    body_timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    rate_limit: RateLimit | None = None
    max_rate_limit_clients: int = Field(default=10_000, ge=1)
    root_path: str = ""
    docs: bool = True
    log_requests: bool = True
    log_format: Literal["text", "json"] = "text"
    otlp_traces_endpoint: str | None = None

    @field_validator("api_keys")
    @classmethod
    def _sendable(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(keys, 1):
            if not is_sendable(key.get_secret_value()):
                raise ValueError(
                    f"API key {number} of {len(keys)} cannot be sent in a header; use printable ASCII without spaces"
                )
        return keys

    @field_validator("root_path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if path and (not path.startswith("/") or path.endswith("/")):
            raise ValueError(f"root_path={path!r} must begin with a slash and not end with one")
        return path

    @model_validator(mode="after")
    def _no_credentials_for_everybody(self) -> Self:
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError("allow_credentials needs origins by name; allowed_origins='*' would trust every web page")
        return self

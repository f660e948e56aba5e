"""The options of ``lightvllm serve`` beyond the engine's, in the groups that ``--help`` shows.

Each field is one of ``ServerSettings`` or ``ListenSettings`` with the same default, or is read into one by
``settings``. Importing this imports no fastapi.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightvllm.cli.options import parse_bytes, read_chat_template
from lightvllm.errors import ConfigError
from lightvllm.keys import read_keys

if TYPE_CHECKING:
    from lightvllm.server.listen import ListenSettings
    from lightvllm.server.settings import ServerSettings

LogFormat = StrEnum("LogFormat", ["text", "json"])
LogLevel = StrEnum("LogLevel", ["debug", "info", "warning", "error"])

API_KEY_VARIABLE = "LIGHTVLLM_API_KEY"

_ADDRESS, _ACCESS, _LIMITS, _API, _LOGS = "Address and TLS", "Who may call", "Limits", "API", "Logs and traces"


def _in(panel: str, *names: str, help: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **options)


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where to listen; fields of ``ListenSettings``."""

    host: Annotated[str, _in(_ADDRESS, help="Address to listen on; one beyond this machine needs an API key.")] = (
        "127.0.0.1"
    )
    port: Annotated[
        int, _in(_ADDRESS, help="Port to listen on; 0 takes a free one and prints it.", min=0, max=65535)
    ] = 8000
    uds: Annotated[
        Path | None, _in(_ADDRESS, help="Listen on a Unix socket instead, which only this user may connect to.")
    ] = None
    ssl_certfile: Annotated[Path | None, _in(_ADDRESS, help="The server's certificate (chain), PEM.")] = None
    ssl_keyfile: Annotated[
        Path | None, _in(_ADDRESS, help="The certificate's key, PEM, readable by its owner only.")
    ] = None
    ssl_ca_certs: Annotated[Path | None, _in(_ADDRESS, help="CAs of clients' certificates, PEM.")] = None
    ssl_cert_reqs: Annotated[
        int, _in(_ADDRESS, help="Clients' certificates: 0 none, 1 checked if shown, 2 required.", min=0, max=2)
    ] = 0
    forwarded_allow_ips: Annotated[
        str,
        _in(_ADDRESS, help="Proxies whose X-Forwarded-For is believed, with commas; * for all.", metavar="ADDRESS,…"),
    ] = "127.0.0.1"
    allow_unauthenticated: Annotated[
        bool,
        _in(
            _ACCESS,
            "--allow-unauthenticated",
            help="Listen beyond this machine although everybody who can connect may use the model.",
        ),
    ] = False
    max_header_bytes: Annotated[
        int, _in(_LIMITS, help="Longest head of a request.", parser=parse_bytes, metavar="SIZE")
    ] = "64KiB"  # type: ignore[assignment]  # the parser reads the default too
    header_timeout: Annotated[
        float, _in(_LIMITS, help="Seconds until a connection must have sent a request's headers.", min=0.1)
    ] = 30.0
    write_timeout: Annotated[
        float, _in(_LIMITS, help="Seconds that a client may leave its answer unread.", min=0.1)
    ] = 120.0
    keep_alive_timeout: Annotated[
        int, _in(_LIMITS, help="Seconds that a connection may stay between requests.", min=1)
    ] = 75
    max_connections: Annotated[int, _in(_LIMITS, help="Connections at a time; more are closed at once.", min=1)] = 4096
    backlog: Annotated[int, _in(_LIMITS, help="Connections that the kernel holds until they are accepted.", min=1)] = (
        2048
    )

    def settings(self) -> ListenSettings:
        from lightvllm.server.listen import ListenSettings

        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return ListenSettings.model_validate(
            {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        )


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to answer; fields of ``ServerSettings``, or what those are read from."""

    served_model_name: Annotated[
        list[str] | None,
        _in(_API, help="What requests call the model; may be repeated.", show_default="MODEL as given"),
    ] = None
    chat_template: Annotated[
        Path | None, _in(_API, help="File with a Jinja chat template.", show_default="the model's")
    ] = None
    tool_call_parser: Annotated[
        str | None,
        _in(
            _API,
            help="How the model writes tool calls: auto, hermes, llama3_json, mistral, pythonic, or none.",
            show_default="by the chat template",
        ),
    ] = None
    response_role: Annotated[str, _in(_API, help="The role of chat answers.")] = "assistant"
    max_logprobs: Annotated[
        int, _in(_API, help="Most log-probabilities per token that may be asked for.", min=0, max=20)
    ] = 20
    root_path: Annotated[
        str, _in(_API, help="Path below which a proxy serves this server.", metavar="PATH", show_default=False)
    ] = ""
    docs: Annotated[bool, _in(_API, "--docs/--no-docs", help="Serve /docs and /openapi.json.")] = True
    api_key: Annotated[
        list[str] | None,
        _in(
            _ACCESS,
            help="A key that requests must bring; may be repeated. Others on this machine can read it in the list of "
            f"processes: better --api-key-file, or the environment variable {API_KEY_VARIABLE}.",
            metavar="KEY",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None, _in(_ACCESS, help="File with such keys, one per line, readable by its owner only.")
    ] = None
    metrics_without_key: Annotated[
        bool, _in(_ACCESS, "--metrics-without-key", help="Let /metrics be read without a key.")
    ] = False
    allowed_origins: Annotated[
        list[str] | None,
        _in(_ACCESS, help="A web page's origin that may call (CORS), or *; may be repeated.", metavar="ORIGIN"),
    ] = None
    allowed_methods: Annotated[
        list[str] | None, _in(_ACCESS, help="A method that it may use; may be repeated.", show_default="all")
    ] = None
    allowed_headers: Annotated[
        list[str] | None, _in(_ACCESS, help="A header that it may send; may be repeated.", show_default="all")
    ] = None
    allow_credentials: Annotated[
        bool, _in(_ACCESS, "--allow-credentials", help="Whether it may send cookies and the like.")
    ] = False
    max_request_bytes: Annotated[
        int, _in(_LIMITS, help="Longest body of a request, such as 32MiB.", parser=parse_bytes, metavar="SIZE")
    ] = "32MiB"  # type: ignore[assignment]  # the parser reads the default too
    body_timeout: Annotated[
        float, _in(_LIMITS, help="Seconds until a request's body must have come in full.", min=0.1)
    ] = 60.0
    timeout: Annotated[
        float | None,
        _in(_LIMITS, help="Seconds after which a request is ended where it stands.", min=0.001, show_default="none"),
    ] = None
    rate_limit: Annotated[
        str | None,
        _in(
            _LIMITS,
            help="Requests per API key, or per client address without keys, such as 60/minute.",
            metavar="RATE",
            show_default="none",
        ),
    ] = None
    max_rate_limit_clients: Annotated[int, _in(_LIMITS, help="Clients that the rate limit remembers.", min=1)] = 10_000
    log_requests: Annotated[
        bool, _in(_LOGS, "--log-requests/--disable-log-requests", help="Log a line per request.")
    ] = True
    log_format: Annotated[LogFormat, _in(_LOGS, help="Lines for people, or JSON objects.")] = LogFormat.text
    otlp_traces_endpoint: Annotated[
        str | None,
        _in(_LOGS, help="Where OpenTelemetry spans go (OTLP over HTTP).", metavar="URL", show_default="none"),
    ] = None

    def settings(self, model: str, environment: str | None) -> ServerSettings:
        """What they say, checked; raises ConfigError.

        Args:
            model: what the model is called, unless names are given.
            environment: the value of ``LIGHTVLLM_API_KEY``: keys with spaces between; read only if there is no other.
        """
        from pydantic import ValidationError

        from lightvllm.server.settings import RateLimit, ServerSettings
        from lightvllm.server.tools import check_format

        check_format(self.tool_call_parser)
        try:
            return ServerSettings(
                served_model_names=tuple(self.served_model_name or [model]),
                response_role=self.response_role,
                chat_template=read_chat_template(self.chat_template),
                tool_call_parser=self.tool_call_parser,
                max_logprobs=self.max_logprobs,
                request_timeout=self.timeout,
                api_keys=self._keys(environment),  # type: ignore[arg-type]  # pydantic hides them
                metrics_without_key=self.metrics_without_key,
                allowed_origins=tuple(self.allowed_origins or ()),
                allowed_methods=tuple(self.allowed_methods or ["*"]),
                allowed_headers=tuple(self.allowed_headers or ["*"]),
                allow_credentials=self.allow_credentials,
                max_request_bytes=self.max_request_bytes,
                body_timeout=self.body_timeout,
                rate_limit=None if self.rate_limit is None else RateLimit.parse(self.rate_limit),
                max_rate_limit_clients=self.max_rate_limit_clients,
                root_path=self.root_path,
                docs=self.docs,
                log_requests=self.log_requests,
                log_format=self.log_format.value,  # type: ignore[arg-type]
                otlp_traces_endpoint=self.otlp_traces_endpoint,
            )
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{field}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")) from None
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _keys(self, environment: str | None) -> tuple[str, ...]:
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            keys += read_keys(self.api_key_file)
        return tuple(keys or (environment or "").split())

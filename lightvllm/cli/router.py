"""``lightvllm router``: several models and replicas behind one address. Options to settings, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightvllm.cli.options import parse_bytes
from lightvllm.cli.serve_options import LogFormat, LogLevel
from lightvllm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from lightvllm.router.sources import Source

Scheme = StrEnum("Scheme", ["http", "https"])

_BACKENDS, _KUBERNETES, _SECURITY = "Backends", "Kubernetes", "Security"
_ROUTING, _RETRY, _HEALTH, _HOLD = "Routing", "Retries", "Health", "Scale to zero"


def router(
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL[,MODEL…]=]URL",
            help="A replica. Without MODEL it is asked what it serves. dns+http://NAME:PORT stands for every address "
            "of the name. May be repeated.",
            rich_help_panel=_BACKENDS,
        ),
    ] = None,
    backends_file: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file with replicas; read again when it changes.", rich_help_panel=_BACKENDS),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model that is known even while it has no replica, so that requests for it are held.",
            rich_help_panel=_BACKENDS,
        ),
    ] = None,
    kubernetes: Annotated[
        bool,
        typer.Option("--kubernetes", help="Find the leaders of LLMInference objects.", rich_help_panel=_KUBERNETES),
    ] = False,
    kubernetes_namespace: Annotated[
        str | None,
        typer.Option(help="Of the objects.", show_default="all namespaces", rich_help_panel=_KUBERNETES),
    ] = None,
    kubernetes_selector: Annotated[
        str, typer.Option(help="Labels that the objects must have, such as team=a.", rich_help_panel=_KUBERNETES)
    ] = "",
    kubernetes_scheme: Annotated[
        Scheme, typer.Option(help="How leaders are reached.", rich_help_panel=_KUBERNETES)
    ] = Scheme.http,
    kubernetes_ssl_name: Annotated[
        str | None,
        typer.Option(help="Name in the leaders' certificates; pods have none.", rich_help_panel=_KUBERNETES),
    ] = None,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            help="Where the API server is.", show_default="the pod's, or ~/.kube/config", rich_help_panel=_KUBERNETES
        ),
    ] = None,
    kube_context: Annotated[
        str | None, typer.Option(help="Context in the kubeconfig.", rich_help_panel=_KUBERNETES)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback with API keys only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one and prints it.")] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys for clients, one a line; readable by its owner only.", rich_help_panel=_SECURITY),
    ] = None,
    allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--allow-unauthenticated",
            help="Listen beyond loopback although nobody has to prove who they are.",
            rich_help_panel=_SECURITY,
        ),
    ] = False,
    metrics_without_key: Annotated[
        bool,
        typer.Option(
            "--metrics-without-key", help="/metrics and /queue.json need no API key.", rich_help_panel=_SECURITY
        ),
    ] = False,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate of this router, PEM.", rich_help_panel=_SECURITY)
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Key of that certificate, PEM.", rich_help_panel=_SECURITY)
    ] = None,
    ssl_ca_certs: Annotated[
        Path | None, typer.Option(help="CA that clients' certificates must be signed by.", rich_help_panel=_SECURITY)
    ] = None,
    backend_api_key_file: Annotated[
        Path | None, typer.Option(help="The key that replicas are shown.", rich_help_panel=_SECURITY)
    ] = None,
    backend_plaintext: Annotated[
        bool,
        typer.Option(
            "--backend-plaintext",
            help="Show them the key without TLS, too, in a network that is trusted.",
            rich_help_panel=_SECURITY,
        ),
    ] = False,
    backend_ssl_ca_certs: Annotated[
        Path | None,
        typer.Option(help="CA of the replicas' certificates.", show_default="the system's", rich_help_panel=_SECURITY),
    ] = None,
    backend_ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate shown to replicas, PEM.", rich_help_panel=_SECURITY)
    ] = None,
    backend_ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Key of that certificate, PEM.", rich_help_panel=_SECURITY)
    ] = None,
    max_request_bytes: Annotated[
        str, typer.Option(help="Longest body of a request, such as 32MiB.", rich_help_panel=_SECURITY)
    ] = "32MiB",
    max_body_memory: Annotated[
        str,
        typer.Option(
            help="For the bodies of all requests whose answers have not begun; more requests get 503.",
            rich_help_panel=_SECURITY,
        ),
    ] = "1GiB",
    body_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds in which a body must have come.", rich_help_panel=_SECURITY)
    ] = 60.0,
    connection_timeout: Annotated[
        float,
        typer.Option(
            min=0.001, help="Seconds that a connection may stay without a complete request.", rich_help_panel=_SECURITY
        ),
    ] = 75.0,
    extra_path: Annotated[
        list[str] | None,
        typer.Option(help="A further path to route by the body's model.", rich_help_panel=_ROUTING),
    ] = None,
    affinity_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="How much of a prompt's beginning decides on the replica; 0: the least loaded gets it.",
            rich_help_panel=_ROUTING,
        ),
    ] = 1024,
    balance_factor: Annotated[
        float,
        typer.Option(
            min=1, help="Times the average load beyond which affinity passes a replica over.", rich_help_panel=_ROUTING
        ),
    ] = 1.25,
    affinity_slack: Annotated[
        int,
        typer.Option(
            min=0, help="A replica with fewer requests than this is never passed over.", rich_help_panel=_ROUTING
        ),
    ] = 4,
    max_in_flight: Annotated[
        int,
        typer.Option(
            min=0, help="Requests that a replica has at a time, others are held; 0: no limit.", rich_help_panel=_ROUTING
        ),
    ] = 0,
    max_tries: Annotated[
        int, typer.Option(min=1, help="Tries of one request, all replicas together.", rich_help_panel=_RETRY)
    ] = 10,
    max_losses: Annotated[
        int,
        typer.Option(min=1, help="Of those, tries that ended with a broken connection.", rich_help_panel=_RETRY),
    ] = 4,
    retry_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds after which no new try begins.", rich_help_panel=_RETRY)
    ] = 600.0,
    connect_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds to connect to a replica.", rich_help_panel=_RETRY)
    ] = 5.0,
    header_timeout: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Seconds until an answer begins; one that is no stream is then complete.",
            rich_help_panel=_RETRY,
        ),
    ] = 600.0,
    idle_timeout: Annotated[
        float,
        typer.Option(min=0.001, help="Seconds without a byte within an answer.", rich_help_panel=_RETRY),
    ] = 300.0,
    max_buffered_bytes: Annotated[
        str,
        typer.Option(
            help="An answer that is no stream is kept up to this size until it is complete, to be retried if it "
            "breaks off.",
            rich_help_panel=_RETRY,
        ),
    ] = "8MiB",
    backend_keepalive: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds to keep an idle connection; less than the replicas do (uvicorn: 5).",
            rich_help_panel=_RETRY,
        ),
    ] = 4.0,
    health_interval: Annotated[
        float, typer.Option(min=0.001, help="Seconds between two probes.", rich_help_panel=_HEALTH)
    ] = 2.0,
    health_timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds that a probe may take.", rich_help_panel=_HEALTH)
    ] = 2.0,
    healthy_after: Annotated[
        int, typer.Option(min=1, help="Good probes that bring an ejected replica back.", rich_help_panel=_HEALTH)
    ] = 2,
    eject_after: Annotated[
        int, typer.Option(min=1, help="Failures in a row that eject a replica.", rich_help_panel=_HEALTH)
    ] = 3,
    max_ejection: Annotated[
        float,
        typer.Option(
            min=0, help="Most seconds that a replica which fails again and again is kept out.", rich_help_panel=_HEALTH
        ),
    ] = 60.0,
    models_interval: Annotated[
        float, typer.Option(min=0.001, help="Seconds between looks at a replica's models.", rich_help_panel=_HEALTH)
    ] = 30.0,
    hold_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that a request waits for a replica.", rich_help_panel=_HOLD),
    ] = 300.0,
    max_held: Annotated[
        int, typer.Option(min=0, help="Requests per model that may wait; more get 503.", rich_help_panel=_HOLD)
    ] = 1000,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests may take to finish at the end.")
    ] = 30.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line per request.")] = False,
    log_level: Annotated[LogLevel, typer.Option(help="The least important lines that are logged.")] = LogLevel.info,
    log_format: Annotated[LogFormat, typer.Option(help="Lines for people, or JSON objects.")] = LogFormat.text,
) -> None:
    """Put several models and replicas behind one OpenAI-compatible address.

    Requests go by their model to the replica that has their beginning cached, unless it is too busy; what has not
    begun to stream is tried again elsewhere. Runs until Ctrl-C or SIGTERM, then lets requests finish.
    """
    try:
        import aiohttp  # noqa: F401
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtra(str(missing.name), "server", "lightvllm router") from None
    from lightvllm import logs
    from lightvllm.keys import ApiKeys, read_word
    from lightvllm.router.app import create_app
    from lightvllm.router.run import check_listener, client_tls, serve, server_tls
    from lightvllm.router.settings import PATHS, RouterSettings
    from lightvllm.router.sources import BackendsFile, CheckedUrl, from_options
    from lightvllm.router.upstream import Upstream

    settings = RouterSettings(
        models=tuple(model or ()),
        paths=(*PATHS, *(path for path in extra_path or () if path not in PATHS)),
        max_request_bytes=parse_bytes(max_request_bytes),
        max_body_memory=parse_bytes(max_body_memory),
        body_timeout=body_timeout,
        connection_timeout=connection_timeout,
        max_buffered_bytes=parse_bytes(max_buffered_bytes),
        affinity_bytes=affinity_bytes,
        balance_factor=balance_factor,
        affinity_slack=affinity_slack,
        max_in_flight=max_in_flight,
        connect_timeout=connect_timeout,
        header_timeout=header_timeout,
        idle_timeout=idle_timeout,
        max_tries=max_tries,
        max_losses=max_losses,
        retry_timeout=retry_timeout,
        hold_timeout=hold_timeout,
        max_held=max_held,
        keepalive=backend_keepalive,
        health_interval=health_interval,
        health_timeout=health_timeout,
        healthy_after=healthy_after,
        eject_after=eject_after,
        models_interval=models_interval,
        max_ejection=max_ejection,
        drain_timeout=drain_timeout,
        metrics_without_key=metrics_without_key,
        access_log=access_log,
    )
    keys = ApiKeys() if api_key_file is None else ApiKeys.read(api_key_file)
    check_listener(host, authenticated=bool(keys) or ssl_ca_certs is not None or allow_unauthenticated)
    tls = server_tls(ssl_certfile, ssl_keyfile, ssl_ca_certs)
    key = None if backend_api_key_file is None else read_word(backend_api_key_file, "backend API key file")
    if key is None and backend_plaintext:
        raise ConfigError("--backend-plaintext is about --backend-api-key-file, which is not given; leave it out")
    check = CheckedUrl(key is not None, backend_plaintext)
    sources = from_options(backend or [], check)
    if backends_file is not None:
        sources.append(BackendsFile(backends_file, check))
    of_kubernetes: dict[str, Any] = {
        "namespace": kubernetes_namespace,
        "selector": kubernetes_selector,
        "kubeconfig": kubeconfig,
        "context": kube_context,
        "host": kubernetes_ssl_name,
    }
    if kubernetes:
        sources.append(_kubernetes_source(check, scheme=kubernetes_scheme.value, **of_kubernetes))
    elif any(of_kubernetes.values()) or kubernetes_scheme != Scheme.http:
        raise ConfigError("an option of Kubernetes is given, but not --kubernetes; give that, too")
    if not sources:
        raise ConfigError("no replicas: give --backend URL, --backends-file FILE or --kubernetes")
    upstream = Upstream(settings, key, client_tls(backend_ssl_ca_certs, backend_ssl_certfile, backend_ssl_keyfile))

    logs.configure(log_format.value, log_level.value)  # type: ignore[arg-type]

    async def run() -> int:
        app = create_app(settings, sources, keys, upstream)
        return await serve(app, host, port, tls, lambda url: typer.echo(f"router listens on {url}"))

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        raise typer.Exit(128 + runner.run(run()))


def _kubernetes_source(check: Callable[[str], str], **options: Any) -> Source:
    from lightvllm.router.discovery import Kubernetes

    return Kubernetes(check=check, **options)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop

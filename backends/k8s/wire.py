"""What both ends of a connection must agree on: method names, metadata, limits, keepalive. Keeps no state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from lightvllm.backends.k8s.security import Tls
from lightvllm.proto import worker_pb2 as pb

SERVICE: str = pb.DESCRIPTOR.services_by_name["LLMWorker"].full_name
INIT_WORKER = f"/{SERVICE}/InitWorker"
SESSION = f"/{SERVICE}/Session"

DRIVER_KEY = "lightvllm-driver"
"""Metadata: a random id of the driver, which ties its InitWorker to its Session. Not a secret."""

ACCEPTED = ("lightvllm-session", "accepted")
"""Initial metadata of a Session that has taken the worker. (A refusal has some, too: empty.)"""

_FRAME_BYTES = 64 * 2**10  # room for what surrounds a payload

# (time, time-out) of pings, over TCP only: the kernel tells of a dead peer on a Unix socket, and a suspended one there
# is not dead. A dead node is noticed by the driver within 3 s; the worker is more patient with its driver, which may
# have been suspended for a moment.
_CLIENT_KEEPALIVE_MS = (1_000, 2_000)
_SERVER_KEEPALIVE_MS = (5_000, 10_000)

Options = list[tuple[str, int]]


def _client_options(target: str, max_message_bytes: int) -> Options:
    return [
        *_message_limits(max_message_bytes),
        *_keepalive(target, _CLIENT_KEEPALIVE_MS),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a channel's end must be its connection's end
    ]


def server_options(target: str, max_message_bytes: int) -> Options:
    return [
        *_message_limits(max_message_bytes),
        *_keepalive(target, _SERVER_KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", _CLIENT_KEEPALIVE_MS[0] // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),  # a port belongs to one server: an occupied one is an error
    ]


def _keepalive(target: str, time_and_timeout: tuple[int, int]) -> Options:
    if target.startswith("unix:"):
        return []
    return [
        ("grpc.keepalive_time_ms", time_and_timeout[0]),
        ("grpc.keepalive_timeout_ms", time_and_timeout[1]),
        # A keepalive ping waits for the ack of any other that is in flight (grpc measures bandwidth with them), which
        # by default may take a minute.
        ("grpc.http2.ping_timeout_ms", time_and_timeout[1]),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _message_limits(max_message_bytes: int) -> Options:
    size = max_message_bytes + _FRAME_BYTES
    return [("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)]


def open_channel(target: str, tls: Tls | None, max_message_bytes: int) -> Any:
    """A channel to ``target`` ("host:port", "unix:/path"): mutual TLS if ``tls`` is given, else plain."""
    options = _client_options(target, max_message_bytes)
    if tls is None:
        return grpc.insecure_channel(target, options)
    cert, key, ca = tls.read()
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), options)


def bind(server: Any, target: str, tls: Tls | None) -> int:
    """Have ``server`` listen on ``target``; the bound port (1 for a Unix socket). Raises RuntimeError."""
    if tls is None:
        return int(server.add_insecure_port(target))
    cert, key, ca = tls.read()
    credentials = grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)
    return int(server.add_secure_port(target, credentials))


def handlers(init_worker: Callable[..., Any], session: Callable[..., Any]) -> Any:
    """The service, as something to give to ``server.add_generic_rpc_handlers``."""
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "InitWorker": grpc.unary_unary_rpc_method_handler(
                init_worker, pb.InitWorkerRequest.FromString, pb.InitWorkerReply.SerializeToString
            ),
            "Session": grpc.stream_stream_rpc_method_handler(session, pb.Call.FromString, pb.Reply.SerializeToString),
        },
    )


def init_worker_stub(channel: Any) -> Any:
    return channel.unary_unary(INIT_WORKER, pb.InitWorkerRequest.SerializeToString, pb.InitWorkerReply.FromString)


def session_stub(channel: Any) -> Any:
    return channel.stream_stream(SESSION, pb.Call.SerializeToString, pb.Reply.FromString)

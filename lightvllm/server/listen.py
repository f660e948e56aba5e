"""Where the server listens: the socket, bound before a model is loaded; TLS; and what bounds a connection.

uvicorn waits without end for a client that sends half a header, or that does not read its answer; ``guarded_protocol``
is its protocol with both bounded, and with a bound on connections. Any module of the server may import this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lightvllm.errors import ConfigError
from lightvllm.keys import check_private
from lightvllm.server.heads import bounded_heads

logger = logging.getLogger(__name__)

KiB = 1 << 10

COMPLAINT_SECONDS = 10.0
"""Between two lines of the log that say that there are too many connections."""


class ListenSettings(BaseModel):
    """Where and how the server listens.

    Attributes:
        host, port: the address; port 0 takes a free one. Not used with ``uds``.
        uds: path of a Unix socket, which only this user may connect to.
        allow_unauthenticated: whether an address beyond this machine may be served without API keys.
        ssl_certfile, ssl_keyfile: the server's certificate chain and key, PEM; both or none.
        ssl_ca_certs: CAs of clients' certificates, PEM.
        ssl_cert_reqs: whether a client must show a certificate: 0 no, 1 if it has one, 2 yes.
        max_header_bytes: longest head of a request; more is 431.
        header_timeout: seconds within which a connection must have sent a request's headers.
        write_timeout: seconds that a client may leave its answer unread.
        keep_alive_timeout: seconds that a connection may stay between requests.
        max_connections: more are closed at once.
        backlog: connections that the kernel holds until they are accepted.
        forwarded_allow_ips: proxies whose ``X-Forwarded-For`` and ``-Proto`` are believed; ``"*"`` believes all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    uds: str | None = None
    allow_unauthenticated: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = Field(default=0, ge=0, le=2)
    max_header_bytes: int = Field(default=64 * KiB, ge=1024)
    header_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    write_timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    keep_alive_timeout: int = Field(default=75, ge=1)
    max_connections: int = Field(default=4096, ge=1)
    backlog: int = Field(default=2048, ge=1)
    forwarded_allow_ips: str = "127.0.0.1"


def bind(settings: ListenSettings, *, authenticated: bool) -> socket.socket:
    """A socket that listens. Raises ConfigError if the address is in use, cannot be had, or must not be used so.

    Args:
        authenticated: whether clients must prove who they are.
    """
    if settings.uds is not None:
        return _bind_unix(settings.uds, settings.backlog)
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {settings.host!r} is no address of this machine: {error}") from None
    if not (authenticated or settings.allow_unauthenticated or _is_loopback(str(address[0]))):
        raise ConfigError(
            f"{where} can be reached from other machines, and nobody would have to prove who they are; set an API key "
            "(--api-key-file, LIGHTVLLM_API_KEY), require client certificates (--ssl-cert-reqs 2), listen on "
            "127.0.0.1, or accept that with --allow-unauthenticated"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # "::" listens on IPv4 too
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(settings.backlog)
    except OSError as error:
        listener.close()
        advice = "; use another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {where}: {os.strerror(error.errno or 0)}{advice}") from None
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def closing(listener: socket.socket) -> Iterator[None]:
    """The socket is closed at the end of the block, if nobody has closed it before; a Unix socket's file goes too."""
    path = listener.getsockname() if listener.family == socket.AF_UNIX else None
    try:
        yield
    finally:
        listener.close()
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def url(listener: socket.socket, *, tls: bool) -> str:
    """What clients connect to."""
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{'https' if tls else 'http'}://{host}:{address[1]}"


def tls_context(settings: ListenSettings) -> ssl.SSLContext | None:
    """What TLS needs, read and checked; None without a certificate. Raises ConfigError."""
    certificate, key, authorities = settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs
    if certificate is None and key is None:
        if authorities is not None or settings.ssl_cert_reqs:
            raise ConfigError("--ssl-ca-certs and --ssl-cert-reqs need --ssl-certfile and --ssl-keyfile")
        return None
    if certificate is None or key is None:
        raise ConfigError("TLS needs both --ssl-certfile and --ssl-keyfile")
    if settings.ssl_cert_reqs and authorities is None:
        raise ConfigError("--ssl-cert-reqs needs --ssl-ca-certs, by which clients' certificates are checked")
    check_private(key, "TLS key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A password is asked for on the terminal otherwise, where a server may have none.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{certificate} and {key} are no certificate and its key in PEM without a password: {error.reason or error}"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the TLS certificate {certificate}: {error.strerror}") from None
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except ssl.SSLError as error:
            raise ConfigError(f"{authorities} holds no CA certificates in PEM: {error.reason or error}") from None
        except OSError as error:
            raise ConfigError(f"cannot read --ssl-ca-certs {authorities}: {error.strerror}") from None
        context.verify_mode = ssl.VerifyMode(settings.ssl_cert_reqs)
    return context


def guarded_protocol(settings: ListenSettings) -> type[asyncio.Protocol]:
    """uvicorn's protocol over httptools, or over h11 where that is not installed, with its waits bounded."""
    base: Any
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ModuleNotFoundError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as base  # bounds heads by itself
    else:
        base = bounded_heads(HttpToolsProtocol, settings.max_header_bytes)

    class GuardedProtocol(base):  # type: ignore[misc]
        _complained = -math.inf  # when; of all connections
        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._complain()
                transport.abort()
                return
            self._expect_headers(settings.header_timeout)

        def connection_lost(self, error: Exception | None) -> None:
            for timer in (self._header_timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(error)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # uvicorn's own timer for the time between requests ends with the first byte of the next one.
            self._expect_headers(settings.keep_alive_timeout + settings.header_timeout)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(settings.write_timeout, self._give_up_writing)

        def resume_writing(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
            super().resume_writing()

        def _complain(self) -> None:
            now = time.monotonic()
            if now - GuardedProtocol._complained >= COMPLAINT_SECONDS:  # a flood of connections is not one of lines
                GuardedProtocol._complained = now
                logger.warning("more than %d connections; new ones are closed", settings.max_connections)

        def _expect_headers(self, seconds: float) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
            self._header_timer = self.loop.call_later(seconds, self._check_headers)

        def _check_headers(self) -> None:
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

        def _give_up_writing(self) -> None:
            logger.warning("a client left its answer unread for %g s; its connection is closed", settings.write_timeout)
            self.transport.abort()

    return GuardedProtocol


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _bind_unix(path: str, backlog: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        os.chmod(path, 0o600)  # nobody can connect before listen
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on --uds {path}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that was killed; raises FileExistsError for anything else."""
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            if is_socket:
                probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise FileExistsError(errno.EEXIST, "a server listens there, or the file is no socket")

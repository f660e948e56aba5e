"""Running the router: its listener, signals, and an orderly end.

The first SIGINT or SIGTERM closes the listener and lets requests finish, within ``drain_timeout``; a second one ends
them at once (streams with an error event), a third ends the process.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from lightvllm.backends.k8s.security import is_loopback
from lightvllm.errors import ConfigError
from lightvllm.keys import check_private
from lightvllm.router.app import ROUTER, Router

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_FILES = 65536
_END = 2.0  # seconds in which cancelled requests may say goodbye
_LINGER = 2.0  # seconds in which the rest of a refused body is read, so that the client can read the refusal
_LOOK = 0.05


def check_listener(host: str, *, authenticated: bool) -> None:
    """Raise ConfigError if strangers could use the router: clients prove who they are, or it listens on loopback."""
    if not authenticated and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and nobody would have to prove who they are; give "
            "--api-key-file, require client certificates (--ssl-ca-certs), listen on 127.0.0.1, or accept that with "
            "--allow-unauthenticated"
        )


def server_tls(cert: Path | None, key: Path | None, client_ca: Path | None = None) -> ssl.SSLContext | None:
    """TLS of the listener; with ``client_ca`` clients must have a certificate of that CA. Raises ConfigError."""
    if cert is None or key is None:
        if given := [str(path) for path in (cert, key, client_ca) if path is not None]:
            raise ConfigError(f"TLS needs --ssl-certfile and --ssl-keyfile; only {', '.join(given)} is given")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    check_private(key, "TLS key")
    _load_chain(context, cert, key)
    if client_ca is not None:
        _load_ca(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_tls(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext | bool:
    """TLS to replicas: trusts ``ca``, else the system's CAs; shows ``cert`` if there is one. Raises ConfigError."""
    if (cert is None) != (key is None):
        raise ConfigError("a certificate for backends needs both --backend-ssl-certfile and --backend-ssl-keyfile")
    if ca is None and cert is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is None:
        context.load_default_certs()
    else:
        _load_ca(context, ca)
    if cert is not None and key is not None:
        check_private(key, "TLS key")
        _load_chain(context, cert, key)
    return context


async def serve(
    app: web.Application,
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    announce: Callable[[str], object],
) -> int:
    """Serve until a signal comes and all is done; its number.

    Args:
        port: 0 takes a free one.
        announce: called with the router's URL once it can be used.

    Raises ConfigError if it cannot listen there.
    """
    router = app[ROUTER]
    # Handlers end on their own or are cancelled below; aiohttp need not wait for them.
    idle = router.settings.connection_timeout
    _allow_connections()
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        shutdown_timeout=_END,
        lingering_time=_LINGER,
        access_log=None,
        keepalive_timeout=idle,
    )
    with _bind(host, port) as listener, _signals() as received:
        await runner.setup()
        try:
            site = web.SockSite(runner, listener, ssl_context=tls, backlog=_BACKLOG)
            await site.start()
            announce(_url(runner, tls))
            sweeper = asyncio.create_task(_sweep(runner, router), name="router idle connections")
            try:
                first = await received.get()
            finally:
                sweeper.cancel()
            router.draining = True
            await site.stop()
            logger.info("draining: %d requests", len(router.busy))
            if not await _drained(router, received):
                logger.warning("%d requests did not finish and are ended", len(router.busy))
                await _end(router)
        finally:
            await runner.cleanup()
    return first


async def _sweep(runner: web.AppRunner, router: Router) -> None:
    """Close connections that send no request, or half of one: aiohttp itself waits for them without end."""
    limit = router.settings.connection_timeout
    while True:
        await asyncio.sleep(limit / 4)
        connections = runner.server.connections if runner.server is not None else []
        now = asyncio.get_running_loop().time()
        router.quiet = {c: router.quiet.get(c, now) for c in connections if c not in router.busy}
        for connection in connections:
            if now - router.quiet.get(connection, now) >= limit:
                connection.force_close()
                if connection.transport is not None:
                    connection.transport.abort()


async def _drained(router: Router, received: asyncio.Queue[int]) -> bool:
    """Whether all requests finished within the time-out, before another signal."""
    try:
        async with asyncio.timeout(router.settings.drain_timeout):
            while router.busy:
                if not received.empty():
                    return False
                await asyncio.sleep(_LOOK)
    except TimeoutError:
        return False
    return True


async def _end(router: Router) -> None:
    """Cancel what is being answered: streams say so."""
    router.proxy.ending = True
    for task in router.busy.values():
        task.cancel()
    try:
        async with asyncio.timeout(_END):
            while router.busy:
                await asyncio.sleep(_LOOK)
    except TimeoutError:
        logger.warning("%d clients did not take their last event", len(router.busy))


def _allow_connections() -> None:
    """Each client and each replica's connection is an open file, of which the usual soft limit allows 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(host: str, port: int) -> socket.socket:
    """A socket that may listen, before anything else is started."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # "::" listens on IPv4 too
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
    except OSError as error:
        listener.close()
        advice = "; use another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}{advice}") from None
    return listener


@contextmanager
def _signals() -> Iterator[asyncio.Queue[int]]:
    """Signals as they come, instead of the exceptions that ``cli.main`` makes of them."""
    loop = asyncio.get_running_loop()
    received: asyncio.Queue[int] = asyncio.Queue()
    count = 0

    def take(number: int) -> None:
        nonlocal count
        count += 1
        if count > 2:
            os._exit(128 + number)
        received.put_nowait(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, take, number)
    try:
        yield received
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def _url(runner: web.AppRunner, tls: ssl.SSLContext | None) -> str:
    host, port = runner.addresses[0][:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _load_chain(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    for path in (cert, key):
        _readable(path)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError):
        raise ConfigError(f"TLS files {cert} and {key}: expected a certificate and its key, PEM") from None


def _load_ca(context: ssl.SSLContext, ca: Path) -> None:
    _readable(ca)
    try:
        context.load_verify_locations(ca)
    except OSError:
        raise ConfigError(f"TLS file {ca}: expected a CA's certificate, PEM") from None


def _readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"TLS file {path}: {error.strerror}") from None


def _no_password() -> str:
    """An encrypted key is an error; without this function the terminal would be asked."""
    raise ValueError("the key is encrypted")

"""Where the router learns what replicas there are: a list, a file that is read again when it changes, DNS, Kubernetes.

A source yields a ``Snapshot`` whenever what it knows changes. What goes wrong after its first snapshot is logged, and
what was known stays: a file with a mistake or a silent name server must not take replicas away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from lightvllm.errors import ConfigError, LightvllmError, MissingExtra
from lightvllm.router.pool import Pool, Snapshot
from lightvllm.router.replica import Target, check_url, is_private

logger = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between two looks at a file's modification time
_RESOLVE = 5.0  # seconds between two questions for a name; aiohttp and most clusters keep answers for as long


class Source(Protocol):
    """One origin of replicas.

    Attributes:
        name: for messages, and to tell its replicas from others'.
    """

    @property
    def name(self) -> str: ...

    def snapshots(self) -> AsyncIterator[Snapshot]:
        """All that is known, now and after each change, without end."""


@contextlib.asynccontextmanager
async def follow(sources: Iterable[Source], pool: Pool) -> AsyncIterator[None]:
    """Keep ``pool`` as the sources say while the block runs."""

    async def one(number: int, source: Source) -> None:
        try:
            async for snapshot in source.snapshots():
                pool.update(f"{number} {source.name}", snapshot)
        except LightvllmError as error:
            logger.error("%s: %s", source.name, error)
        except Exception:
            logger.exception("defect in %s; its replicas stay as they are", source.name)

    tasks = [
        asyncio.create_task(one(number, source), name=f"router source {source.name}")
        for number, source in enumerate(sources)
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class CheckedUrl:
    """Checks the addresses of replicas.

    Args:
        has_key: whether they are shown a key, which must not be readable on the way.
        plaintext: it may be, all the same.
    """

    def __init__(self, has_key: bool = False, plaintext: bool = False) -> None:
        self._wants_private = has_key and not plaintext

    def __call__(self, url: str) -> str:
        """The address as it is used. Raises ConfigError."""
        url = check_url(url)
        if self._wants_private and not is_private(url):
            raise ConfigError(
                f"backend {url} is neither https nor on this machine, so that its API key would cross the network in "
                "the clear; use https, or --backend-plaintext in a network that you trust"
            )
        return url


class StaticList:
    """``--backend [MODEL[,MODEL…]=]URL``."""

    name = "--backend"

    def __init__(self, backends: Iterable[str], check: Callable[[str], str] = check_url) -> None:
        targets = [_parse(text, check) for text in backends]
        _refuse_repeated(targets)
        self._snapshot = Snapshot(tuple(targets))

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        yield self._snapshot


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    name: str | None = None
    model: str | None = None
    models: list[str] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    backends: list[_Entry | str]
    models: list[str] = []


class BackendsFile:
    """``--backends-file``: YAML or JSON, read again when it changes, also where it is a link into a ConfigMap.

        backends:
          - http://127.0.0.1:8001
          - {url: http://10.0.0.2:8000, model: llama, name: llama-0}
        models: [llama, also-known]

    Raises ConfigError for a file that cannot be used at the start.
    """

    def __init__(self, path: Path, check: Callable[[str], str] = check_url, interval: float = _LOOK) -> None:
        self._path, self._check, self._interval = path, check, interval
        self.name = f"file {path}"
        self._stamp, self._snapshot = self._look(), self._read()

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        yield self._snapshot
        while True:
            await asyncio.sleep(self._interval)
            stamp = self._look()
            if stamp == self._stamp:
                continue
            self._stamp = stamp
            try:
                snapshot = self._read()
            except ConfigError as error:
                logger.error("%s; what was read before stays in force", error)
                continue
            logger.info("%s has been read again: %d backends", self.name, len(snapshot.targets))
            yield snapshot

    def _look(self) -> tuple[int, int, int] | None:
        """What changes with the file; None if it is not there."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _read(self) -> Snapshot:
        try:
            text = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.name}: {error.strerror}") from None
        try:
            content = msgspec.convert(_decode(text, self._path), _File)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        try:
            targets = [
                _parse(entry, self._check) if isinstance(entry, str) else _from_entry(entry, self._check)
                for entry in content.backends
            ]
            _refuse_repeated(targets)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        return Snapshot(tuple(targets), frozenset(content.models))


class DnsName:
    """``--backend [MODEL=]dns+http://NAME:PORT``: every address of the name is a replica, asked again and again."""

    def __init__(
        self,
        backend: str,
        check: Callable[[str], str] = check_url,
        interval: float = _RESOLVE,
        resolve: Callable[[str, int], Any] | None = None,
    ) -> None:
        target = _parse(backend.replace("dns+", "", 1), check)
        self._models = target.models
        self._parts = urlsplit(target.url)
        self._host = self._parts.hostname or ""
        self._port = self._parts.port or (443 if self._parts.scheme == "https" else 80)
        self._interval, self._resolve = interval, resolve or _addresses
        self.name = f"DNS {self._host}"

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        last: list[str] | None = None
        models = frozenset(self._models or ())
        failing = False
        yield Snapshot((), models)
        while True:
            addresses = last
            try:
                addresses, failing = sorted(set(await self._resolve(self._host, self._port))), False
            except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
                if isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, _EAI_NODATA):
                    addresses = []  # an answer: a headless Service without pods has no records
                elif not failing:
                    failing = True
                    reason = getattr(error, "strerror", None) or error
                    logger.warning("%s: %s; what was known stays", self.name, reason)
            if addresses is not None and addresses != last:
                last = addresses
                yield Snapshot(tuple(self._target(address) for address in addresses), models)
            await asyncio.sleep(self._interval)

    def _target(self, address: str) -> Target:
        host = f"[{address}]" if ":" in address else address
        url = f"{self._parts.scheme}://{host}:{self._port}{self._parts.path}"
        return Target(name=f"{host}:{self._port}", url=url, models=self._models, host=self._host)


_EAI_NODATA = getattr(socket, "EAI_NODATA", socket.EAI_NONAME)


async def _addresses(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]


def from_options(backends: Iterable[str], check: Callable[[str], str] = check_url) -> list[Source]:
    """The sources that the values of ``--backend`` stand for. Raises ConfigError."""
    backends = list(backends)
    names = [text for text in backends if _url_of(text).startswith("dns+")]
    urls = [text for text in backends if text not in names]
    static: list[Source] = [StaticList(urls, check)] if urls else []
    return [*static, *(DnsName(text, check) for text in names)]


def _url_of(backend: str) -> str:
    models, equals, url = backend.partition("=")
    return url if equals and "://" not in models else backend


def _parse(text: str, check: Callable[[str], str]) -> Target:
    """``[MODEL[,MODEL…]=]URL``."""
    url = _url_of(text)
    names = text.removesuffix(url).removesuffix("=")
    models = tuple(filter(None, map(str.strip, names.split(","))))
    if text != url and not models:
        raise ConfigError(f"backend {text!r} names no model before '='; leave out '=' to have the backend asked")
    url = check(url.strip())
    return Target(name=urlsplit(url).netloc + urlsplit(url).path, url=url, models=models or None)


def _from_entry(entry: _Entry, check: Callable[[str], str]) -> Target:
    if entry.model is not None and entry.models is not None:
        raise ConfigError(f"backend {entry.url} has both 'model' and 'models'; keep one")
    models = entry.models if entry.model is None else [entry.model]
    if models is not None and (not models or not all(models)):
        raise ConfigError(f"backend {entry.url} names no model; leave that out to have the backend asked")
    target = _parse(entry.url, check)
    return Target(
        name=entry.name or target.name, url=target.url, models=target.models if models is None else tuple(models)
    )


def _refuse_repeated(targets: list[Target]) -> None:
    for what in ("url", "name"):
        values = [getattr(target, what) for target in targets]
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            raise ConfigError(f"backend {what} {', '.join(repeated)} is given more than once")


def _decode(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"file {path} is nested too deeply") from None
    except ValueError:
        if path.suffix == ".json":
            raise ConfigError(f"file {path} is no valid JSON") from None
    try:
        import yaml
    except ModuleNotFoundError:
        raise MissingExtra("pyyaml", "server", f"{path}, which is no JSON,") from None
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"file {path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter: 2001-99-99 looks like a date
        raise ConfigError(f"file {path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None

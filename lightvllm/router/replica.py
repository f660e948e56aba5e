"""One replica: where it is, how it is, and what it is busy with.

``Target`` is what a source says of it; ``Replica`` is what the router then learns. Only ``pool.py`` changes a Replica's
state, but for what the proxy and the probes report through the pool.
"""

from __future__ import annotations

import time
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from lightvllm.backends.k8s.security import is_loopback
from lightvllm.errors import ConfigError

State = Literal["new", "healthy", "unready", "ejected"]
"""``new`` was never asked; ``unready`` says itself that it wants no requests (503 on /health): it starts or drains."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as a source knows it.

    Attributes:
        name: stays the same while its cache does: what affinity is computed from.
        url: ``http://host:port`` or https, perhaps with a path; without a slash at the end.
        models: what it serves, by the names that it answers to; None: it is asked.
        ready: whether the source wants requests to go there.
        host: sent as the header Host and proved by the certificate, if that is not the one of the URL.
    """

    name: str
    url: str
    models: tuple[str, ...] | None = None
    ready: bool = True
    host: str | None = None


class Replica:
    """What is known of a replica; lives as long as a source names it, and until its last request is done.

    Attributes:
        models: names that it serves, of ``cards`` the entries of its /v1/models.
        since: when it came into its state, in seconds since the epoch; ``reason`` says why it is not healthy.
        in_flight: requests of this router.
        elsewhere: further sequences that it runs or has waiting, when it was last asked: those of others, and those
            of requests that have several.
        failures: in a row.
        ejections: in a row, without a request that went well since.
        out_until: monotonic time before which it does not come back.
        busy_until: monotonic time before which it has asked not to get requests (429).
        removed: no source names it any more.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.name = target.name
        self.models: tuple[str, ...] = target.models or ()
        self.cards: dict[str, dict[str, Any]] = {}
        self.state: State = "new"
        self.reason = "not asked yet"
        self.since = time.time()
        self.in_flight = 0
        self.elsewhere = 0
        self.failures = 0
        self.successes = 0
        self.ejections = 0
        self.out_until = 0.0
        self.busy_until = 0.0
        self.removed = False

    @property
    def load(self) -> int:
        return self.in_flight + self.elsewhere

    @property
    def usable(self) -> bool:
        return self.state == "healthy" and self.target.ready and not self.removed

    def become(self, state: State, reason: str) -> bool:
        """Whether the state is another one now."""
        changed = state != self.state
        if changed:
            self.since = time.time()
        self.state, self.reason = state, reason
        return changed

    def describe(self) -> dict[str, Any]:
        """For /backends."""
        return {
            "name": self.name,
            "url": self.target.url,
            "models": list(self.models),
            "state": self.state if self.target.ready or self.state != "healthy" else "not ready",
            "reason": self.reason,
            "since": round(self.since, 3),
            "in_flight": self.in_flight,
            "elsewhere": self.elsewhere,
            "failures": self.failures,
            "ejections": self.ejections,
        }


def check_url(url: str) -> str:
    """A replica's URL without the slash at its end. Raises ConfigError for what is none, or holds a password."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"backend {url!r} is no address; expected http://host:port or https://host:port")
    if parts.username or parts.password:
        raise ConfigError(f"backend {parts.hostname}: put its key into --backend-api-key-file, not into the URL")
    if parts.query or parts.fragment:
        raise ConfigError(f"backend {url!r} must end with its path; leave out what follows '?' or '#'")
    return url.rstrip("/")


def is_private(url: str) -> bool:
    """Whether nobody on the network can read what is sent there: TLS or this machine itself."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")

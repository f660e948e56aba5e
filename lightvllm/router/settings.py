"""``RouterSettings``: everything that can be set about the router, checked once when it is made.

Knows no command line: ``lightvllm router`` makes one from its options, tests make one by hand.
"""

from __future__ import annotations

import math

import msgspec

from lightvllm.errors import ConfigError

MiB = 1 << 20

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
)
"""What is routed by the body's ``model``. Other paths of a replica, its administration for one, cannot be reached."""


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the router behaves. Times are seconds. Raises ConfigError for a value that makes no sense.

    Attributes:
        models: known although no replica has them yet: requests for them are held.
        paths: what is routed by the body's ``model``.
        max_request_bytes: longest body; more is 413.
        max_body_memory: bytes of all bodies together, which are kept until their answers begin, and of answers that are
            kept until they are complete. A request beyond it is 503; an answer is passed on at once.
        body_timeout: within which a body must have come in full; then 408.
        connection_timeout: how long a client's connection may stay without a complete request.
        max_buffered_bytes: an answer that is no stream is passed on in one piece up to this size, so that it can be
            retried when it breaks off.
        affinity_bytes: how much of a prompt, or of each message up to the first user's, decides on the replica; 0
            turns affinity off.
        balance_factor: a replica with more than this many times the average load is passed over by affinity; from 1.
        affinity_slack: a replica with fewer requests than this is never passed over.
        max_in_flight: requests that one replica has at a time; the others are held. 0: no limit.
        connect_timeout: for a connection to a replica.
        header_timeout: from a request to the beginning of its answer; for one that is no stream that is the whole
            generation.
        idle_timeout: without a byte within an answer.
        max_tries: of one request, all replicas together.
        max_losses: tries that ended with a broken connection after the request had been sent: it may be the request
            that kills replicas.
        retry_timeout: from a request's arrival; no try begins later.
        hold_timeout: how long a request waits for a replica.
        max_held: requests per model that may wait; more are 503.
        keepalive: how long an idle connection to a replica is kept. Less than the replica's own time (uvicorn: 5), so
            that a request is not sent down a connection which the replica is closing.
        health_interval: between two probes of a replica, ±20 %.
        health_timeout: of a probe.
        healthy_after: successful probes after which an ejected replica gets requests again.
        eject_after: consecutive failures after which a replica is ejected; a refused connection or a 503 is enough.
        models_interval: between two looks at the models of a replica for which none were named.
        max_ejection: a replica that fails again after each return is kept out for 1, 2, 4 … seconds, at most this.
        drain_timeout: how long requests may take to finish once the router is told to end.
        metrics_without_key: /metrics and /queue.json need no key although there are some.
        access_log: a line per request.
    """

    models: tuple[str, ...] = ()
    paths: tuple[str, ...] = PATHS
    max_request_bytes: int = 32 * MiB
    max_body_memory: int = 1024 * MiB
    body_timeout: float = 60.0
    connection_timeout: float = 75.0
    max_buffered_bytes: int = 8 * MiB
    affinity_bytes: int = 1024
    balance_factor: float = 1.25
    affinity_slack: int = 4
    max_in_flight: int = 0
    connect_timeout: float = 5.0
    header_timeout: float = 600.0
    idle_timeout: float = 300.0
    max_tries: int = 10
    max_losses: int = 4
    retry_timeout: float = 600.0
    hold_timeout: float = 300.0
    max_held: int = 1000
    keepalive: float = 4.0
    health_interval: float = 2.0
    health_timeout: float = 2.0
    healthy_after: int = 2
    eject_after: int = 3
    models_interval: float = 30.0
    max_ejection: float = 60.0
    drain_timeout: float = 30.0
    metrics_without_key: bool = False
    access_log: bool = False

    def __post_init__(self) -> None:
        for name in ("max_request_bytes", "max_tries", "max_losses", "healthy_after", "eject_after"):
            self._at_least(name, 1)
        for name in ("max_buffered_bytes", "affinity_bytes", "affinity_slack", "max_in_flight", "max_held"):
            self._at_least(name, 0)
        self._at_least("max_body_memory", self.max_request_bytes)
        self._at_least("balance_factor", 1)
        for name in ("hold_timeout", "drain_timeout", "keepalive", "max_ejection", "retry_timeout"):
            self._at_least(name, 0)
        for name in (
            *("body_timeout", "connection_timeout", "connect_timeout", "header_timeout", "idle_timeout"),
            *("health_interval", "health_timeout", "models_interval"),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be more than 0 seconds")
        if wrong := [path for path in self.paths if not path.startswith("/") or any(c in path for c in "{}?# ")]:
            raise ConfigError(f"path {wrong[0]!r} must begin with a slash and hold none of '{{}}?# '")
        if not all(self.models):
            raise ConfigError("a model's name must not be empty")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not least <= value < math.inf:
            raise ConfigError(f"{name}={value} must be at least {least}")

"""The router's metrics, in Prometheus' format. Gauges are read from the pool when somebody asks.

What an autoscaler wants is ``lightvllm_router_pending_requests{model}``: requests that have come and are not done,
held ones included. It is there, with 0, for every known model, also one without a replica.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lightvllm.router.memory import Memory
from lightvllm.router.pool import Pool

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_KEEP_GONE = 600.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one router; nothing is global, so that several can live in one process.

    Args:
        keep_gone: seconds for which a backend that is gone is still told of.

    Attributes:
        requests: answered, by model, backend ("" if none was reached) and status: the HTTP status, "499" for clients
            that left, "broken" for answers that broke off.
        retries: tries that failed and were followed by another or given up, by model and reason.
        ejections: by backend.
        held: requests that had to wait for a replica, by model.
        hold_seconds: how long those waited; first_byte_seconds, request_seconds: from arrival.
    """

    def __init__(self, keep_gone: float = _KEEP_GONE) -> None:
        registry = self._registry = CollectorRegistry()
        self._keep_gone, self._gone_since = keep_gone, dict[str, float]()
        self._pool: Pool | None = None
        name = "lightvllm_router_"
        self.requests = Counter(
            name + "requests", "Requests answered.", ["model", "backend", "status"], registry=registry
        )
        self.retries = Counter(
            name + "failed_tries",
            "Tries that failed before anything was passed on.",
            ["model", "reason"],
            registry=registry,
        )
        self.ejections = Counter(name + "ejections", "Replicas taken out.", ["backend"], registry=registry)
        self.held = Counter(name + "held_requests", "Requests that waited for a replica.", ["model"], registry=registry)
        self.hold_seconds = Histogram(
            name + "hold_seconds", "How long those waited.", ["model"], buckets=_SECONDS, registry=registry
        )
        self.first_byte_seconds = Histogram(
            name + "time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            name + "request_seconds",
            "From a request's arrival to its end.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, pool: Pool, memory: Memory) -> None:
        """Show the pool's gauges, too, and how much memory bodies take."""
        self._pool = pool
        self._registry.register(_Gauges(pool, memory))

    def text(self) -> bytes:
        self.forget_gone()
        return generate_latest(self._registry)

    def forget_gone(self) -> None:
        """Drop what was counted of backends that have been gone for long: pods have new names again and again."""
        now = time.monotonic()
        here = {"", *(replica.name for replica in self._pool or ())}
        for counter, labels in ((self.requests, ("model", "backend", "status")), (self.ejections, ("backend",))):
            series = {
                tuple(sample.labels[label] for label in labels) for sample in next(iter(counter.collect())).samples
            }
            for values in series:
                backend = values[labels.index("backend")]
                if backend in here:
                    self._gone_since.pop(backend, None)
                elif now - self._gone_since.setdefault(backend, now) >= self._keep_gone:
                    counter.remove(*values)
        self._gone_since = {name: since for name, since in self._gone_since.items() if now - since < self._keep_gone}


class _Gauges(Collector):
    def __init__(self, pool: Pool, memory: Memory) -> None:
        self._pool, self._memory = pool, memory

    def collect(self) -> Iterator[GaugeMetricFamily]:
        pool, name = self._pool, "lightvllm_router_"
        pending = GaugeMetricFamily(
            name + "pending_requests", "Requests that have come and are not done.", labels=["model"]
        )
        waiting = GaugeMetricFamily(
            name + "waiting_requests", "Of those, requests held until a replica can take them.", labels=["model"]
        )
        ready = GaugeMetricFamily(name + "healthy_backends", "Replicas that get requests.", labels=["model"])
        for model in pool.models:
            pending.add_metric([model], pool.pending[model])
            waiting.add_metric([model], pool.num_held(model))
            ready.add_metric([model], sum(replica.usable and model in replica.models for replica in pool))
        in_flight = GaugeMetricFamily(
            name + "in_flight_requests", "Requests that a replica is busy with.", labels=["backend"]
        )
        healthy = GaugeMetricFamily(name + "backend_healthy", "1 if it gets requests.", labels=["backend"])
        for replica in pool:
            in_flight.add_metric([replica.name], replica.in_flight)
            healthy.add_metric([replica.name], int(replica.usable))
        kept = GaugeMetricFamily(
            name + "body_bytes", "Of requests whose answers have not begun.", value=self._memory.used
        )
        yield from (pending, waiting, ready, in_flight, healthy, kept)

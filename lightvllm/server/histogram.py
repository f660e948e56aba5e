"""``Histogram``: what Prometheus scrapes of a distribution, filled from one thread without locks.

prometheus_client's own takes a lock and one call for each observation; intervals between tokens come by the thousand,
many of them equal, so this one counts several at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily

# Upper bounds, as vLLM has them (vllm/v1/metrics/buckets.py), so that quantiles of both can be laid side by side.
REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FEW = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def token_bounds(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, … as far as ``longest`` tokens."""
    bounds = (mantissa * 10**exponent for exponent in range(12) for mantissa in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= max(longest, 1))


class Histogram:
    """How many values lie at or below each of ``bounds`` (ascending), how many there are, and their sum.

    Args:
        name: of the metric.
        documentation: one line for those who read the scrape.
    """

    __slots__ = ("_bounds", "_counts", "_documentation", "count", "name", "total")

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.count = 0
        self.total = 0.0
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.count += times
        self.total += value * times

    def family(self, labels: Mapping[str, str]) -> HistogramMetricFamily:
        """What has been counted so far, to be scraped under these labels."""
        family = HistogramMetricFamily(self.name, self._documentation, labels=list(labels))
        self.add_to(family, list(labels.values()))
        return family

    def add_to(self, family: HistogramMetricFamily, label_values: Sequence[str]) -> None:
        buckets, below = [], 0
        for bound, count in zip((*(repr(float(b)) for b in self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family.add_metric(label_values, buckets, self.total)

"""Histograms count as prometheus_client's do."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Theirs

from lightvllm.server.histogram import TOKEN_SECONDS, Histogram, token_bounds


def test_it_counts_as_prometheus_client_does() -> None:
    values = random.Random(0).choices([*TOKEN_SECONDS, 0.0, 0.005, 0.0251, 79.9, 80.1, 1e9], k=500)
    ours = Histogram("a_seconds", "What.", TOKEN_SECONDS)
    theirs = Theirs("a_seconds", "What.", ["l"], buckets=TOKEN_SECONDS, registry=CollectorRegistry())
    for value in values:
        ours.observe(value)
        theirs.labels("x").observe(value)
    expected = {
        (s.name, s.labels.get("le") and float(s.labels["le"])): s.value
        for family in theirs.collect()
        for s in family.samples
        if not s.name.endswith("_created")
    }
    got = {(s.name, s.labels.get("le") and float(s.labels["le"])): s.value for s in ours.family({"l": "x"}).samples}
    assert got == expected
    assert ours.count == 500


def test_several_at_once_are_as_many_one_by_one() -> None:
    at_once, one_by_one = Histogram("a", "", (1, 2)), Histogram("a", "", (1, 2))
    at_once.observe(1.5, 4)
    for _ in range(4):
        one_by_one.observe(1.5)
    assert at_once.family({}).samples == one_by_one.family({}).samples
    at_once.observe(9.0, 0)
    assert (at_once.count, at_once.total) == (4, 6.0)


def test_bounds_of_token_counts() -> None:
    assert token_bounds(2048) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert token_bounds(0) == (1,)

"""What the router counts of backends that come and go."""

from __future__ import annotations

import pytest

from lightvllm.router.memory import Memory
from lightvllm.router.metrics import Metrics
from lightvllm.router.pool import Pool, Snapshot
from lightvllm.router.replica import Target
from lightvllm.router.settings import RouterSettings


@pytest.mark.parametrize(("keep", "kept"), [(600.0, True), (0.0, False)])
def test_backends_that_are_gone_are_forgotten_in_the_end(keep, kept):
    metrics, pool = Metrics(keep), Pool(RouterSettings(models=("m",)))
    metrics.watch(pool, Memory(1))
    pool.update("test", Snapshot(tuple(Target(name=name, url=f"http://{name}") for name in ("old", "new"))))
    for name in ("old", "new", ""):
        metrics.requests.labels("m", name, "200").inc()
        metrics.ejections.labels(name).inc()
    assert metrics.text().count(b'backend="old"') >= 2
    pool.update("test", Snapshot((Target(name="new", url="http://new"),)))
    text = metrics.text()
    assert (b'backend="old"' in text) == kept
    for name in (b"new", b""):
        assert b'lightvllm_router_requests_total{backend="%b",model="m",status="200"} 1.0' % name in text
        assert b'lightvllm_router_ejections_total{backend="%b"} 1.0' % name in text

"""Replicas from Kubernetes: leaders get requests once they are ready, and models without leaders hold them."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("kubernetes", reason="the k8s extra is not installed")

from fake_kube import FakeKube
from fake_replica import replicas, routing, until

from lightvllm.errors import ConfigError
from lightvllm.router.discovery import Kubernetes
from lightvllm.router.sources import CheckedUrl


@pytest.mark.asyncio
async def test_a_model_scaled_to_zero_wakes_up_and_goes_to_sleep_again(tmp_path):
    kube = FakeKube()
    try:
        async with (
            replicas("json") as (one,),
            routing([Kubernetes("ns", kubeconfig=kube.kubeconfig(tmp_path))]) as router,
        ):
            pool = router.router.pool
            kube.inference("llama", model="m")
            await until(lambda: pool.models == ["m"], "the model is known")
            asked = asyncio.create_task(router.ask().__aenter__())
            await until(lambda: pool.num_held("m"), "the request is held")
            kube.leader("llama-0", "llama", "127.0.0.1", port=one.port, ready=False)
            await until(lambda: pool.replicas and pool.replicas[0].state == "healthy", "the pod answers probes")
            assert pool.num_held("m") == 1, "but is not ready"
            kube.leader("llama-0", "llama", "127.0.0.1", port=one.port)
            answer = await asked
            assert await answer.json() == {"from": "0"}
            assert pool.replicas[0].name == "ns/llama-0"
            kube.delete("pods", "llama-0")
            await until(lambda: not pool.replicas, "the pod is gone")
            assert pool.models == ["m"]
    finally:
        await asyncio.to_thread(kube.close)


def test_a_key_in_the_clear_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="would cross the network in the clear"):
        Kubernetes(kubeconfig=tmp_path / "none", check=CheckedUrl(has_key=True))

"""Configuration: what is refused by arithmetic alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from smollm2_folder import model

from lightvllm.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ExecutorConfig,
    ParallelConfig,
    SchedulerConfig,
)
from lightvllm.errors import ConfigError


def test_layouts(tmp_path: Path) -> None:
    config = model(tmp_path)
    for tp, pp in ((1, 1), (3, 2), (3, 30)):
        layout = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
        layout.check(config)
        assert (layout.world_size, layout.output_rank) == (tp * pp, tp * (pp - 1))
    # 9 ranks would divide the heads and share the KV heads, but not divide the intermediate size of 1536.
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 cannot split .*num_attention_heads=9.*; use 1 or 3"):
        ParallelConfig(tensor_parallel_size=2).check(config)
    with pytest.raises(ConfigError, match="more than the model's 30 layers"):
        ParallelConfig(pipeline_parallel_size=31).check(config)
    with pytest.raises(ConfigError, match="tensor_parallel_size=0"):
        ParallelConfig(tensor_parallel_size=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheConfig(block_size=12), "power of two"),
        (lambda: CacheConfig(num_blocks=0), "num_blocks=0"),
        (lambda: CacheConfig(memory_bytes=-1), "memory_bytes=-1"),
        (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs=0"),
        (lambda: SchedulerConfig(max_num_seqs=9, max_num_batched_tokens=8), "raise the first or lower the second"),
        (lambda: DeviceConfig(threads=-1), "threads=-1"),
        (lambda: DeviceConfig(gpu_memory_utilization=1.1), "gpu_memory_utilization=1.1"),
        (lambda: ExecutorConfig(name="mpi"), "executor='mpi' is unknown; use one of uniproc, ray, k8s"),
        (lambda: ExecutorConfig(name="ray", k8s_workers=("a:1",)), "use executor='k8s'"),
        (lambda: ExecutorConfig(name="k8s", k8s_workers=("a:1",), k8s_gpus_per_pod=0), "k8s_gpus_per_pod=0; use 1"),
        (
            lambda: ExecutorConfig(name="k8s", k8s_gpus_per_pod=2),
            "k8s_gpus_per_pod=2 is for k8s_workers or k8s_service, neither of which is given; leave it out",
        ),
        (lambda: ExecutorConfig(name="ray", k8s_service="llm"), "k8s_service='llm' is given, but executor='ray'; use "),
        (
            lambda: ExecutorConfig(name="k8s", k8s_service="llm", k8s_workers=("a:1",)),
            "k8s_workers and k8s_service='llm' are both given; keep one",
        ),
        (
            lambda: ExecutorConfig(name="k8s", k8s_pod_prefix="llm"),
            "k8s_pod_prefix='llm' is for k8s_service, which is not given; leave it out",
        ),
        (lambda: ExecutorConfig(name="k8s", ray_address="auto"), "use executor='ray'"),
        (lambda: ExecutorConfig(name="k8s", k8s_transport="tcp"), "use one of auto, grpc, direct"),
        (lambda: ExecutorConfig(name="ray", k8s_transport="grpc"), "use executor='k8s'"),
        (lambda: ExecutorConfig(start_timeout=0), "start_timeout=0"),
        (lambda: ExecutorConfig(step_timeout=float("inf")), "step_timeout=inf"),
    ],
)
def test_refused_settings(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_scheduling_is_asynchronous_where_there_is_one_stage(tmp_path: Path) -> None:
    def config(stages: int, asked: bool | None) -> EngineConfig:
        parallel = ParallelConfig(pipeline_parallel_size=stages)
        return EngineConfig(model=model(tmp_path), parallel=parallel, scheduler=SchedulerConfig(async_scheduling=asked))

    found = [config(*given).async_scheduling for given in ((1, None), (1, True), (1, False), (2, None), (2, False))]
    assert found == [True, True, False, False, False]
    with pytest.raises(ConfigError, match=r"async_scheduling=True with pipeline_parallel_size=2: .*leave .* out"):
        config(2, True)


def test_crosses_the_wire_unchanged(tmp_path: Path) -> None:
    config = EngineConfig(model=model(tmp_path), parallel=ParallelConfig(pipeline_parallel_size=2), seed=5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config

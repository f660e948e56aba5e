"""The worker by its typed calls: start-up, memory, steps, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import tiny_llama
import torch
from worker_group import Driver, LocalWorker

from lightvllm.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from lightvllm.errors import ConfigError, LightvllmError, WorkerError
from lightvllm.messages import TYPED_METHODS, WorkerInit
from lightvllm.worker import Worker

GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


def config(folder: Path, **fields: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "model": ModelConfig.from_dir(folder),
        "cache": CacheConfig(block_size=4),
        "device": DeviceConfig(device="cpu", threads=1, kernels="reference"),
    }
    return EngineConfig(**(values | fields))


def init(config: EngineConfig, rank: int = 0, world: int = 1, local: int | None = None) -> WorkerInit:
    return WorkerInit(
        rank=rank, local_rank=rank, local_world_size=local or world, device_index=rank, world_size=world, config=config
    )


def loaded(config: EngineConfig) -> Worker:
    worker = Worker()
    worker.init_worker(init(config))
    worker.init_device("")
    worker.load_model()
    return worker


def test_it_has_every_typed_method() -> None:
    assert {name for name in vars(Worker) if not name.startswith("_")} >= set(TYPED_METHODS)


def test_the_package_imports_no_torch_until_the_class_is_used() -> None:
    script = "import sys, lightvllm.worker as w; assert 'torch' not in sys.modules; w.Worker; sys.modules['torch']"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_start_up_reports_what_was_chosen(folder: Path) -> None:
    driver = Driver(LocalWorker(), config(folder))
    (info,) = driver.infos
    assert (info.rank, info.device, info.threads) == (0, "cpu", 1)
    assert (info.attention_backend, info.kernels) == ("sdpa", "reference")
    driver._workers.call([0], "check_health")


def test_parameter_bytes_are_those_of_the_checkpoint(folder: Path) -> None:
    from safetensors.torch import load_file

    expected = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    (info,) = Driver(LocalWorker(), config(folder)).infos
    assert info.parameter_bytes == expected


@pytest.mark.parametrize(("asked", "name"), [("naive", "naive"), ("sdpa", "sdpa"), ("paged", "paged")])
def test_the_attention_backend_can_be_chosen(folder: Path, asked: Any, name: str) -> None:
    device = DeviceConfig(device="cpu", threads=1, attention_backend=asked, kernels="reference")
    driver = Driver(LocalWorker(), config(folder, device=device))
    assert driver.infos[0].attention_backend == name
    expected = Driver(LocalWorker(), config(folder)).generate([[5, 6, 7], [9]], 8)
    assert driver.generate([[5, 6, 7], [9]], 8) == expected


@pytest.mark.parametrize(("threads", "local", "expected"), [(3, 1, 3), (0, 1, None), (0, 1000, 1)])
def test_threads_are_shared_out_over_the_workers_of_a_host(
    folder: Path, threads: int, local: int, expected: int | None
) -> None:
    worker = Worker()
    device = DeviceConfig(device="cpu", threads=threads, kernels="reference")
    before = torch.get_num_threads()
    try:
        worker.init_worker(init(config(folder, device=device), local=local))
        assert torch.get_num_threads() == (expected or len(os.sched_getaffinity(0)))
    finally:
        torch.set_num_threads(before)


def test_a_block_costs_what_its_tensors_cost(folder: Path) -> None:
    worker = loaded(config(folder))
    # 3 layers × key and value × 4 tokens × 2 heads × 8 × 4 bytes
    assert worker.get_kv_cache_spec().bytes_per_block == 3 * 2 * 4 * 2 * 8 * 4
    worker.initialize_from_config(40)
    assert worker._runner is not None
    caches = worker._runner._caches
    assert sum(t.nbytes for cache in caches for t in cache) == 40 * worker.get_kv_cache_spec().bytes_per_block


def test_memory_that_was_asked_for_is_given(folder: Path) -> None:
    assert loaded(config(folder, cache=CacheConfig(memory_bytes=12345))).determine_available_memory() == 12345


def test_the_default_memory_is_the_least_of_three(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: int) -> None:
        real = psutil.virtual_memory()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=size))

    scheduler = SchedulerConfig(max_num_seqs=5)
    worker = loaded(config(folder, scheduler=scheduler))
    free(64 * GIB)
    assert worker.determine_available_memory() == 5 * (128 // 4) * worker.get_kv_cache_spec().bytes_per_block
    worker = loaded(config(folder, scheduler=SchedulerConfig(max_num_seqs=50_000, max_num_batched_tokens=50_000)))
    assert worker.determine_available_memory() == GIB
    free(GIB)
    assert worker.determine_available_memory() == GIB // 2
    assert worker._init is not None
    worker._init = msgspec.structs.replace(worker._init, local_world_size=4)
    assert worker.determine_available_memory() == GIB // 8


def test_a_cache_that_cannot_hold_one_sequence_is_refused(folder: Path) -> None:
    worker = loaded(config(folder))
    with pytest.raises(
        ConfigError,
        match=r"31 blocks holds 124 tokens, fewer than max_model_len=128; "
        r"give it 49152 bytes per worker, or lower max_model_len to 124",
    ):
        worker.initialize_from_config(31)
    worker.initialize_from_config(32)


def test_warm_up_leaves_no_sequence_behind(folder: Path) -> None:
    worker = loaded(config(folder))
    worker.initialize_from_config(32)
    worker.compile_or_warm_up_model()
    assert worker._runner is not None
    assert len(worker._runner._sequences) == 0


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_warm_up_fits_the_smallest_cache(folder: Path, block_size: int) -> None:
    model = ModelConfig.from_dir(folder, max_model_len=1)
    worker = loaded(config(folder, model=model, cache=CacheConfig(block_size=block_size)))
    worker.initialize_from_config(1)
    worker.compile_or_warm_up_model()


def test_calls_out_of_order_say_what_comes_first(folder: Path) -> None:
    worker = Worker()
    with pytest.raises(LightvllmError, match="call init_worker first"):
        worker.init_device("")
    worker.init_worker(init(config(folder)))
    with pytest.raises(LightvllmError, match="call init_device first"):
        worker.load_model()
    worker.init_device("")
    for method in (worker.get_kv_cache_spec, worker.determine_available_memory, worker.compile_or_warm_up_model):
        with pytest.raises(LightvllmError, match="call load_model first"):
            method()
    worker.load_model()
    with pytest.raises(LightvllmError, match="call initialize_from_config first"):
        worker.compile_or_warm_up_model()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"device='cuda' needs CUDA device number 0 .* but the worker sees 0; use"):
        Driver(LocalWorker(), config(folder, device=DeviceConfig(device="cuda")))


def test_a_peer_that_cannot_be_met_is_an_error_within_the_time_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers were announced, and one comes."""
    from lightvllm.layers import parallel

    monkeypatch.setattr(parallel, "CONNECT_TIMEOUT", 0.5)
    worker = Worker()
    layout = ParallelConfig(tensor_parallel_size=2, collective_timeout=0.5)
    worker.init_worker(init(config(folder, parallel=layout), world=2))
    rendezvous = worker.open_rendezvous()
    assert rendezvous.startswith("127.0.0.1:")
    with pytest.raises(LightvllmError, match="the meeting failed, because another worker"):
        worker.init_device(rendezvous)


def test_two_workers_in_one_process_keep_apart(folder: Path, tmp_path: Path) -> None:
    one = Driver(LocalWorker(), config(folder))
    other = Driver(LocalWorker(), config(tiny_llama.build(tmp_path, seed=5)))
    prompts = [[5, 6, 7], [8, 9]]
    first, second = one.generate(prompts, 6), other.generate(prompts, 6)
    assert first != second
    assert one.generate(prompts, 6) == first


def test_a_failed_step_leaves_the_worker_usable(folder: Path) -> None:
    from lightvllm.messages import ScheduledSequence

    local = LocalWorker()
    driver = Driver(local, config(folder))
    expected = driver.generate([[5, 6, 7]], 5)
    with pytest.raises(WorkerError, match="does not know"):
        local.call_each([0], [_execute(ScheduledSequence(3, 0, 1, [], [0]))])
    local.call([0], "reset_sequences")
    assert driver.generate([[5, 6, 7]], 5) == expected


def _execute(*scheduled: Any) -> tuple[str, bytes]:
    from lightvllm.messages import StepInput, encode_call

    return encode_call("execute_model", (StepInput(step=1, scheduled=list(scheduled)),), None)

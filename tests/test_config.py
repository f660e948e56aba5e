"""Configuration: what ``config.json`` says, and what is refused by arithmetic alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightvllm.config import (
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ExecutorConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)
from lightvllm.errors import ConfigError

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def model(folder: Path, changes: dict[str, Any] | None = None, **kwargs: Any) -> ModelConfig:
    raw = SMOLLM2 | (changes or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return ModelConfig.from_dir(folder, load_format="dummy", **kwargs)


def test_reads_a_hugging_face_config(tmp_path: Path) -> None:
    config = model(tmp_path)
    assert (config.dtype, config.head_dim, config.max_model_len, config.eos_token_ids) == ("bfloat16", 64, 8192, (2,))
    assert config.rope_scaling is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert model(tmp_path, dtype="float32", max_model_len=100).eos_token_ids == (2, 7)


def test_reads_both_spellings_of_rope(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = model(tmp_path, {"rope_scaling": llama3})
    new = model(tmp_path, {"rope_theta": ..., "rope_parameters": llama3 | {"rope_theta": 100000.0}})
    assert old.rope_scaling is not None
    assert old.rope_scaling.factor == 32.0
    assert (old.rope_scaling, old.rope_theta) == (new.rope_scaling, new.rope_theta)


@pytest.mark.parametrize(
    ("changes", "kwargs", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, {}, "GPT2LMHeadModel is not supported; supported: LlamaForCausalLM"),
        ({"architectures": ...}, {}, "none named"),
        ({"hidden_act": "gelu"}, {}, "hidden_act='gelu' is not supported; expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, {}, "use the unquantised model"),
        ({"vocab_size": ...}, {}, "lacks 'vocab_size'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, {}, "supported: llama3, linear"),
        ({"num_key_value_heads": 2}, {}, "no multiple of num_key_value_heads=2"),
        ({}, {"dtype": "int8"}, "dtype='int8' is not supported"),
        ({"torch_dtype": "float64"}, {}, "dtype='float64' is not supported"),
        ({}, {"max_model_len": 8193}, "use 1 to 8192"),
        ({}, {"max_model_len": 0}, "use 1 to 8192"),
    ],
)
def test_refused_models(tmp_path: Path, changes: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(tmp_path, changes, **kwargs)


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        ModelConfig.from_dir(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    with pytest.raises(ConfigError, match=r"no \*.safetensors file"):
        ModelConfig.from_dir(tmp_path)


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

"""The arithmetic of memory: the same as what our workers report, and what is published of well-known models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny_llama
import torch

from lightvllm.config import stage_layers
from lightvllm.errors import ConfigError
from lightvllm.layers.attention import NaiveAttention
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.weights import parameter_bytes
from lightvllm.model_config import ModelConfig
from lightvllm.models.registry import build_model
from lightvllm.operator import memory, templates
from lightvllm.operator.memory import GIB, Device, fit

GPU = Device(80 * GIB)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("models") / "tiny")


def rank(tensor: int, pipeline: int, tp_rank: int, stage: int) -> ParallelContext:
    """One that computes nothing, so that it needs no peers."""
    return ParallelContext(torch.device("cpu"), stage * tensor + tp_rank, tensor, pipeline)


VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"pooling": "last"},
    {"dtype": "bfloat16", "head_dim": 16},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: ",".join(fields) or "plain")
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)])
def test_each_rank_holds_what_is_computed(tiny: Path, fields: dict[str, Any], tensor: int, pipeline: int) -> None:
    config = msgspec.structs.replace(ModelConfig.from_dir(tiny), **fields)
    found = fit(config, tensor, pipeline, GPU)
    for share in found.shares:
        models = [
            build_model(config, rank(tensor, pipeline, each, share.stage), NaiveAttention()) for each in range(tensor)
        ]
        allocated = [_allocated(model) for model in models]
        assert share.weights == max(allocated) == allocated[0]
        (first, *_) = models
        assert share.layers == first.num_layers
        per_token = 2 * first.num_layers * first.num_kv_heads * first.head_dim * config.dtype_bytes
        assert share.kv_per_token == per_token


def _allocated(model: Any) -> int:
    """Bytes of parameters, the vocabulary's padding included."""
    ends = {id(m): m for m in (model.model.embed_tokens, getattr(model.lm_head, "matrix", None)) if m is not None}
    padding = sum((m.weight.shape[0] - m.rows) * m.weight.shape[1] * m.weight.element_size() for m in ends.values())
    return parameter_bytes(model.weights()) + padding


def test_a_worker_reports_the_same(tiny: Path) -> None:
    from lightvllm.config import CacheConfig, DeviceConfig, EngineConfig
    from lightvllm.worker.model_runner import ModelRunner

    model = memory.read(tiny)
    device = DeviceConfig(device="cpu", threads=1, kernels="reference")
    config = EngineConfig(model=ModelConfig.from_dir(tiny), cache=CacheConfig(block_size=16), device=device)
    runner = ModelRunner(config, rank(1, 1, 0, 0), NaiveAttention())
    (share,) = fit(model, 1, 1, GPU).shares
    assert runner.parameter_bytes == share.weights == memory.parameters(model) * 4
    assert runner.bytes_per_block == 16 * share.kv_per_token


def test_the_tiny_models_parameters_are_those_of_transformers(tiny: Path) -> None:
    from safetensors.torch import load_file

    assert memory.parameters(memory.read(tiny)) == sum(
        t.numel() for t in load_file(tiny / "model.safetensors").values()
    )


@pytest.mark.parametrize("architecture", ["Qwen3", "Mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_other_architectures_have_the_parameters_of_transformers(tmp_path: Path, architecture: str, tied: bool) -> None:
    import transformers

    fields = {
        "vocab_size": 331,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    config = getattr(transformers, f"{architecture}Config")(**fields)
    with torch.device("meta"):
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    config.architectures = [f"{architecture}ForCausalLM"]
    config.save_pretrained(tmp_path)
    assert memory.parameters(memory.read(tmp_path)) == model.num_parameters()


def test_our_engine_still_refuses_what_is_only_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM is not supported"):
        ModelConfig.from_dir(tmp_path, load_format="dummy")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ConfigError, match="supported: LlamaForCausalLM, LlamaModel, MistralForCausalLM, Qwen3"):
        memory.read(tmp_path)


@pytest.mark.demo
def test_the_demo_model_is_the_catalogues() -> None:
    from lightvllm import hub

    folder = hub.resolve("smollm2-135m")
    read, listed = memory.read(folder), templates.SMOLLM2_135M
    differing = {name for name in ModelConfig.__struct_fields__ if getattr(read, name) != getattr(listed, name)}
    assert differing <= {"path", "bos_token_id", "eos_token_ids", "load_format"}
    assert memory.parameters(read) == 134_515_008
    assert fit(read, 3, 2, GPU).shares[0].kv_per_token == 2 * 15 * 1 * 64 * 4


def test_the_cache_is_what_is_left() -> None:
    model = templates.LLAMA_31_8B
    (share,) = fit(model, 1, 1, GPU, max_num_seqs=64).shares
    assert share.weights == 8_030_261_248 * 2
    assert share.activations == 8192 * (3 * 4096 + 3 * 14336) * 2 + 64 * 128256 * 8
    assert share.cache == 72 * GIB - GIB - share.weights - share.activations
    assert share.kv_per_token == 2 * 32 * 8 * 128 * 2
    assert share.tokens == share.cache // (131072 * 16) * 16
    assert fit(model, 1, 1, replace(GPU, cache_limit=GIB)).tokens == 8192


def test_more_ranks_than_kv_heads_each_have_one() -> None:
    assert memory.kv_bytes_per_token(templates.LLAMA_31_8B, 16, 1, 0) == 2 * 32 * 1 * 128 * 2


def test_the_stage_with_the_fewest_tokens_counts() -> None:
    model = msgspec.structs.replace(templates.LLAMA_31_8B, num_hidden_layers=31)
    found = fit(model, 1, 2, GPU)
    assert [share.layers for share in found.shares] == [len(stage_layers(31, 2, each)) for each in (0, 1)] == [16, 15]
    assert found.tightest.stage == 0
    assert found.tokens == found.shares[0].tokens < found.shares[1].tokens


@pytest.mark.parametrize(
    ("gpu", "layout"),
    [(160, (1, 1)), (80, (2, 1)), (44, (4, 1)), (22, (8, 1)), (14, (8, 2))],
)
def test_the_smallest_layout(gpu: int, layout: tuple[int, int]) -> None:
    model = msgspec.structs.replace(templates.LLAMA_33_70B, max_model_len=8192)
    found = memory.smallest(model, Device(gpu * GIB))
    assert found is not None
    assert (found.tensor, found.pipeline) == layout
    for tensor, pipeline in ((layout[0] // 2, layout[1]), (layout[0], layout[1] - 1)):
        if tensor and pipeline:
            assert not fit(model, tensor, pipeline, Device(gpu * GIB)).fits


def test_the_error_names_the_smallest_layout() -> None:
    found = fit(templates.LLAMA_33_70B, 1, 1, GPU)
    with pytest.raises(ConfigError) as error:
        memory.check(found)
    assert str(error.value) == (
        "meta-llama/Llama-3.3-70B-Instruct does not fit -tp 1 -pp 1 on GPUs of 80.00 GiB with 0.9 in use: "
        "131.42 GiB of weights and 2.93 GiB besides leave nothing for the KV cache; "
        "the smallest layout that fits is -tp 1 -pp 3"
    )


def test_the_error_of_a_context_that_is_too_long() -> None:
    model = templates.MISTRAL_7B
    found = fit(model, 1, 1, Device(20 * GIB))
    assert 0 < found.tokens < model.max_model_len
    with pytest.raises(ConfigError, match=rf"hold {found.tokens} tokens.* or lower max_model_len to {found.tokens}$"):
        memory.check(found)
    memory.check(fit(msgspec.structs.replace(model, max_model_len=found.tokens), 1, 1, Device(20 * GIB)))


def test_no_layout_at_all() -> None:
    with pytest.raises(ConfigError, match="no layout of up to 64 such GPUs fits"):
        memory.check(fit(templates.LLAMA_33_70B, 1, 1, Device(GIB)))


def test_a_split_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 cannot split this model"):
        fit(templates.LLAMA_31_8B, 3, 1, GPU)
    with pytest.raises(ConfigError, match="pipeline_parallel_size=33 is more than"):
        fit(templates.LLAMA_31_8B, 1, 33, GPU)

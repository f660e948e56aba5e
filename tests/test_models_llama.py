"""How the model is split: the layers of the stages, and which tensors each rank asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama
import torch
from safetensors import safe_open

from lightvllm.config import ModelConfig, stage_layers
from lightvllm.errors import ConfigError
from lightvllm.layers.attention import NaiveAttention
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.weights import parameter_bytes
from lightvllm.models.llama import LlamaForCausalLM
from lightvllm.models.registry import build_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("pp", range(1, 8))
@pytest.mark.parametrize("layers", [7, 8, 30])
def test_stages_are_even_and_the_earlier_ones_take_the_remainder(layers: int, pp: int) -> None:
    stages = [stage_layers(layers, pp, rank) for rank in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def model(config: ModelConfig, rank: int = 0, tp: int = 1, pp: int = 1) -> LlamaForCausalLM:
    return build_model(config, ParallelContext(CPU, rank, tp, pp), NaiveAttention())


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("tied", [False, True])
def test_the_stages_together_want_the_whole_checkpoint(tmp_path: Path, tied: bool) -> None:
    folder = tiny_llama.build(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    config = ModelConfig.from_dir(folder)
    stages = [[w.name for w in model(config, rank, 1, 2).weights()] for rank in range(2)]
    assert set(stages[0]) | set(stages[1]) == names_in(folder)
    shared = set(stages[0]) & set(stages[1])
    assert shared == ({"model.embed_tokens.weight"} if tied else set())
    assert all(len(names) == len(set(names)) for names in stages)
    assert all(model(config).is_known(name) for name in names_in(folder))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_tensor_ranks_slices_cover_each_tensor(tmp_path: Path, tp: int) -> None:
    config = ModelConfig.from_dir(tiny_llama.build(tmp_path, attention_bias=True))
    covered: dict[str, torch.Tensor] = {}
    for rank in range(tp):
        for w in model(config, rank, tp).weights():
            seen = covered.setdefault(w.name, torch.zeros(w.shape))
            seen.narrow(w.dim, w.start, w.target.shape[w.dim]).add_(1)
    replicas = max(1, tp // config.num_key_value_heads)
    for name, seen in covered.items():
        whole = "norm" in name or name.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"))
        counts = set(seen.flatten().tolist())
        assert counts == {float((tp if "norm" in name else replicas) if whole else 1)}, name


def test_a_tied_model_holds_its_embedding_once(tmp_path: Path) -> None:
    tied = ModelConfig.from_dir(tiny_llama.build(tmp_path / "tied", tie_word_embeddings=True))
    plain = ModelConfig.from_dir(tiny_llama.build(tmp_path / "plain"))
    built = model(tied)
    assert built.lm_head is not None
    assert built.model.embed_tokens is not None
    assert built.lm_head.weight is built.model.embed_tokens.weight
    size = tied.vocab_size * tied.hidden_size * 4
    assert parameter_bytes(model(plain).weights()) - parameter_bytes(built.weights()) == size


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.x.mlp.up_proj.weight",
        "vision_tower.weight",
        "model.layers.0",
    ],
)
def test_tensors_of_another_model_are_not_known(tmp_path: Path, name: str) -> None:
    assert not model(ModelConfig.from_dir(tiny_llama.build(tmp_path))).is_known(name)


def test_stored_rotary_frequencies_of_older_checkpoints_are_known(tmp_path: Path) -> None:
    built = model(ModelConfig.from_dir(tiny_llama.build(tmp_path)))
    assert built.is_known("model.layers.2.self_attn.rotary_emb.inv_freq")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    import msgspec

    config = msgspec.structs.replace(ModelConfig.from_dir(tiny_llama.build(tmp_path)), architecture="MambaForCausalLM")
    with pytest.raises(ConfigError, match="'MambaForCausalLM' is not supported; use LlamaForCausalLM"):
        model(config)

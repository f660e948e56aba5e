"""Loading: sharded and whole checkpoints, casts, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError
from lightvllm.layers.attention import NaiveAttention
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.weights import WeightSlice
from lightvllm.models import loader
from lightvllm.models.loader import load_weights
from lightvllm.models.registry import build_model

CPU = torch.device("cpu")


def loaded(folder: Path, rank: int = 0, tp: int = 1, **fields: str) -> dict[str, WeightSlice]:
    config = ModelConfig.from_dir(folder, **fields)  # type: ignore[arg-type]
    model = build_model(config, ParallelContext(CPU, rank, tp), NaiveAttention())
    load_weights(model, config)
    return {w.name: w for w in model.weights()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama.build(tmp_path / "model")


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("piece", [64, 1000, 64 << 20])
def test_each_rank_gets_its_slices(folder: Path, tp: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the pieces: single rows, some rows, whole tensors."""
    monkeypatch.setattr(loader, "PIECE_BYTES", piece)
    whole = load_file(folder / "model.safetensors")
    for rank in range(tp):
        for name, w in loaded(folder, rank, tp).items():
            assert torch.equal(w.target, whole[name].narrow(w.dim, w.start, w.target.shape[w.dim])), name


def test_a_sharded_checkpoint_is_the_whole_one(tmp_path: Path, folder: Path) -> None:
    sharded = tiny_llama.build(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    theirs = loaded(folder)
    for name, w in loaded(sharded).items():
        assert torch.equal(w.target, theirs[name].target), name
    (sharded / "model.safetensors.index.json").unlink()
    for name, w in loaded(sharded).items():
        assert torch.equal(w.target, theirs[name].target), name


@pytest.mark.parametrize(
    ("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_weights_are_cast_to_the_dtype_that_was_asked_for(tmp_path: Path, stored: str, asked: str) -> None:
    folder = tiny_llama.build(tmp_path, dtype=stored)
    whole = load_file(folder / "model.safetensors")
    for name, w in loaded(folder, dtype=asked).items():
        assert w.target.dtype == getattr(torch, asked)
        assert torch.equal(w.target, whole[name].to(w.target.dtype))


def rewrite(folder: Path, drop: tuple[str, ...] = (), **add: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if name not in drop}
    save_file(tensors | add, path)


def test_missing_tensors_are_named(folder: Path) -> None:
    rewrite(folder, drop=("model.layers.1.mlp.up_proj.weight", "model.norm.weight"))
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight; is"):
        loaded(folder)


def test_unexpected_tensors_are_named(folder: Path) -> None:
    extra = {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(1) for n in range(3, 10)}
    rewrite(folder, **extra)
    with pytest.raises(ConfigError, match=r"3 layers does not know: model\.layers\.3\S+ .* and 2 more; does config"):
        loaded(folder)


def test_a_wrong_shape_is_told_with_the_right_one(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.zeros(31)})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has shape \[31\]; config\.json asks for \[32\]"):
        loaded(folder)


def test_a_quantised_tensor_is_refused(folder: Path) -> None:
    rewrite(folder, **{"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    with pytest.raises(ConfigError, match="dtype I8; expected one of F64, F32, F16, BF16"):
        loaded(folder)


def test_a_cut_file_is_told(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read as safetensors .*; download it again"):
        loaded(folder)


def test_an_index_that_names_an_absent_file_is_told(tmp_path: Path) -> None:
    folder = tiny_llama.build(tmp_path, max_shard_size="40KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ConfigError, match=f"names files that are not there: {victim.name}"):
        loaded(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_told(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="no usable weight_map"):
        loaded(folder)


def test_a_tensor_in_two_files_is_told(tmp_path: Path) -> None:
    folder = tiny_llama.build(tmp_path, max_shard_size="40KB")
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "other.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is both in .* and in other\.safetensors; keep one"):
        loaded(folder)


@pytest.mark.parametrize("tp", [2, 4])
def test_generated_weights_of_a_shard_are_a_shard_of_the_whole(folder: Path, tp: int) -> None:
    whole = {name: w.target for name, w in loaded(folder, load_format="dummy").items()}
    for rank in range(tp):
        for name, w in loaded(folder, rank, tp, load_format="dummy").items():
            assert torch.equal(w.target, whole[name].narrow(w.dim, w.start, w.target.shape[w.dim])), name
    flat = torch.cat([t.flatten() for name, t in whole.items() if "norm" not in name])
    assert flat.std() == pytest.approx(0.02, rel=0.02)
    assert flat.mean().abs() < 1e-3
    assert not torch.equal(whole["model.layers.0.mlp.up_proj.weight"], whole["model.layers.1.mlp.up_proj.weight"])


def test_generated_weights_need_no_checkpoint(folder: Path) -> None:
    before = {name: w.target for name, w in loaded(folder, load_format="dummy").items()}
    (folder / "model.safetensors").unlink()
    for name, w in loaded(folder, load_format="dummy").items():
        assert torch.equal(w.target, before[name])


def test_generated_weights_do_not_depend_on_the_piece(folder: Path) -> None:
    """Row n of a tensor is the same whether the tensor is made at once or from row n on."""
    full, part = torch.empty(9, 5), torch.empty(4, 5)
    loader._generate(WeightSlice("w", (9, 5), full))
    loader._generate(WeightSlice("w", (9, 5), part, 0, 3))
    assert torch.equal(part, full[3:7])
    assert len(np.unique(full.numpy())) == 45


MEASURE = """
import resource, sys
import torch
from lightvllm.config import ModelConfig
from lightvllm.layers.attention import NaiveAttention
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.weights import parameter_bytes
from lightvllm.models.loader import load_weights
from lightvllm.models import llama
from lightvllm.models.registry import build_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

config = ModelConfig.from_dir(sys.argv[1], dtype=sys.argv[2])
torch.set_num_threads(1)
before = peak()
model = build_model(config, ParallelContext(torch.device("cpu")), NaiveAttention())
load_weights(model, config)
print(peak() - before, parameter_bytes(model.weights()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_one_copy_of_the_weights(tmp_path: Path, dtype: str) -> None:
    """A model of 330 MB in float32, two thirds of it in one tensor. One piece more, and the headers, are allowed."""
    folder = tiny_llama.build(
        tmp_path,
        vocab_size=110_000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        tie_word_embeddings=True,
    )
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype], capture_output=True, text=True, timeout=200, check=True
    )
    peak, weights = map(int, run.stdout.split())
    assert weights > 130e6
    assert peak < weights + 1.5 * loader.PIECE_BYTES + 10e6, (peak, weights)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 110_000

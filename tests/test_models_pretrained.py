"""``LightvLLM`` against transformers: the project's founding check, logits within 1e-4 in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch

from lightvllm import LightvLLM, kernels
from lightvllm.errors import ConfigError

BACKENDS = ["naive", "sdpa", "paged"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "own head size, one kv head": {"head_dim": 20, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: tiny_llama.build(base / str(i), **config) for i, (name, config) in enumerate(VARIANTS.items())}


def transformers_logits(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids).logits
    return logits


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tiny_llama.VOCAB_SIZE, (batch, length), generator=generator)


@pytest.fixture(params=["auto", "reference"])
def kernels_in_use(request: pytest.FixtureRequest) -> Iterator[str]:
    """Compiled kernels where this machine can build them, and torch's own operations."""
    kernels.use(request.param)
    yield request.param
    kernels.use("auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("kernels_in_use")
def test_prefill_and_every_decode_step_give_transformers_logits(
    folders: dict[str, Path], variant: str, backend: str
) -> None:
    folder, input_ids = folders[variant], tokens(2, 70)
    expected = transformers_logits(folder, input_ids)
    assert expected.std() > 0.5  # the comparison must not be one of zeros
    model = LightvLLM.from_pretrained(folder, attention_backend=backend)
    assert torch.allclose(model(input_ids).logits, expected, atol=1e-4)
    cache = model.new_cache(batch=2, capacity=70)
    assert torch.allclose(model(input_ids[:, :37], cache).logits, expected[:, :37], atol=1e-4)
    for i in range(37, 70):
        assert torch.allclose(model(input_ids[:, i : i + 1], cache).logits, expected[:, i : i + 1], atol=1e-4), i
    assert cache.length == 70


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [[16, 16, 16], [1, 30, 17], [47, 1], [5] * 9 + [3]])
def test_a_prompt_in_chunks_is_the_prompt_as_a_whole(folders: dict[str, Path], backend: str, chunks: list[int]) -> None:
    model, input_ids = LightvLLM.from_pretrained(folders["plain"], attention_backend=backend), tokens(3, 48)
    cache = model.new_cache(3)
    parts = [model(part, cache).logits for part in input_ids.split(chunks, 1)]
    assert torch.allclose(torch.cat(parts, 1), model(input_ids).logits, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_is_near_float32(folders: dict[str, Path], dtype: str, tolerance: float) -> None:
    input_ids = tokens(2, 40)
    expected = transformers_logits(folders["plain"], input_ids)
    model = LightvLLM.from_pretrained(folders["plain"], dtype=dtype)
    assert model.config.dtype == dtype
    logits = model(input_ids).logits
    assert logits.dtype == torch.float32
    logits.add_(0.0)  # an ordinary tensor, the caller's own
    assert (logits - expected).abs().max() < tolerance * expected.std() * 3
    assert not torch.allclose(logits, expected, atol=1e-4)  # it was truly computed in half precision


def test_auto_takes_the_checkpoints_dtype(tmp_path: Path) -> None:
    assert LightvLLM.from_pretrained(tiny_llama.build(tmp_path, dtype="bfloat16")).config.dtype == "bfloat16"


def test_two_caches_of_one_model_do_not_mix(folders: dict[str, Path]) -> None:
    model = LightvLLM.from_pretrained(folders["plain"])
    a, b = tokens(1, 20, seed=1), tokens(1, 20, seed=2)
    one, other = model.new_cache(1), model.new_cache(1)
    for i in range(0, 20, 5):
        ours, theirs = model(a[:, i : i + 5], one).logits, model(b[:, i : i + 5], other).logits
    assert torch.allclose(ours, model(a).logits[:, 15:], atol=1e-5)
    assert torch.allclose(theirs, model(b).logits[:, 15:], atol=1e-5)


def test_bad_calls_say_what_would_be_right(folders: dict[str, Path]) -> None:
    model = LightvLLM.from_pretrained(folders["plain"], max_model_len=32)
    for input_ids, message in (
        (torch.zeros(3, dtype=torch.int64), r"expected integers \[batch, length\]"),
        (torch.zeros(1, 3), r"expected integers \[batch, length\]"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        (torch.tensor([[0, 331]]), "expected 0 to 330"),
        (torch.tensor([[-1]]), "expected 0 to 330"),
        (tokens(1, 33), "more than max_model_len=32"),
    ):
        with pytest.raises(ConfigError, match=message):
            model(input_ids)
    cache = model.new_cache(2, capacity=20)
    with pytest.raises(ConfigError, match=r"make one with new_cache\(1\)"):
        model(tokens(1, 3), cache)
    model(tokens(2, 18), cache)
    with pytest.raises(ConfigError, match="3 tokens after 18 do not fit the cache's capacity of 20"):
        model(tokens(2, 3), cache)
    assert cache.length == 18
    for batch, capacity in ((0, 5), (1, 0), (1, 33)):
        with pytest.raises(ConfigError, match="use a batch of 1 or more and a capacity of 1 to 32"):
            model.new_cache(batch, capacity)
    with pytest.raises(ConfigError, match="attention_backend='flash' is unknown"):
        LightvLLM.from_pretrained(folders["plain"], attention_backend="flash")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device; use device='cpu'"):
        LightvLLM.from_pretrained(folders["plain"], device="cuda")

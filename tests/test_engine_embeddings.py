"""Embeddings of real models: what transformers' hidden states give, on every layout and whatever the batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch

from lightvllm import LLM, SamplingParams
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError
from lightvllm.pooling import Pooling

TEXTS = [
    "The quick brown fox",
    "Paris is the capital of France",
    "x",
    "One token after another, the model says what it has to say.",
    "The quick brown fox jumps over the lazy dog",
]
MODES = {"last": "lasttoken", "mean": "mean_tokens", "cls": "cls_token"}


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("generating"))


@pytest.fixture(scope="module")
def bare(generating: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same decoder as ``LlamaModel`` saves it: no head, and names without a prefix."""
    from safetensors import safe_open
    from transformers import LlamaModel

    folder = tmp_path_factory.mktemp("bare")
    LlamaModel.from_pretrained(generating).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert not any(name.startswith(("model.", "lm_head")) for name in file.keys())  # noqa: SIM118
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((generating / name).read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def states(generating: Path) -> list[torch.Tensor]:
    """transformers' final hidden states [T, N] of each text."""
    from transformers import LlamaModel

    model, tokenizer = LlamaModel.from_pretrained(generating), Tokenizer.from_dir(generating)
    with torch.inference_mode():
        return [model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0] for text in TEXTS]


def as_sentence_transformer(folder: Path, to: Path, pooling: Pooling, normalize: bool) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *[("2_Normalize", "Normalize")] * normalize]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (to / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (to / "1_Pooling").mkdir()
    (to / "1_Pooling" / "config.json").write_text(
        json.dumps({f"pooling_mode_{mode}": name == pooling for name, mode in MODES.items()}), encoding="utf-8"
    )
    return to


def pooled(states: list[torch.Tensor], pooling: Pooling, normalize: bool) -> torch.Tensor:
    rows = {"last": lambda x: x[-1], "mean": lambda x: x.mean(dim=0), "cls": lambda x: x[0]}[pooling]
    vectors = torch.stack([rows(x) for x in states])
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def embeddings(llm: LLM, texts: list[str] = TEXTS) -> torch.Tensor:
    return torch.tensor([output.embedding for output in llm.embed(texts)])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_are_transformers_hidden_states_pooled(
    generating: Path, tmp_path: Path, states: list[torch.Tensor], pooling: Pooling, normalize: bool
) -> None:
    """Small steps, so that prompts come in chunks, and a second time, so that their beginnings are in the cache."""
    folder = as_sentence_transformer(generating, tmp_path / "model", pooling, normalize)
    options: dict[str, Any] = {"threads": 1, "block_size": 4, "max_num_batched_tokens": 8, "max_num_seqs": 4}
    expected = pooled(states, pooling, normalize)
    with LLM(folder, **options) as llm:
        first, second = llm.embed(TEXTS), llm.embed(TEXTS)
    for outputs in (first, second):
        assert_close(torch.tensor([output.embedding for output in outputs]), expected)
    hits = sum(output.num_cached_tokens or 0 for output in second)
    assert (hits > 0) == (pooling == "last")
    assert [o.prompt_token_ids for o in first] == [Tokenizer.from_dir(folder).encode(text) for text in TEXTS]


def test_a_model_without_a_head_gives_its_last_state_normalised(bare: Path, states: list[torch.Tensor]) -> None:
    with LLM(bare, threads=1) as llm:
        assert_close(embeddings(llm), pooled(states, "last", True))
        alone = torch.cat([embeddings(llm, [text]) for text in TEXTS])
    assert_close(alone, pooled(states, "last", True))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_every_layout_gives_the_same(bare: Path, tmp_path: Path, states: list[torch.Tensor], tp: int, pp: int) -> None:
    folder = as_sentence_transformer(bare, tmp_path / "model", "mean", True)
    with LLM(
        folder, executor="k8s", tensor_parallel_size=tp, pipeline_parallel_size=pp, threads=1, max_num_batched_tokens=64
    ) as llm:
        assert_close(embeddings(llm), pooled(states, "mean", True))


def test_prompts_that_do_not_fit_together_wait_for_each_other(
    generating: Path, tmp_path: Path, states: list[torch.Tensor]
) -> None:
    folder = as_sentence_transformer(generating, tmp_path / "model", "mean", False)
    with LLM(folder, threads=1, max_model_len=32, num_kv_blocks=8, block_size=4, max_num_batched_tokens=64) as llm:
        found = embeddings(llm, TEXTS[:3] * 4)
        longest = llm.embed([list(range(3, 35))])[0]
        with pytest.raises(ConfigError, match="the prompt has 33 tokens, but max_model_len=32; shorten it"):
            llm.embed([list(range(3, 36))])
    assert_close(found, pooled(states[:3] * 4, "mean", False))
    assert len(longest.embedding) == 32


def test_a_model_does_one_or_the_other(generating: Path, bare: Path) -> None:
    with LLM(generating, threads=1) as llm:
        with pytest.raises(ConfigError, match="generates text and makes no embeddings; use generate"):
            llm.embed("x")
        assert llm.generate("x", SamplingParams(max_tokens=1))[0].embedding is None
    with LLM(bare, threads=1) as llm:
        with pytest.raises(ConfigError, match="makes embeddings and generates no text; use embed"):
            llm.generate("x")
        with pytest.raises(ConfigError, match="the prompt is empty"):
            llm.embed("")
        assert len(llm.embed("x")[0].embedding) == 32

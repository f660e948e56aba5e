"""Which folders hold embedding models, and how their states are pooled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError
from lightvllm.pooling import read_pooling

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def write(folder: Path, modules: Any, pooling: Any = None) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


def modes(name: str) -> dict[str, Any]:
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    flags = {f"pooling_mode_{one}": one == name for one in names}
    return {"word_embedding_dimension": 8, **flags, "include_prompt": True}


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (modes("cls_token"), "cls"),
        (modes("mean_tokens"), "mean"),
        (modes("lasttoken"), "last"),
        ({"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_what_sentence_transformers_writes(tmp_path: Path, pooling: Any, expected: str, normalize: bool) -> None:
    folder = write(tmp_path, [TRANSFORMER, POOLING, *[NORMALIZE] * normalize], pooling)
    assert read_pooling(folder, (None, False)) == (expected, normalize)


def test_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, (None, False)) == (None, False)
    assert read_pooling(tmp_path, ("last", True)) == ("last", True)


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([TRANSFORMER, POOLING], modes("max_tokens"), "pooling_mode_max_tokens is not supported; use one of"),
        ([TRANSFORMER, POOLING], modes("none"), "no pooling mode is not supported"),
        ([TRANSFORMER, POOLING], modes("mean_tokens") | {"pooling_mode_cls_token": True}, " and "),
        ([TRANSFORMER, POOLING], {"pooling_mode": "max"}, "max is not supported"),
        ([TRANSFORMER, POOLING], [], "expected a JSON object, got list"),
        ([TRANSFORMER, POOLING], None, r"1_Pooling/config\.json: cannot be read"),
        ([TRANSFORMER, NORMALIZE], None, "names no Pooling"),
        ([TRANSFORMER, {"type": "sentence_transformers.models.Dense"}], None, "module 'Dense' is not supported"),
        ({"a": 1}, None, "expected a JSON list, got dict"),
        ([3], None, "expected a list of modules, got 3"),
    ],
)
def test_refused(tmp_path: Path, modules: Any, pooling: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_pooling(write(tmp_path, modules, pooling), (None, False))


@pytest.mark.parametrize(
    ("architecture", "expected"), [("LlamaForCausalLM", (None, False)), ("LlamaModel", ("last", True))]
)
def test_a_model_without_a_head_embeds(tmp_path: Path, architecture: str, expected: Any) -> None:
    config = {
        "architectures": [architecture],
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = ModelConfig.from_dir(tmp_path, load_format="dummy")
    assert (found.pooling, found.normalize) == expected
    assert found.reads_prefix_cache
    write(tmp_path, [TRANSFORMER, POOLING], modes("mean_tokens"))
    found = ModelConfig.from_dir(tmp_path, load_format="dummy")
    assert (found.pooling, found.normalize, found.reads_prefix_cache) == ("mean", False, False)

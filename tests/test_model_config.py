"""A model's folder: what ``config.json`` says, and what is refused by it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from smollm2_folder import SMOLLM2, model

from lightvllm.errors import ConfigError
from lightvllm.model_config import ModelConfig


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
        ({"vocab_size": None}, {}, r"cannot be used \(int\(\) argument must be"),
        ({"hidden_size": "large"}, {}, r"cannot be used \(invalid literal for int"),
        ({"num_attention_heads": 0}, {}, r"cannot be used \(.*zero"),
        ({"rope_scaling": 7}, {}, r"cannot be used \('int' object has no attribute 'get'\)"),
        ({"eos_token_id": "x"}, {}, r"cannot be used \(invalid literal for int"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, {}, "supported: llama3, linear"),
        ({"num_key_value_heads": 2}, {}, "no multiple of num_key_value_heads=2"),
        ({}, {"dtype": "int8"}, "^dtype='int8' is not supported"),
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

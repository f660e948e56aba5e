"""A model's folder that has nothing but SmolLM2's ``config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightvllm.config import ModelConfig

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

"""Builds a tiny random LLaMA as a Hugging Face folder: real config, safetensors and tokenizer, a second to make.

``build(folder)`` writes it with transformers, so that what is read here was written there. 4 query heads and 2
key/value heads (so that four tensor ranks share them), 3 layers (so that two stages are unequal), and a vocabulary
that no number of ranks divides. The tokenizer is a byte-level BPE with a chat template; every id below the
vocabulary's size is one of its tokens.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 331
BOS, EOS = 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Paris is the capital of France; Rome is the capital of Italy.",
    "One token after another, the model says what it has to say.",
    "Grüße aus Köln, 東京 and Αθήνα: 1 2 3 4 5 6 7 8 9 10.",
]


def build(folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", dtype: str = "float32", **config: Any) -> Path:
    """Write the model to ``folder`` and return it; ``config`` overrides fields of transformers' LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        # Wide weights, so that logits are far apart and every layer matters.
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(fields | config)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # norms and biases, which transformers leaves at ones and zeros
                    parameter.add_(0.1 * torch.randn_like(parameter))
                assert parameter.isfinite().all(), name
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    settings = {
        "bos_token": _SPECIAL[BOS],
        "eos_token": _SPECIAL[EOS],
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()

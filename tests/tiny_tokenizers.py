"""Small tokenizers of the two kinds that the LLaMA family has, each written as a Hugging Face folder.

``byte_level``: every byte is a token, a few merges, and special tokens (Llama 3's kind).
``byte_fallback``: pieces with "▁" for spaces, and ``<0x00>`` to ``<0xFF>`` for what is no piece (Llama 2's kind);
its post-processor puts ``<s>`` in front.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
    {% generation %}
<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>
    {% endgeneration %}
{% endfor %}
{% if tools is none %}{{ {'<tools>': none} | tojson }}{% endif %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def byte_level(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Ids 0 to 2 are ``<|bos|>``, ``<|eos|>``, ``<|end|>``; 3 is an added token that is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r")]
    pieces = ["<|bos|>", "<|eos|>", "<|end|>", "<tool>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return _write(folder, tokenizer, "<|bos|>", "<|eos|>", chat_template)


def byte_fallback(folder: Path) -> Path:
    """Ids 0 to 2 are ``<unk>``, ``<s>``, ``</s>``; 3 to 258 are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"helowrd,.abcxyz", "▁▁"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "w"), ("▁", "▁")]
    pieces += dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _write(folder, tokenizer, "<s>", "</s>", None)


def _write(folder: Path, tokenizer: Tokenizer, bos: str, eos: str, chat_template: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Older folders hold special tokens as serialised AddedTokens, newer ones as strings.
    added = {"__type": "AddedToken", "content": eos, "normalized": False, "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": added}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

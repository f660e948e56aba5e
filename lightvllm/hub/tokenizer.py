"""The tokenizer's files of a Hugging Face folder, from a GGUF header: byte-level BPE.

Only pre-tokenizers listed in ``_PRE_TOKENIZERS`` are written: with another one the same vocabulary would cut the same
text into other tokens, and nothing would say so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightvllm.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTROL = 3  # gguf's TokenType.CONTROL


def write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, chat_template.jinja.

    ``fields`` is the GGUF header; a KeyError names a field that it lacks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind = fields["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise ConfigError(f"tokenizer.ggml.model={kind!r} is not supported; expected 'gpt2' (byte-level BPE)")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))

    roles = {
        f"{role}_token": tokens[fields[key]]
        for role, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in fields
    }
    template = fields.get("tokenizer.chat_template")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is, in every version
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    if template:
        config["chat_template"] = template
    _write_json(target / "tokenizer_config.json", config)
    others = [token for token in special if token not in roles.values()]
    _write_json(target / "special_tokens_map.json", roles | {"additional_special_tokens": others})


def _pre_tokenizer(name: str) -> PreTokenizer:
    from tokenizers import pre_tokenizers

    if name not in _PRE_TOKENIZERS:
        raise ConfigError(f"tokenizer.ggml.pre={name!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


_PRE_TOKENIZERS = ("smollm",)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

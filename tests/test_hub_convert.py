"""GGUF to a Hugging Face folder: every weight back in its place, and the tokenizer cuts as it should."""

import json

import gguf
import numpy as np
import pytest
import tiny_gguf
from safetensors.numpy import load_file

from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError
from lightvllm.hub.convert import convert_gguf, hf_name, unpermute


def convert(tmp_path, **kwargs):
    target = tmp_path / "out"
    target.mkdir()
    steps = []
    source = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", **kwargs)
    convert_gguf(source, target, lambda what, done, total: steps.append((what, done, total)))
    return target, steps


def test_float32_weights_come_out_as_they_went_in(tmp_path):
    target, _ = convert(tmp_path, quantise=False)
    got, want = load_file(target / "model.safetensors"), tiny_gguf.weights()
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_quantised_weights_are_what_gguf_dequantises(tmp_path):
    target, steps = convert(tmp_path)
    got = load_file(target / "model.safetensors")
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, want in tiny_gguf.weights().items():
        if "proj" in name:  # rows are quantised one by one, so their order does not change their values
            want = gguf.quants.dequantize(gguf.quants.quantize(want, kind), kind)
        np.testing.assert_array_equal(got[name], want, err_msg=name)
        assert got[name].dtype == np.float32
    assert steps[-1] == ("converting to float32", len(got), len(got))


def test_unpermute_undoes_llama_cpps_permute():
    rows = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    stored = tiny_gguf.permute(rows, heads=3)
    assert not np.array_equal(stored, rows)
    np.testing.assert_array_equal(unpermute(stored, heads=3), rows)


def test_config_is_read_by_our_engine(tmp_path):
    target, _ = convert(tmp_path)
    config = ModelConfig.from_dir(target)
    assert (config.hidden_size, config.num_hidden_layers) == (tiny_gguf.HIDDEN, tiny_gguf.LAYERS)
    assert (config.num_attention_heads, config.num_key_value_heads) == (tiny_gguf.HEADS, tiny_gguf.KV_HEADS)
    assert (config.dtype, config.rms_norm_eps, config.rope_theta) == ("float32", 1e-5, 100000.0)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)


def test_an_output_tensor_means_untied_embeddings(tmp_path):
    target, _ = convert(tmp_path, extra_tensor="output.weight")
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(target / "model.safetensors")


def test_tokenizer(tmp_path):
    from tokenizers import Tokenizer

    target, _ = convert(tmp_path)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>hello").tokens == ["<|im_start|>", "hello"]
    assert tokenizer.encode("12").tokens == ["1", "2"], "digits are cut apart before any merge"
    text = "hello, Köln 12 你好 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"] == tiny_gguf.CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'; expected 'llama'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre='qwen2' is not supported; supported: smollm"),
        ({"extra_tensor": "rope_freqs.weight"}, "tensor 'rope_freqs.weight' in the GGUF file is not known"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        convert(tmp_path, **change)


def test_no_gguf(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no GGUF at all, but long enough to be read")
    with pytest.raises(ConfigError, match="not a readable GGUF file"):
        convert_gguf(broken, tmp_path, lambda *_: None)


def test_names():
    assert hf_name("blk.11.attn_output.weight") == "model.layers.11.self_attn.o_proj.weight"
    with pytest.raises(ConfigError, match="is not known"):
        hf_name("blk.0.attn_q.bias")

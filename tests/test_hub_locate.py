"""``resolve``: a folder, a known model, a hub id, or a message that says what to do."""

import sys

import pytest

from lightvllm import hub
from lightvllm.errors import ConfigError, MissingExtra


def test_a_folder_is_itself(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_known_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTVLLM_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="run: lightvllm models get smollm2-135m"):
        hub.resolve("smollm2-135m")


@pytest.mark.parametrize("model", ["no-such-model", "/no/such/folder", "./a/b"])
def test_nothing_of_that_name(model):
    with pytest.raises(ConfigError, match=r"no such model folder; expected a folder, a known model \(smollm2-135m\)"):
        hub.resolve(model)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="is a file; expected a Hugging Face model folder"):
        hub.resolve(str(tmp_path / "model.gguf"))


def test_a_hub_id_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lightvllm\[hub\]'"):
        hub.resolve("org/name")


def test_a_hub_id_out_of_reach(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="org/name: no such folder here, and the Hugging Face hub did not give it"):
        hub.resolve("org/name")

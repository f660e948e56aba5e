"""``lightvllm doctor`` tells the truth about what is missing, and does not fail over it."""

import json
import sys

import pytest

from lightvllm import hub
from lightvllm.cache import cache_dir
from lightvllm.cli.doctor import require_executor
from lightvllm.cli.main import main
from lightvllm.errors import MissingExtra


def test_json(capsys):
    import torch

    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    assert found["executors"]["uniproc"] == "can run"
    assert found["kernels"].split(":")[0] in ("compiled", "reference")
    assert found["attention_backends"] == ["naive", "sdpa", "paged"]
    assert found["cores"] >= 1
    assert found["cache"] == str(cache_dir())
    assert found["models"] == {name: hub.installed(name) for name in hub.KNOWN_MODELS}


def test_for_people(capsys, monkeypatch):
    monkeypatch.setattr(hub, "installed", lambda name: False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "executor uniproc    can run" in shown
    assert "not here; run: lightvllm models get smollm2-135m" in shown


@pytest.mark.parametrize(("executor", "module", "package"), [("ray", "ray", "ray"), ("k8s", "grpc", "grpcio")])
def test_a_missing_extra(executor, module, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"'{package}', which is not installed; .*lightvllm\[{executor}\]"):
        require_executor(executor)
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["executors"][executor]
    assert answer.startswith("cannot run: ")
    assert f"pip install 'lightvllm[{executor}]'" in answer

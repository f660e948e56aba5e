"""``lightvllm vllm``: what reaches the workers, and what is missing, on the command line."""

from __future__ import annotations

import importlib.util
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lightvllm.adapters.vllm.versions import local_versions
from lightvllm.cli.main import main
from lightvllm.version import __version__


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No others than these."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {
        "HF_TOKEN": "hunter2",
        "LMCACHE_REMOTE_URL": "redis://user:hunter2@cache",
        "NCCL_DEBUG": "INFO",
        "VLLM_HOST_IP": "10.0.0.1",
        "PATH": "/bin",
        "OPENAI_API_KEY": "hunter2",
    }.items():
        monkeypatch.setenv(name, value)


def env(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, dict[str, Any]]:
    assert main(["vllm", "env", "--json", *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    return {row.pop("name"): row for row in rows}


@pytest.mark.usefixtures("variables")
def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    found = env(capsys)
    assert {name: row["reaches"] for name, row in found.items()} == {
        "HF_TOKEN": False,
        "LMCACHE_REMOTE_URL": False,
        "NCCL_DEBUG": True,
        "VLLM_HOST_IP": False,
    }
    assert found["VLLM_HOST_IP"] == {"reaches": False, "why": "an address of one host"}


@pytest.mark.usefixtures("variables")
def test_env_with_everything_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    config = '{"lightvllm": {"env_include": ["HF_TOKEN"], "env": {"A": "1", "B_PASSWORD": "hunter3"}}}'
    options = ("--all", "--values", "--additional-config", config)
    found = env(capsys, *options)
    assert found["HF_TOKEN"] == {"reaches": True, "why": "env_include names it", "value": None}
    assert found["A"]["value"] == "1"
    assert found["NCCL_DEBUG"]["value"] == "INFO"
    assert found["PATH"] == {"reaches": False, "why": "nothing speaks of it", "value": "/bin"}
    assert (found["OPENAI_API_KEY"]["value"], found["B_PASSWORD"]["value"]) == (None, None)
    assert main(["vllm", "env", *options]) == 0
    table = capsys.readouterr().out
    assert "hunter" not in json.dumps(found) + table
    assert "(secret)" in table
    assert "INFO" in table


@pytest.mark.usefixtures("variables")
def test_env_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("lightvllm.adapters.vllm.environment.registered_by_vllm", lambda: None)
    assert main(["vllm", "env"]) == 0
    said = capsys.readouterr()
    lines = [line.split(maxsplit=2) for line in said.out.splitlines()]
    assert ["NCCL_DEBUG", "yes", "transport of collectives: all ranks must agree"] in [
        [*map(str.strip, x)] for x in lines
    ]
    assert "INFO" not in said.out
    assert "PATH" not in said.out
    assert "vLLM is not installed here" in said.err


@pytest.mark.usefixtures("variables")
def test_env_takes_the_names_that_vllm_registers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightvllm.adapters.vllm.environment.registered_by_vllm", lambda: ("PATH",))
    assert env(capsys)["PATH"]["reaches"] is True


def test_env_without_any(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    assert main(["vllm", "env"]) == 0
    assert "no variable that is set here reaches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "--additional-config is no JSON: "),
        ("[]", "--additional-config must be a JSON object"),
        ('{"lightvllm": {"envs": {}}}', "additional_config['lightvllm'] holds 'envs', which is unknown; use env"),
    ],
)
def test_a_wrong_configuration(config: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm", "env", "--additional-config", config]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")


# ---------------------------------------------------------------------------------------------------------- check


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_check_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vllm", "check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["lightvllm"] == __version__
    assert found["versions"]["torch"] == metadata.version("torch")
    for name in ("KubernetesExecutor", "RayExecutor"):
        assert found["executors"][name].startswith("cannot be used: ")
        assert "which is not installed; run: pip install 'lightvllm[" in found["executors"][name]


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A distribution that provides a package ``vllm``, in this version; and our executors, without looking into it."""

    def install(version: str, executors: dict[str, Any]) -> None:
        info = tmp_path / f"vllm_rocm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-rocm\nVersion: {version}\n")
        (info / "top_level.txt").write_text("vllm\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("lightvllm.adapters.vllm.__getattr__", executors.__getitem__)
        monkeypatch.setattr("lightvllm.cli.vllm.require_executor", lambda name: None)
        local_versions.cache_clear()

    yield install
    local_versions.cache_clear()


def test_check_with_vllm(fake_vllm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_vllm("0.32.7", {"KubernetesExecutor": object, "RayExecutor": object})
    assert main(["vllm", "check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["vllm"] == "0.32.7"
    assert found["warning"] is None
    assert set(found["executors"].values()) == {"can be used"}


def test_check_says_what_an_import_raises_and_that_a_release_is_untested(
    fake_vllm: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            print("INFO a log line of vLLM's")
            raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setenv("COLUMNS", "200")
    fake_vllm("0.40.0", Broken(KubernetesExecutor=object))
    assert main(["vllm", "check"]) == 0
    said = capsys.readouterr()
    assert "vLLM 0.40.0 has not been tested with lightvllm" in said.out
    wanted = "cannot be used: importing it raises RuntimeError: operator torchvision::nms does not exist"
    assert wanted in " ".join(said.out.split())
    assert "log line" not in said.out
    assert "log line" in said.err


def test_check_looks_at_the_plugin(
    fake_vllm: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm("0.32.0", {"KubernetesExecutor": object, "RayExecutor": object})

    def plugin() -> str:
        assert main(["vllm", "check", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["plugin"]

    point = metadata.EntryPoint("lightvllm", "lightvllm.adapters.vllm.plugin:register", "vllm.general_plugins")
    points = {"vllm.general_plugins": [point]}
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr("lightvllm.cli.vllm.metadata.entry_points", lambda group: points[group])
    assert plugin() == "registered"
    monkeypatch.setenv("VLLM_PLUGINS", "a,b")
    assert plugin() == "registered, but VLLM_PLUGINS=a,b leaves it out; add lightvllm"
    monkeypatch.setenv("VLLM_PLUGINS", "a,lightvllm")
    assert plugin() == "registered"
    points["vllm.general_plugins"] = []
    assert plugin().startswith("not registered")

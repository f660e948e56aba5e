"""``lightvllm manifest``: from a model's name or a file to an LLMInference, and to what it becomes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightvllm.cli.main import main

PLANS = Path(__file__).parent / "operator_plans"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, list[Any]]:
    """What is printed, and the documents in it."""
    assert main(["manifest", *arguments]) == 0
    out = capsys.readouterr().out
    return out, list(yaml.safe_load_all(out))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["manifest", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3-1-8b-instruct"),
        ("org/7B_chat", "model-7b-chat"),
        ("x" * 80, "x" * 40),
    ],
)
def test_a_models_name(capsys: pytest.CaptureFixture[str], model: str, name: str) -> None:
    _, (document,) = run(capsys, model)
    assert document["metadata"] == {"name": name}
    assert document["spec"] == {"model": model, "apiKey": {"name": f"{name}-api-key", "key": "api-key"}}


def test_options_become_fields(capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "-tp 4 -pp 2 --gpus-per-pod 8 --gpu-resource amd.com/gpu --replicas 3 --max-model-len 512 --max-num-seqs 8"
    )
    more = "--served-model-name x --engine sglang --image y --name z -n ns --allow-unauthenticated"
    _, (document,) = run(capsys, "m", *options.split(), *more.split())
    assert document["metadata"] == {"name": "z", "namespace": "ns"}
    assert document["spec"] == {
        "model": "m",
        "servedModelName": "x",
        "tensorParallelSize": 4,
        "pipelineParallelSize": 2,
        "gpusPerPod": 8,
        "gpuResource": "amd.com/gpu",
        "replicas": 3,
        "maxModelLen": 512,
        "maxNumSeqs": 8,
        "engine": {"name": "sglang", "image": "y"},
        "allowUnauthenticated": True,
    }


def test_options_win_over_a_file_of_which_all_else_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text((PLANS / "vllm-roce.yaml").read_text().replace("metadata:", "metadata:\n  labels: {team: a}"))
    _, (document,) = run(capsys, str(file), "--replicas", "2", "--image", "x", "--api-key-secret", "other/entry")
    original = yaml.safe_load(file.read_text())
    original["spec"] |= {"replicas": 2, "apiKey": {"name": "other", "key": "entry"}}
    original["spec"]["engine"]["image"] = "x"
    assert document == original


def test_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO((PLANS / "cpu.yaml").read_text()))
    _, (document,) = run(capsys, "-")
    assert document["spec"]["model"] == "smollm2-135m"
    monkeypatch.setattr(sys, "stdin", io.StringIO("kind: Pod"))
    assert "standard input: apiVersion is None" in refused(capsys, "-")


def test_a_plan_of_a_printed_manifest_is_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed, _ = run(capsys, "m", "-tp", "2")
    (tmp_path / "m.yaml").write_text(printed)
    assert run(capsys, str(tmp_path / "m.yaml"), "--plan") == run(capsys, "m", "-tp", "2", "--plan")


def test_secrets_are_named_with_the_commands_that_make_them_and_never_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, objects = run(capsys, "m", "-pp", "2", "-n", "ns", "--plan")
    assert not [each for each in objects if each["kind"] == "Secret"]
    commands = [line.removeprefix("#     ") for line in out.splitlines() if line.startswith("#     ")]
    assert commands[0] == "kubectl create secret generic -n ns m-api-key --from-literal=api-key=KEY"
    certs = [command.split()[1:] for command in commands if command.startswith("lightvllm ")]
    assert len(certs) == 1
    pytest.importorskip("cryptography", reason="the k8s extra is not installed")
    pytest.importorskip("grpc", reason="the k8s extra is not installed")
    code = f"from lightvllm.cli.main import main; import sys; sys.exit(main({certs[0]!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    folders = [word.partition("=")[2] for command in commands for word in command.split() if "--from-file" in word]
    mounted = {
        volume["secret"]["secretName"]
        for each in objects
        if each["kind"] == "StatefulSet"
        for volume in each["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }
    assert mounted == {"m-0-workers", "m-0-driver"}
    assert len(folders) == 2
    for folder in folders:
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"token", "cert.pem", "key.pem", "ca.pem"}


def test_monitoring_needs_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(PLANS / "custom.yaml")
    out, objects = run(capsys, file, "--plan")
    assert "# Left out: monitoring: the cluster does not have servicemonitors.monitoring.coreos.com" in out
    _, with_it = run(capsys, file, "--plan", "--service-monitors")
    assert [each for each in with_it if each not in objects] == [
        each for each in with_it if each["kind"] == "ServiceMonitor"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m", "-tp", "4", "--gpus-per-pod", "3"], "the LLMInference: spec: the workers (tensorParallelSize × "),
        (["m", "-tp", "0"], "spec.tensorParallelSize: should be greater than or equal to 1, got 0"),
        (["m", "--engine", "sglang"], "spec.engine: engine sglang or custom has no default image"),
        (["m", "--service-monitors"], "--service-monitors is for --plan"),
        (["m", "--api-key-secret", "a", "--allow-unauthenticated"], "are both given; keep one"),
        (["missing.yaml"], "cannot read missing.yaml: No such file"),
        (["m", "--name", "Llama", "--allow-unauthenticated"], "metadata.name must begin with a letter"),
    ],
)
def test_refused_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in refused(capsys, *arguments)


def test_what_only_an_operator_could_do_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = yaml.safe_load((PLANS / "cpu.yaml").read_text())
    document["spec"]["autoscaling"] = {"maxReplicas": 2, "prometheusAddress": "http://p"}
    file = tmp_path / "scaled.yaml"
    file.write_text(yaml.safe_dump(document))
    run(capsys, str(file))
    assert "spec.autoscaling scales the LLMInference, which needs an operator" in refused(capsys, str(file), "--plan")
    file.write_text("kind: LLMInference\napiVersion: lightvllm.io/v1\nspec: 3\n")
    assert "spec is 3, expected an object" in refused(capsys, str(file))


def test_without_the_extra_the_command_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['yaml'] = None; from lightvllm.cli.main import main; sys.exit(main(['manifest', 'm']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert "run: pip install 'lightvllm[operator]'" in ran.stderr

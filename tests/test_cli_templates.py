"""``lightvllm templates`` and ``lightvllm manifest --template``."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama
import yaml

from lightvllm.cli.main import main
from lightvllm.operator.templates import TEMPLATES


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    head, *rows = run(capsys, "templates").splitlines()
    assert head.split()[:2] == ["name", "engine"]
    assert [row.split()[0] for row in rows] == list(TEMPLATES)
    (row,) = [row for row in rows if row.split()[0] == "llama-3.3-70b-tp4-pp2"]
    assert " ".join(row.split()).startswith("llama-3.3-70b-tp4-pp2 vllm 4 × 2 44 GiB 32,768 16 ")


def test_a_template_is_shown_with_its_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "templates", "show", "llama-3.1-8b-tp2")
    assert yaml.safe_load(out) == TEMPLATES["llama-3.1-8b-tp2"].document()
    assert "# parameters    8,030,261,248 × 2 bytes (bfloat16) = 14.96 GiB\n" in out
    assert "per token 2 × 32 layers × 4 KV heads × 128 × 2 bytes = 65,536 bytes\n" in out
    assert "# Needs: the model is gated" in out


def test_a_template_on_other_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert "2 GPU(s) of 139.00 GiB" in run(capsys, "templates", "show", "llama-3.1-8b-tp2", "--gpu-memory", "139")
    error = refused(capsys, "templates", "show", "llama-3.3-70b-tp4", "--gpu-memory", "22")
    assert error.endswith("the smallest layout that fits is -tp 8 -pp 1")
    assert "leave --gpu-memory out" in refused(capsys, "templates", "show", "smollm2-135m-cpu", "--gpu-memory", "22")
    assert "no template 'x'; use one of" in refused(capsys, "templates", "show", "x")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama.build(tmp_path_factory.mktemp("models") / "tiny"))


def test_a_folder_fits(capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    options = "-tp 2 -pp 2 --max-model-len 64 --max-num-seqs 4 --dtype bfloat16 --gpu-memory-utilization 0.8"
    out = run(capsys, "templates", "fit", tiny, "--gpu-memory", "2", *options.split())
    assert "tensor 2 × pipeline 2: 4 GPU(s) of 2.00 GiB; of one with 2 layers (stage 0, the fullest):" in out
    assert "0.8 × 2.00 GiB = 1.60 GiB" in out
    assert "per token 2 × 2 layers × 1 KV heads × 8 × 2 bytes = 64 bytes" in out
    assert "sequence(s) of 64 tokens at a time" in out


def test_a_folder_that_does_not_fit(capsys: pytest.CaptureFixture[str], tiny: str, tmp_path: Path) -> None:
    assert "no layout of up to 64 such GPUs fits" in refused(capsys, "templates", "fit", tiny, "--gpu-memory", "0.5")
    arguments = ("templates", "fit", tiny, "--gpu-memory", "8")
    assert "tensor_parallel_size=3 cannot split" in refused(capsys, *arguments, "-tp", "3")
    assert "max_model_len=999 does not fit the model; use 1 to 128" in refused(
        capsys, *arguments, "--max-model-len", "999"
    )
    assert "no config.json" in refused(capsys, "templates", "fit", str(tmp_path), "--gpu-memory", "8")


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["templates", "fit", "x"]) == 2
    assert "Missing option '--gpu-memory'" in capsys.readouterr().err
    assert main(["templates", "nix"]) == 2
    assert "No such command 'nix'" in capsys.readouterr().err


def test_the_manifest_of_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "manifest", "--template", "llama-3.1-8b", "--replicas", "2", "-n", "ns", "--image", "mine:1")
    document = yaml.safe_load(out)
    expected = TEMPLATES["llama-3.1-8b"].document()
    expected["metadata"]["namespace"] = "ns"
    expected["spec"] |= {
        "replicas": 2,
        "engine": {"image": "mine:1"},
        "apiKey": {"name": "llama-3-1-8b-api-key", "key": "api-key"},
    }
    assert document == expected
    assert "kubectl create secret generic -n ns llama-3-1-8b-api-key" in out


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_plan_of_a_template(capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = run(capsys, "manifest", "--template", name, "--plan", "--allow-unauthenticated")
    assert "StatefulSet" in [each["kind"] for each in yaml.safe_load_all(out)]


def test_a_manifest_is_of_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["manifest"], ["manifest", "m", "--template", "llama-3.1-8b"]):
        assert "give either FILE|MODEL or --template NAME" in refused(capsys, *arguments)
    assert "no template 'x'" in refused(capsys, "manifest", "--template", "x")


def test_a_manifest_says_whether_its_template_still_fits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("manifest", "--template", "llama-3.3-70b-tp4", "--allow-unauthenticated")
    for plan in ([], ["--plan"]):
        first, *_ = run(capsys, *arguments, *plan).splitlines()
        assert first == (
            "# Fits 4 GPU(s) of 79.00 GiB: room for 475,728 tokens; see: lightvllm templates show llama-3.3-70b-tp4"
        )
        first, *_ = run(capsys, *arguments, "-tp", "1", *plan).splitlines()
        assert first.startswith("# Not for what the template llama-3.3-70b-tp4 is for: ")
        assert "does not fit -tp 1 -pp 1 on GPUs of 79.00 GiB" in first
    assert "tensor_parallel_size=3 cannot split" in refused(capsys, *arguments, "-tp", "3")

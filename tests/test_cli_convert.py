"""``lightvllm convert``: YAML with comments, a list on standard error, JSON, and the way on to a plan."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from lightvllm.cli.main import main

FOLDER = Path(__file__).parent / "ray_manifests"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_converted_can_be_planned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    assert main(["convert", str(path)]) == 0
    inference = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(inference))
    assert main(["manifest", "-", "--plan"]) == 0
    kinds = {each["kind"] for each in yaml.safe_load_all(capsys.readouterr().out)}
    assert {"StatefulSet", "Service", "ConfigMap"} <= kinds


def test_the_list_is_in_comments_and_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(FOLDER / "job.yaml")]) == 0
    said = capsys.readouterr()
    comments = [line[2:] for line in said.out.splitlines() if line.startswith("# ")]
    assert comments == said.err.splitlines()
    assert comments[0] == "RayJob mistral-job: could not be carried over:"
    assert comments[1] == "  spec.shutdownAfterJobFinishes: an LLMInference serves until it is deleted"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(FOLDER / "job.yaml"), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    answer = json.loads(said.out)
    assert answer["documents"][0]["kind"] == "LLMInference"
    assert answer["notes"][0] == {
        "from": "RayJob mistral-job",
        "kind": "lost",
        "path": "spec.shutdownAfterJobFinishes",
        "why": "an LLMInference serves until it is deleted",
    }


def test_strict_fails_where_something_was_lost_and_prints_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(FOLDER / "job.yaml"), "--strict"]) == 1
    said = capsys.readouterr()
    assert "kind: LLMInference" in said.out
    assert said.err.splitlines()[-1] == (
        "error: --strict: 3 of the notes name something that was lost or must be looked at"
    )


def test_strict_passes_where_all_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    document = yaml.safe_load((FOLDER / "job.yaml").read_text())
    del document["spec"]["shutdownAfterJobFinishes"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    options = ["--strict", "--image", "registry.example.com/lightvllm-vllm:1", "--api-key-secret", "keys/mistral"]
    assert main(["convert", str(tmp_path / "job.yaml"), *options]) == 0
    spec = yaml.safe_load(capsys.readouterr().out)["spec"]
    assert spec["engine"]["image"] == "registry.example.com/lightvllm-vllm:1"
    assert spec["apiKey"] == {"name": "keys", "key": "mistral"}


def test_several_objects_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = "---\n".join((FOLDER / name).read_text() for name in ("job.yaml", "cluster.yaml"))
    monkeypatch.setattr("sys.stdin", io.StringIO(both))
    assert main(["convert", "-"]) == 0
    found = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [each["metadata"]["name"] for each in found] == ["mistral-job", "deepseek"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere.yaml"], "error: cannot read /nowhere.yaml: No such file or directory"),
        (
            [str(FOLDER / "job.yaml"), "--allow-unauthenticated", "--api-key-secret", "x"],
            "error: --api-key-secret and --allow-unauthenticated are both given; keep one",
        ),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["convert", *arguments]) == 1
    assert capsys.readouterr().err.splitlines() == [message]

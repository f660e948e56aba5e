"""Errors in an LLMInference's YAML: one line, which names the field, what was got and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from lightvllm.errors import ConfigError
from lightvllm.operator import text


def document(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "lightvllm.io/v1",
        "kind": "LLMInference",
        "metadata": {"name": "llama"},
        "spec": {"model": "m", "allowUnauthenticated": True, **spec},
    }


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"replica": 2}, "f.yaml: spec.replica: is no field; did you mean replicas?"),
        ({"engine": {"nam": "vllm"}}, "f.yaml: spec.engine.nam: is no field; did you mean name?"),
        (
            {"engine": {"name": "tgi"}},
            "f.yaml: spec.engine.name: is 'tgi', expected 'lightvllm', 'vllm', 'sglang' or 'custom'",
        ),
        ({"tensorParallelSize": "4"}, "f.yaml: spec.tensorParallelSize: should be a valid integer, got '4'"),
        ({"replicas": -1}, "f.yaml: spec.replicas: should be greater than or equal to 0, got -1"),
        ({"tls": {"secretName": "A"}}, "f.yaml: spec.tls.secretName: is 'A', which does not match ^[a-z0-9]"),
        ({"tls": {}}, "f.yaml: spec.tls.secretName: is missing"),
        ({"env": [{"name": "A"}]}, "f.yaml: spec.env[0]: a variable needs either value or valueFrom"),
        (
            {"pod": {"resources": {"requests": {"cpu": 0.5}}}},
            "f.yaml: spec.pod.resources.requests.cpu: is 0.5, expected a whole number, or a quantity such as '500m'",
        ),
        ({"apiKey": {"name": "k", "key": "k"}}, "f.yaml: spec: give apiKey, or set allowUnauthenticated if everybody"),
    ],
)
def test_problem(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        text.check(document(**spec), "f.yaml")
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_many_problems_are_cut_off() -> None:
    with pytest.raises(ConfigError, match=r"and 2 more$"):
        text.check(document(**{f"x{number}": 1 for number in range(7)}), "f.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [", "f.yaml, line 1: no YAML: expected the node content"),
        ("a: 1\n---\nb: 2", "f.yaml holds 2 documents; expected one object"),
        ("", "f.yaml holds 0 documents"),
        ("- a", "f.yaml holds a list"),
    ],
)
def test_what_is_no_yaml_object(content: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        text.read(content, "f.yaml")


@pytest.mark.parametrize("field", ["apiVersion", "kind"])
def test_another_kind(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is 'other', expected"):
        text.check({**document(), field: "other"}, "f.yaml")


def test_what_is_written_is_read_again() -> None:
    shared = {"a": "1"}
    documents = [{"script": "a\nb\n", "no": "no", "number": "1", "x": shared, "y": shared}, document()]
    written = text.dump(documents)
    assert list(yaml.safe_load_all(written)) == documents
    assert "&" not in written
    assert "script: |" in written

"""The CRD: what is checked in is what the types say, it is one that an API server takes, and it explains itself."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightvllm.backends.k8s import labels
from lightvllm.operator import crd

ROOT = Path(__file__).parent.parent


def fields(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(f"{path}.{name}", field.get("items", field))


FIELDS = [each for part in ("spec", "status") for each in fields(part, crd.schema()["properties"][part])]


def test_what_is_checked_in_is_what_the_types_say() -> None:
    command = [sys.executable, ROOT / "manifests/generate.py", "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr


def test_it_is_small() -> None:
    assert len((ROOT / "manifests/base/crd.yaml").read_text().splitlines()) < 1500


@pytest.mark.parametrize(("path", "field"), FIELDS, ids=[path for path, _ in FIELDS])
def test_every_field_is_structural_and_described(path: str, field: dict[str, Any]) -> None:
    assert len(field["description"]) > 3
    assert "\n" not in field["description"]
    assert ("type" in field) is not ("x-kubernetes-int-or-string" in field)
    assert not {"$ref", "anyOf", "allOf", "oneOf", "title", "const"} & set(field)
    if field.get("type") == "object":
        says = {"properties", "additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(field)
        assert len(says) == 1, "an object whose fields the API server would drop"


def test_kubernetes_knows_the_form() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    kubernetes_validate.validate(crd.definition(), "1.36", strict=True)


PAIRWISE = re.compile(r"self\.(\w+)\.all\((\w), self\.\1\.exists_one\((\w), \3\.(\w+) == \2\.\4\)\)")


def test_an_api_server_goes_through_with_the_rules_that_compare_everything_with_everything() -> None:
    """It refuses an object at a rule that takes more than a million steps: about ten for a comparison, and one for
    every ten bytes that are compared (apiserver/pkg/apis/cel, PerCallLimit)."""
    found = []
    for path, field in [("spec", crd.schema()["properties"]["spec"]), *FIELDS]:
        for rule in field.get("x-kubernetes-validations", ()):
            for name, _, _, key in PAIRWISE.findall(rule["rule"]):
                items = field["properties"][name]
                length = items["items"]["properties"][key]["maxLength"]
                found.append(f"{path}.{name}.{key}")
                assert items["maxItems"] ** 2 * (10 + length / 10) < 1_000_000, found[-1]
    assert found == ["spec.env.name", "spec.pod.volumes.name", "spec.pod.volumes.mountPath"]


def test_its_subresources_and_columns_name_fields_that_are_there() -> None:
    (version,) = crd.definition()["spec"]["versions"]
    paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
    paths += version["subresources"]["scale"].values()
    known = {f".{path}" for path, _ in FIELDS}
    for path in paths:
        assert path.partition("[")[0] in known or path == ".metadata.creationTimestamp"
    assert version["name"] == labels.VERSION


def test_the_base_is_applied_whole() -> None:
    base = ROOT / "manifests/base"
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(path.name for path in base.glob("*.yaml") if path.name != "kustomization.yaml")

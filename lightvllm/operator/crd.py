"""The CustomResourceDefinition of ``LLMInference``, made from ``types``: a structural schema, and the rules in CEL.

``manifests/generate.py`` writes it to manifests/base/crd.yaml. Pure; needs pydantic alone.

Structural means (apiextensions/v1): no ``$ref``, one type per field, no ``null``. What pydantic's JSON Schema says is
turned into that: references are put in place, ``X | None`` becomes an X that may be left out, ``int | str`` becomes
``x-kubernetes-int-or-string``, ``dict[str, Any]`` keeps unknown fields, and ``additionalProperties: false`` goes,
because the API server drops what it does not know, or refuses it if the client asks for strict validation, as kubectl
does. The default of a field that holds an object is that object whole: the API server evaluates the rules on
it as it stands.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from lightvllm.backends.k8s import labels
from lightvllm.operator.rules import Fixed, Rule
from lightvllm.operator.types import LLMInference, Model

NAME = f"{labels.PLURAL}.{labels.GROUP}"
_KEPT = (
    "type",
    "format",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "enum",
    "required",
    "x-kubernetes-validations",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
)


def definition() -> dict[str, Any]:
    """The CustomResourceDefinition, ready for YAML."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME},
        "spec": {
            "group": labels.GROUP,
            "names": {
                "kind": labels.KIND,
                "listKind": f"{labels.KIND}List",
                "plural": labels.PLURAL,
                "singular": labels.KIND.lower(),
                "shortNames": ["llmi"],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": labels.VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [
                        _column("Model", "string", ".spec.model"),
                        _column("Engine", "string", ".spec.engine.name"),
                        _column("TP", "integer", ".spec.tensorParallelSize"),
                        _column("PP", "integer", ".spec.pipelineParallelSize"),
                        _column("Replicas", "integer", ".spec.replicas"),
                        _column("Ready", "integer", ".status.readyReplicas"),
                        _column("Available", "string", '.status.conditions[?(@.type=="Available")].status'),
                        {**_column("URL", "string", ".status.url"), "priority": 1},
                        _column("Age", "date", ".metadata.creationTimestamp"),
                    ],
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "schema": {"openAPIV3Schema": schema()},
                }
            ],
        },
    }


def schema() -> dict[str, Any]:
    """The structural schema of an LLMInference."""
    generated = LLMInference.model_json_schema(by_alias=True, schema_generator=_WithRules)
    result = _structural(generated, generated["$defs"])
    for name in ("apiVersion", "kind"):
        result["properties"][name] = {"type": "string"}
    result["properties"]["metadata"] = {"type": "object"}  # the API server's own; more may not be said of it
    return result


def _column(name: str, kind: str, path: str) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path}


class _WithRules(GenerateJsonSchema):
    """Pydantic's JSON Schema, in which each object has the rules of its model."""

    def model_schema(self, schema: Any) -> dict[str, Any]:
        result = super().model_schema(schema)
        model: type[Model] = schema["cls"]
        rules: list[Rule | Fixed] = [*model.rules, *model.fixed]
        validations = [{"rule": each.cel, "message": each.message} for each in rules]
        if validations:
            result["x-kubernetes-validations"] = validations
        return result


def _structural(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return _structural({**definitions[schema["$ref"].rpartition("/")[2]], **_beside_reference(schema)}, definitions)
    if "anyOf" in schema:
        return _one_of(schema, definitions)
    result: dict[str, Any] = {}
    if "description" in schema:
        result["description"] = " ".join(schema["description"].split())
    result.update((key, schema[key]) for key in _KEPT if key in schema)
    if schema.get("default") is not None:
        result["default"] = _said(schema["default"])
    if "properties" in schema:
        result["properties"] = {name: _structural(each, definitions) for name, each in schema["properties"].items()}
    elif schema.get("type") == "object":
        values = schema.get("additionalProperties")
        if isinstance(values, dict):
            result["additionalProperties"] = _structural(values, definitions)
        else:
            result["x-kubernetes-preserve-unknown-fields"] = True
    if "items" in schema:
        result["items"] = _structural(schema["items"], definitions)
    return result


def _said(default: Any) -> Any:
    """Without what is None, which in YAML is what is not there."""
    if isinstance(default, dict):
        return {name: _said(value) for name, value in default.items() if value is not None}
    return default


def _beside_reference(schema: dict[str, Any]) -> dict[str, Any]:
    """What a field says of itself where its type is a reference; its description wins over the type's."""
    return {key: value for key, value in schema.items() if key != "$ref"}


def _one_of(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    kinds = [each for each in schema["anyOf"] if each != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    if len(kinds) == 1:
        return _structural({**kinds[0], **rest}, definitions)
    if {each["type"] for each in kinds} != {"string", "integer"}:
        raise AssertionError(f"no structural schema for {schema}")
    # Bounds hold for a value of their own type only, as in JSON Schema.
    bounds = {key: value for each in kinds for key, value in each.items() if key in _KEPT and key != "type"}
    return {"x-kubernetes-int-or-string": True, **bounds}

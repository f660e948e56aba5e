"""What an LLMInference may be: the models and the CRD, of which each has its own words for it, judge the same objects.

The CRD's side is what an API server does: defaults are filled in, the structural schema is checked (jsonschema), and
each rule in CEL is evaluated (cel-python).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lightvllm.operator import crd
from lightvllm.operator.types import MAX_NAME, LLMInference, refused_changes

celpy = pytest.importorskip("celpy", reason="cel-python is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

SCHEMA = crd.schema()
MINIMAL = {"model": "smollm2-135m", "allowUnauthenticated": True}
VOLUME = {"name": "data", "mountPath": "/data", "source": {"emptyDir": {}}}
KEDA = {"maxReplicas": 4, "prometheusAddress": "http://prometheus:9090"}


def inference(name: str = "llama", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "lightvllm.io/v1",
        "kind": "LLMInference",
        "metadata": {"name": name},
        "spec": {**MINIMAL, **spec},
    }


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if each is not None}
        for name, field in schema.get("properties", {}).items():
            if name not in value and "default" in field:
                value[name] = copy.deepcopy(field["default"])
        below = schema.get("properties", {})
        rest = schema.get("additionalProperties") or {}
        return {key: with_defaults(each, below.get(key, rest)) for key, each in value.items()}
    if isinstance(value, list):
        return [with_defaults(each, schema.get("items", {})) for each in value]
    return value


def for_jsonschema(schema: dict[str, Any]) -> dict[str, Any]:
    """With what the API server means by its extensions and by objects without them."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    for key in ("properties",):
        if key in schema:
            result[key] = {name: for_jsonschema(field) for name, field in schema[key].items()}
            result["additionalProperties"] = False  # strict field validation, as kubectl asks for
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = for_jsonschema(schema[key])
    return result


CHECKED = for_jsonschema({**SCHEMA, "properties": {**SCHEMA["properties"], "metadata": {"type": "object"}}})
PROGRAMS: dict[str, Any] = {}


def evaluate(rule: str, **variables: Any) -> bool:
    if rule not in PROGRAMS:
        environment = celpy.Environment()
        PROGRAMS[rule] = environment.program(environment.compile(rule))
    return bool(PROGRAMS[rule].evaluate({key: celpy.json_to_cel(value) for key, value in variables.items()}))


def broken_rules(value: Any, schema: dict[str, Any], old: Any = None) -> list[str]:
    """Messages of the rules that do not hold in ``value`` or in what it holds."""
    found = []
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" in rule["rule"]:
            if old is not None and not evaluate(rule["rule"], self=value, oldSelf=old):
                found.append(rule["message"])
        elif not evaluate(rule["rule"], self=value):
            found.append(rule["message"])
    if isinstance(value, dict):
        for key, field in schema.get("properties", {}).items():
            if key in value:
                found += broken_rules(value[key], field, (old or {}).get(key))
    if isinstance(value, list):
        for each in value:
            found += broken_rules(each, schema.get("items", {}))
    return found


def refused_by_the_crd(given: dict[str, Any]) -> str:
    """Why, or ``""``."""
    value = with_defaults(given, SCHEMA)
    errors = [error.message for error in jsonschema.Draft202012Validator(CHECKED).iter_errors(value)]
    return "; ".join(errors or broken_rules(value, SCHEMA))


def refused_by_the_models(given: dict[str, Any]) -> str:
    try:
        LLMInference.model_validate(given)
    except ValidationError as error:
        return "; ".join(each["msg"] for each in error.errors())
    return ""


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"tensorParallelSize": 4, "pipelineParallelSize": 2},
    {"tensorParallelSize": 4, "pipelineParallelSize": 2, "gpusPerPod": 8},
    {"tensorParallelSize": 4, "pipelineParallelSize": 2, "gpusPerPod": 1},
    {"tensorParallelSize": 4, "pipelineParallelSize": 4, "gpusPerPod": 8},
    {"tensorParallelSize": 1, "pipelineParallelSize": 3, "gpusPerPod": 3},
    {"replicas": 0},
    {"replicas": 4, "autoscaling": KEDA},
    {"autoscaling": {**KEDA, "minReplicas": 0}},
    {"autoscaling": {"kind": "HPA", "minReplicas": 1, "maxReplicas": 1}},
    {"engine": {"name": "vllm"}, "blockSize": 32},
    {"engine": {"name": "sglang", "image": "sglang:latest"}},
    {"engine": {"name": "custom", "image": "mine", "command": ["serve"], "readinessProbe": {"tcpSocket": {"port": 1}}}},
    {"allowUnauthenticated": False, "apiKey": {"name": "keys", "key": "llama"}},
    {"allowUnauthenticated": False, "engine": {"name": "custom", "image": "mine"}},
    {"modelSource": {"claimName": "weights"}, "model": "llama/8b"},
    {"model": "/weights/llama"},
    {"cache": {"claimName": "cache"}},
    {"cache": {"sizeLimit": "10Gi"}},
    {"env": [{"name": "A", "value": ""}, {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
    {"envFrom": [{"secretRef": {"name": "s"}}, {"configMapRef": {"name": "c"}, "prefix": "X_"}]},
    {"pod": {"resources": {"requests": {"cpu": 1, "memory": "1Gi"}}, "volumes": [VOLUME]}},
    {"pod": {"affinity": {"nodeAffinity": {"anything": ["goes"]}}, "labels": {"team": "a"}}},
    {"network": {"nccl": {"NCCL_IB_GID_INDEX": "3"}, "hostIPC": True, "clients": [{"podSelector": {}}]}},
    {"gpuResource": ""},
    {"gpuResource": "nvidia.com/mig-1g.5gb"},
    {"pod": {"tolerations": [{"operator": "Exists"}, {"key": "gpu"}, {"key": "gpu", "value": "yes"}]}},
    {"pod": {"tolerations": [{"key": "a", "effect": "NoExecute", "tolerationSeconds": 3}]}},
    {"pod": {"labels": {"team": ""}, "nodeSelector": {"gpu": "A100-80GB_x"}}},
]


@pytest.mark.parametrize("spec", ACCEPTED, ids=str)
def test_both_accept(spec: dict[str, Any]) -> None:
    assert refused_by_the_crd(inference(**spec)) == ""
    assert refused_by_the_models(inference(**spec)) == ""


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tensorParallelSize": 4, "gpusPerPod": 3}, "must fill the pods"),
    ({"tensorParallelSize": 4, "pipelineParallelSize": 3, "gpusPerPod": 6}, "must fill the pods"),
    ({"tensorParallelSize": 2, "pipelineParallelSize": 3, "gpusPerPod": 4}, "must fill the pods"),
    ({"tensorParallelSize": 2, "gpusPerPod": 4}, "must fill the pods"),
    ({"tensorParallelSize": 64, "pipelineParallelSize": 64}, "above 1024"),
    ({"replicas": 5, "autoscaling": KEDA}, "replicas is above autoscaling.maxReplicas"),
    ({"autoscaling": {**KEDA, "minReplicas": 5}}, "minReplicas is above maxReplicas"),
    ({"autoscaling": {"kind": "HPA", "minReplicas": 0, "maxReplicas": 1}}, "does not scale to zero"),
    ({"autoscaling": {"maxReplicas": 1}}, "needs prometheusAddress"),
    ({"autoscaling": {**KEDA, "kind": "HPA"}}, "needs prometheusAddress"),
    ({"blockSize": 32}, "leave blockSize out"),
    ({"engine": {"name": "sglang"}}, "give engine.image"),
    ({"engine": {"name": "custom"}}, "give engine.image"),
    ({"engine": {"name": "vllm", "command": ["vllm"]}}, "command is for engine custom"),
    ({"engine": {"readinessProbe": {}}}, "readinessProbe is for engine custom"),
    ({"allowUnauthenticated": False}, "give apiKey"),
    ({"apiKey": {"name": "keys", "key": "llama"}}, "not both"),
    ({"apiKey": {"name": "keys", "key": "k"}, "engine": {"name": "custom", "image": "mine"}}, "not both"),
    ({"modelSource": {"claimName": "weights"}, "model": "../other"}, "folder below its mountPath"),
    ({"modelSource": {"claimName": "weights"}, "model": "/other"}, "folder below its mountPath"),
    ({"model": "--trust-remote-code"}, "must not begin with a dash"),
    ({"cache": {"claimName": "a", "sizeLimit": "1Gi"}}, "leave it or claimName out"),
    ({"env": [{"name": "A"}]}, "either value or valueFrom"),
    ({"env": [{"name": "A", "valueFrom": {}}]}, "either secretKeyRef or configMapKeyRef"),
    ({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "more than once"),
    ({"env": [{"name": "LWS_GROUP_SIZE", "value": "2"}]}, "set by the plan"),
    ({"env": [{"name": "LIGHTVLLM_K8S_WORKERS", "value": "a"}]}, "set by the plan"),
    ({"envFrom": [{"prefix": "X_"}]}, "either configMapRef or secretRef"),
    ({"pod": {"volumes": [VOLUME, {**VOLUME, "mountPath": "/other"}]}}, "the same name"),
    ({"pod": {"volumes": [VOLUME, {**VOLUME, "name": "other"}]}}, "the same mountPath"),
    ({"pod": {"volumes": [{**VOLUME, "mountPath": "/cache"}]}}, "the plan's own"),
    ({"pod": {"volumes": [{**VOLUME, "mountPath": "/tls"}]}}, "the plan's own"),
    ({"modelSource": {"claimName": "weights", "mountPath": "/tmp"}}, "the plan's own"),
    (
        {"modelSource": {"claimName": "w", "mountPath": "/data"}, "pod": {"volumes": [VOLUME]}},
        "the mountPath of modelSource",
    ),
    ({"pod": {"tolerations": [{"effect": "NoSchedule"}]}}, "needs operator Exists"),
    ({"pod": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}}, "compares no value"),
    ({"pod": {"tolerations": [{"key": "a", "tolerationSeconds": 3}]}}, "for effect NoExecute"),
    ({"pod": {"volumes": [{**VOLUME, "name": "lightvllm-shm"}]}}, "use another name"),
    ({"pod": {"labels": {"lightvllm.io/role": "leader"}}}, "set by the plan"),
    ({"network": {"nccl": {"GLOO_X": "1"}}}, "NCCL_* only"),
    ({"network": {"policy": False, "clients": [{}]}}, "clients needs the NetworkPolicies"),
]


@pytest.mark.parametrize(("spec", "why"), REFUSED, ids=str)
def test_both_refuse_for_the_same_reason(spec: dict[str, Any], why: str) -> None:
    assert why in refused_by_the_crd(inference(**spec))
    assert why in refused_by_the_models(inference(**spec))


@pytest.mark.parametrize(
    "spec",
    [
        {"model": ""},
        {"model": 1},
        {"tensorParallelSize": 0},
        {"tensorParallelSize": "4"},
        {"tensorParallelSize": 2.5},
        {"pipelineParallelSize": 65},
        {"replicas": -1},
        {"replicas": 1000},
        {"engine": {"name": "tgi"}},
        {"engin": {}},
        {"pod": {"resources": {"requests": {"cpu": 0.5}}}},
        {"pod": {"resources": {"requests": {"cpu": "half"}}}},
        {"pod": {"runAsUser": 0}},
        {"pod": {"labels": {"team": "a b"}}},
        {"pod": {"nodeSelector": {"disk": "a" * 64}}},
        {"pod": {"volumes": [{**VOLUME, "mountPath": "/data/"}]}},
        {"pod": {"volumes": [{**VOLUME, "mountPath": "/"}]}},
        {"monitoring": {"labels": {"release": "-"}}},
        {"gpuResource": "gpu"},
        {"pod": {"volumes": [{**VOLUME, "source": {}}]}},
        {"pod": {"volumes": [{**VOLUME, "source": {"emptyDir": {}, "hostPath": {}}}]}},
        {"network": {"shmSize": 8}},
        {"autoscaling": {}},
        {"tls": {}},
        {"startTimeoutSeconds": 1},
    ],
    ids=str,
)
def test_both_refuse_by_type_and_bounds(spec: dict[str, Any]) -> None:
    assert refused_by_the_crd(inference(**spec))
    assert refused_by_the_models(inference(**spec))


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "llama-3-8b",
        "a" * MAX_NAME,
        "A",
        "3b",
        "a.b",
        "a-",
        "a" * (MAX_NAME + 1),
        "a_b",
        "a-0-headless",
        "a-headless",
    ],
)
def test_both_judge_names_alike(name: str) -> None:
    assert bool(refused_by_the_crd(inference(name))) is bool(refused_by_the_models(inference(name)))


def test_nobody_is_named_like_a_service_of_anothers_group() -> None:
    assert "metadata.name must not end as" in refused_by_the_models(inference("a-0-headless"))


sizes = st.integers(1, 9)


@settings(deadline=None)  # the first evaluation of a rule compiles it
@given(sizes, sizes, st.none() | st.integers(1, 64))
def test_both_judge_layouts_alike_and_what_they_accept_fills_pods(
    tensor: int, pipeline: int, per_pod: int | None
) -> None:
    given_ = inference(tensorParallelSize=tensor, pipelineParallelSize=pipeline, gpusPerPod=per_pod)
    refused = refused_by_the_models(given_)
    assert bool(refused) is bool(refused_by_the_crd(given_))
    each = tensor if per_pod is None else per_pod
    pods = [range(first, first + each) for first in range(0, tensor * pipeline, each)]
    # Of a pod's ranks, either all have their whole tensor-parallel group in it, or all are of one group.
    stages = [{rank // tensor for rank in pod} for pod in pods]
    whole = all(len(pod) == len(held) * tensor for pod, held in zip(pods, stages, strict=True))
    shares = all(len(held) == 1 for held in stages)
    fills = pods[-1].stop == tensor * pipeline and (whole or shares)
    assert fills is not bool(refused)


ALTERABLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"tensorParallelSize": 2}, "tensorParallelSize cannot be changed"),
    ({}, {"pipelineParallelSize": 2}, "pipelineParallelSize cannot be changed"),
    ({"tensorParallelSize": 2}, {"tensorParallelSize": 2, "gpusPerPod": 1}, "gpusPerPod cannot be changed"),
    ({"gpusPerPod": 1}, {}, "gpusPerPod cannot be changed"),
    ({}, {"engine": {"name": "vllm"}}, "engine.name cannot be changed"),
    ({}, {"replicas": 3, "model": "other", "engine": {"image": "new"}, "suspend": True}, ""),
    ({"gpusPerPod": 1}, {"gpusPerPod": 1, "maxNumSeqs": 8}, ""),
]


@pytest.mark.parametrize(("old", "new", "why"), ALTERABLE, ids=str)
def test_both_refuse_the_same_changes(old: dict[str, Any], new: dict[str, Any], why: str) -> None:
    before, after = inference(**old), inference(**new)
    by_crd = broken_rules(with_defaults(after, SCHEMA), SCHEMA, with_defaults(before, SCHEMA))
    by_models = refused_changes(LLMInference.model_validate(before), LLMInference.model_validate(after))
    assert by_crd == by_models
    assert why in "; ".join(by_models)
    assert bool(by_models) is bool(why)


def defaults(schema: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Every default and the schema that it is a value of."""
    own = [(schema["default"], schema)] if "default" in schema else []
    below = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return own + [each for field in below for each in defaults(field)]


def test_every_default_stands_by_itself() -> None:
    """The API server looks at them when the CRD is made, before any default in them is filled in."""
    found = defaults(SCHEMA)
    assert len(found) > 40
    for value, schema in found:
        assert not list(jsonschema.Draft202012Validator(for_jsonschema(schema)).iter_errors(value)), value
        assert broken_rules(value, schema) == [], value


def test_filling_in_defaults_is_the_same_on_both_sides() -> None:
    filled = with_defaults(inference(), SCHEMA)
    assert LLMInference.model_validate(filled).model_dump(by_alias=True, exclude_none=True) == filled
    assert LLMInference.model_validate(inference()).model_dump(by_alias=True, exclude_none=True) == filled

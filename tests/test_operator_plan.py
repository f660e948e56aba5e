"""The plan as a whole: golden files, the same each time, valid by Kubernetes' schemas, its objects name each other."""

from __future__ import annotations

import base64
import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_objects import MINIMAL, Objects, inference
from pydantic import ValidationError

from lightvllm.backends.k8s import labels
from lightvllm.cli.main import main
from lightvllm.operator.planner import OPTIONAL_KINDS, Credentials, plan
from lightvllm.operator.planner.layout import Layout
from lightvllm.operator.planner.secrets import hosts
from lightvllm.operator.types import MAX_NAME, MAX_REPLICAS, OWN_PATHS, LLMInference, Spec

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

PLANS = Path(__file__).parent / "operator_plans"
KUBERNETES = "1.36"
FOREIGN = ("ScaledObject", "ServiceMonitor")  # kinds that are not Kubernetes' own


def check(objects: list[dict[str, Any]]) -> None:
    for each in objects:
        if each["kind"] not in FOREIGN:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_golden(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", str(path), "--plan"]) == 0
    made = capsys.readouterr().out
    golden = path.with_suffix(".plan")
    assert made == golden.read_text(), f"if this is meant: lightvllm manifest {path} --plan > {golden}"
    check(list(yaml.safe_load_all(made)))


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "engine": st.sampled_from(
        [
            None,
            {"name": "vllm", "args": ["--seed=1"]},
            {"name": "sglang", "image": "sglang"},
            {"name": "custom", "image": "mine", "command": ["run"]},
        ]
    ),
    "tensorParallelSize": st.integers(1, 8),
    "pipelineParallelSize": st.integers(1, 4),
    "gpusPerPod": st.none() | st.integers(1, 16),
    "gpuResource": st.sampled_from([None, "", "amd.com/gpu"]),
    "replicas": st.integers(0, 3),
    "maxNumSeqs": st.none() | st.integers(1, 512),
    "startupPolicy": st.sampled_from(["LeaderFirst", "Parallel"]),
    "suspend": st.booleans(),
    "topology": st.sampled_from([None, {"stages": "Any"}, {"groupKey": "rack", "replicasKey": "zone"}]),
    "network": st.sampled_from([None, {"policy": False}, {"hostIPC": True}, {"nccl": {"NCCL_DEBUG": "INFO"}}]),
    "tls": st.none() | st.just({"secretName": "tls"}),
    "modelSource": st.none() | st.just({"claimName": "weights"}),
    "autoscaling": st.sampled_from(
        [None, {"maxReplicas": 4, "prometheusAddress": "http://p"}, {"kind": "HPA", "maxReplicas": 4}]
    ),
    "monitoring": st.none() | st.just({}),
    "drain": st.none() | st.just({"pauseSeconds": 0, "timeoutSeconds": 0}),
}


@st.composite
def inferences(draw: st.DrawFn) -> LLMInference:
    spec = {name: draw(strategy) for name, strategy in FIELDS.items()}
    try:
        return inference(draw(st.sampled_from(["a", "a" * MAX_NAME])), draw(st.sampled_from([None, "models"])), **spec)
    except ValidationError:  # such as gpusPerPod that does not fit
        return inference(**{**spec, "gpusPerPod": None, "tensorParallelSize": 2})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(inferences())
def test_every_plan_is_valid_and_hangs_together(given_: LLMInference) -> None:
    before = copy.deepcopy(given_)
    made = plan(given_, OPTIONAL_KINDS)
    assert given_ == before
    assert plan(LLMInference.model_validate(given_.model_dump(by_alias=True)), OPTIONAL_KINDS) == made
    check(made.objects)
    keys = [(each["kind"], each["metadata"]["name"]) for each in made.objects]
    assert len(set(keys)) == len(keys)
    assert all(len(name) <= 63 for _, name in keys)
    spec, layout = given_.spec, Layout.of(given_.spec)
    sets = [each for each in made.objects if each["kind"] == "StatefulSet"]
    assert len(sets) == spec.replicas
    assert all(len(each["metadata"]["name"]) <= 52 for each in sets), "a StatefulSet's name plus its revision's digest"
    accounts = {name for kind, name in keys if kind == "ServiceAccount"}
    maps = {name for kind, name in keys if kind == "ConfigMap"}
    for each in sets:
        template = each["spec"]["template"]
        pod, mine = template["spec"], template["metadata"]["labels"]
        assert each["spec"]["selector"]["matchLabels"].items() <= mine.items()
        assert ("Service", each["spec"]["serviceName"]) in keys
        assert pod["serviceAccountName"] in accounts
        (container,) = pod["containers"]
        assert container["envFrom"][0]["configMapRef"]["name"] in maps
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        names = [variable["name"] for variable in container["env"]]
        ports = [port["containerPort"] for port in container["ports"]]
        assert all(len(set(values)) == len(values) for values in (paths, names, ports))
        if not spec.suspend:
            assert each["spec"]["replicas"] * layout.per_pod == layout.world
        mounted = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
        assert mounted <= {needed.name for needed in made.needed}
    for service in (each for each in made.objects if each["kind"] == "Service"):
        chosen = {k: v for k, v in service["spec"]["selector"].items() if k != labels.POD_INDEX_LABEL}
        matching = [each for each in sets if chosen.items() <= each["spec"]["template"]["metadata"]["labels"].items()]
        headless = service["spec"].get("clusterIP") == "None"
        assert len(matching) == (1 if headless else spec.replicas)
        assert headless is (labels.POD_INDEX_LABEL not in service["spec"]["selector"])


def test_the_longest_name_is_one_that_kubernetes_takes() -> None:
    Objects(inference("a" * MAX_NAME, replicas=1))
    longest = f"{'a' * MAX_NAME}-{MAX_REPLICAS - 1}"
    assert len(longest) <= 52
    assert len(f"{longest}-headless") <= 63


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16))
def test_layout_deals_every_rank_once(tensor: int, pipeline: int, per_pod: int) -> None:
    try:
        spec = Spec.model_validate(
            {**MINIMAL, "tensorParallelSize": tensor, "pipelineParallelSize": pipeline, "gpusPerPod": per_pod}
        )
    except ValidationError:
        return
    layout = Layout.of(spec)
    dealt = [rank for pod in range(layout.pods) for rank in layout.ranks(pod)]
    assert dealt == list(range(layout.world))
    assert {stage for pod in range(layout.pods) for stage in layout.stages(pod)} == set(range(pipeline))
    for pod in range(layout.pods):
        of_its_stages = {rank for stage in layout.stages(pod) for rank in range(stage * tensor, (stage + 1) * tensor)}
        assert layout.whole_stages is (of_its_stages == set(layout.ranks(pod)))


def test_owner() -> None:
    assert all("ownerReferences" not in each["metadata"] for each in Objects(inference()).all)
    for each in Objects(inference(uid="1-2", namespace="models", monitoring={})).all:
        (owner,) = each["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == (
            "LLMInference",
            "llama",
            "1-2",
            True,
        )
        assert each["metadata"]["namespace"] == "models"


def test_with_credentials_a_groups_secrets_are_planned_and_without_they_are_named() -> None:
    from lightvllm.certs import Authority, read_certificate, usage_and_hosts

    two = inference(tensorParallelSize=2, gpusPerPod=1, replicas=2, uid="1")
    authority = Authority.new()
    worker, driver = authority.issue("w", "server", hosts(two, 0)), authority.issue("d", "client")
    known = Credentials(b"token\n", authority.cert, (worker.cert, worker.key), (driver.cert, driver.key))
    assert b"PRIVATE" not in repr(known).encode()
    made = plan(two, credentials={0: known})
    secrets = {each["metadata"]["name"]: each for each in made.objects if each["kind"] == "Secret"}
    check(list(secrets.values()))
    assert set(secrets) == {"llama-0-workers", "llama-0-driver"}
    files = {name: base64.b64decode(data) for name, data in secrets["llama-0-workers"]["data"].items()}
    assert files == {"token": b"token\n", "ca.pem": authority.cert, "cert.pem": worker.cert, "key.pem": worker.key}
    assert usage_and_hosts(read_certificate(files["cert.pem"])) == (
        "server",
        ["llama-0-0.llama-0-headless", "llama-0-1.llama-0-headless"],
    )
    assert [needed.name for needed in made.needed] == ["llama-1-workers", "llama-1-driver"]


def test_optional_kinds_are_left_out_with_a_reason_where_the_cluster_lacks_them() -> None:
    keda = {"maxReplicas": 2, "prometheusAddress": "http://p"}
    made = plan(inference(autoscaling=keda, monitoring={}))
    assert not {each["kind"] for each in made.objects} & set(FOREIGN)
    assert [each.partition(":")[0] for each in made.left_out] == ["autoscaling", "monitoring"]
    assert plan(inference(autoscaling=keda, monitoring={}), OPTIONAL_KINDS).left_out == []


def test_pods_may_do_nothing_that_they_need_not() -> None:
    objects = Objects(inference(tensorParallelSize=2, gpusPerPod=1))
    assert objects.pod["automountServiceAccountToken"] is False
    assert objects.one("ServiceAccount")["automountServiceAccountToken"] is False
    assert objects.pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*objects.pod["containers"], *objects.pod["initContainers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert not {"hostIPC", "hostNetwork", "hostPID"} & set(objects.pod)


def test_nobody_else_mounts_where_the_plan_does() -> None:
    spec = {"tensorParallelSize": 2, "gpusPerPod": 1, "tls": {"secretName": "t"}}
    assert sorted(Objects(inference(**spec)).mounts) == sorted(OWN_PATHS)


def test_what_waits_for_the_leader_keeps_the_pods_class_and_quota() -> None:
    resources = {"cpu": "4", "memory": "8Gi", "rdma/hca": 1}
    pod = {"resources": {"requests": resources, "limits": resources}}
    (waiting,) = Objects(inference(tensorParallelSize=2, gpusPerPod=1, pod=pod)).pod["initContainers"]
    plain = {"cpu": "4", "memory": "8Gi"}
    assert waiting["resources"] == {"requests": plain, "limits": plain}


def test_a_change_of_the_config_map_replaces_the_pods() -> None:
    # SGLang's arguments say nothing of MODEL_NAME's like: the digest alone differs for a custom engine.
    custom = {"name": "custom", "image": "mine"}
    one, other = (Objects(inference(engine=custom, maxNumSeqs=number)) for number in (1, 2))
    assert one.container == other.container
    assert one.template["metadata"]["annotations"] != other.template["metadata"]["annotations"]


def test_only_a_group_of_one_pod_can_say_by_its_template_who_leads() -> None:
    assert Objects(inference()).template["metadata"]["labels"][labels.ROLE_LABEL] == labels.LEADER
    assert labels.ROLE_LABEL not in Objects(inference(pipelineParallelSize=2)).template["metadata"]["labels"]

"""Every field of the spec changes the plan in the way that its description says; the table below leaves none out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from operator_objects import Objects, inference

from lightvllm.operator import crd
from lightvllm.operator.planner.placement import PREFERRED, REQUIRED


def leaves(path: str, schema: dict[str, Any]) -> Iterator[str]:
    for name, field in schema["properties"].items():
        item = field.get("items", field)
        here = f"{path}.{name}" if path else name
        if "properties" in item:
            yield from leaves(here, item)
        else:
            yield here


ALL_FIELDS = list(leaves("", crd.schema()["properties"]["spec"]))


@dataclass
class Effect:
    """With ``spec``, ``look`` sees ``expected``; with ``without`` it does not."""

    field: str
    spec: dict[str, Any]
    look: Callable[[Objects], Any]
    expected: Any
    without: dict[str, Any]


def effect(
    field: str,
    spec: dict[str, Any],
    look: Callable[[Objects], Any],
    expected: Any,
    without: dict[str, Any] | None = None,
) -> Effect:
    return Effect(field, spec, look, expected, without or {})


def option(name: str) -> Callable[[Objects], Any]:
    """The value of an option of the server's; True for a switch, None if it is not there."""

    def look(objects: Objects) -> Any:
        for word in objects.words:
            given, _, value = word.partition("=")
            if given == name:
                return value or True
        return None

    return look


def variable(name: str) -> Callable[[Objects], Any]:
    return lambda objects: objects.env.get(name)


def in_pod(*path: str) -> Callable[[Objects], Any]:
    def look(objects: Objects) -> Any:
        found = objects.pod
        for part in path:
            found = (found or {}).get(part)
        return found

    return look


def kept_apart(objects: Objects) -> Any:
    """What podAntiAffinity prefers."""
    return [
        each["podAffinityTerm"]["topologyKey"]
        for each in objects.pod.get("affinity", {}).get("podAntiAffinity", {}).get(PREFERRED, [])
    ]


def mounted(path: str) -> Callable[[Objects], Any]:
    def look(objects: Objects) -> Any:
        volume = dict(objects.mounts.get(path, {}))
        volume.pop("name", None)
        return volume

    return look


def toleration(objects: Objects) -> Any:
    return objects.pod.get("tolerations", [{}])[0]


def keda(objects: Objects) -> Any:
    return (objects.of("ScaledObject") or [{"spec": {}}])[0]["spec"]


def monitor(objects: Objects) -> Any:
    return (objects.of("ServiceMonitor") or [None])[0]


def config(name: str) -> Callable[[Objects], Any]:
    return lambda objects: objects.one("ConfigMap")["data"].get(name)


CUSTOM = {"name": "custom", "image": "mine"}
PAIR = {"tensorParallelSize": 2, "pipelineParallelSize": 2}
KEDA = {"maxReplicas": 4, "prometheusAddress": "http://p"}
VOLUME = {"name": "data", "mountPath": "/data", "source": {"persistentVolumeClaim": {"claimName": "data"}}}
SECRET = {"name": "s", "key": "k"}


def volumes(**more: Any) -> dict[str, Any]:
    return {"pod": {"volumes": [{**VOLUME, **more}]}}


def tolerations(**toleration: Any) -> dict[str, Any]:
    return {"pod": {"tolerations": [toleration]}}


def env(**value: Any) -> dict[str, Any]:
    return {"env": [{"name": "A", **value}]}


EFFECTS = [
    effect("model", {"model": "other"}, lambda o: o.words[2], "other"),
    effect("model", {"model": "other"}, option("--served-model-name"), "other"),
    effect("model", {"model": "other"}, config("MODEL_NAME"), "other"),
    effect("model", {"model": "a$(HOME)"}, lambda o: o.words[2], "a$$(HOME)"),
    effect("servedModelName", {"servedModelName": "x"}, option("--served-model-name"), "x"),
    effect("servedModelName", {"servedModelName": "x"}, config("MODEL_NAME"), "x"),
    effect(
        "modelSource.claimName",
        {"modelSource": {"claimName": "w"}},
        mounted("/models"),
        {"persistentVolumeClaim": {"claimName": "w", "readOnly": True}},
    ),
    effect("modelSource.claimName", {"modelSource": {"claimName": "w"}}, lambda o: o.words[2], "/models/smollm2-135m"),
    effect(
        "modelSource.mountPath",
        {"modelSource": {"claimName": "w", "mountPath": "/x"}},
        lambda o: o.words[2],
        "/x/smollm2-135m",
    ),
    effect(
        "cache.claimName",
        {"cache": {"claimName": "c"}},
        mounted("/cache"),
        {"persistentVolumeClaim": {"claimName": "c"}},
    ),
    effect("cache.sizeLimit", {"cache": {"sizeLimit": "1Gi"}}, mounted("/cache"), {"emptyDir": {"sizeLimit": "1Gi"}}),
    effect("engine.name", {"engine": {"name": "vllm"}}, lambda o: o.words[:2], ["vllm", "serve"]),
    effect("engine.name", {"engine": {"name": "vllm"}}, lambda o: o.container["image"], "lightvllm-vllm:latest"),
    effect(
        "engine.name",
        {"engine": {"name": "sglang", "image": "s"}},
        lambda o: o.words[:3],
        ["python3", "-m", "sglang.launch_server"],
    ),
    effect("engine.name", {"engine": CUSTOM}, lambda o: "command" in o.container, False),
    effect("engine.image", {"engine": {"image": "x"}}, lambda o: o.container["image"], "x"),
    effect(
        "engine.imagePullPolicy",
        {"engine": {"imagePullPolicy": "Never"}},
        lambda o: o.container["imagePullPolicy"],
        "Never",
    ),
    effect(
        "engine.command",
        {"engine": {**CUSTOM, "command": ["a", "b"]}},
        lambda o: o.container.get("command"),
        ["a", "b"],
        {"engine": CUSTOM},
    ),
    effect("engine.args", {"engine": {"args": ["--no-docs"]}}, option("--no-docs"), True),
    effect(
        "engine.args", {**PAIR, "engine": {"args": ["--no-docs"]}}, lambda o: o.container["args"][-1], "--no-docs", PAIR
    ),
    effect("engine.args", {"engine": {**CUSTOM, "args": ["x"]}}, lambda o: o.words, ["x"], {"engine": CUSTOM}),
    effect(
        "engine.readinessProbe",
        {"engine": {**CUSTOM, "readinessProbe": {"tcpSocket": {"port": 1}}}},
        lambda o: o.container.get("readinessProbe"),
        {"tcpSocket": {"port": 1}},
        {"engine": CUSTOM},
    ),
    effect("tensorParallelSize", {"tensorParallelSize": 2}, option("--tensor-parallel-size"), "2"),
    effect("tensorParallelSize", {"tensorParallelSize": 2}, config("TENSOR_PARALLEL_SIZE"), "2"),
    effect(
        "tensorParallelSize",
        {"tensorParallelSize": 2},
        lambda o: o.container["resources"]["limits"]["nvidia.com/gpu"],
        2,
    ),
    effect("pipelineParallelSize", {"pipelineParallelSize": 2}, config("PIPELINE_PARALLEL_SIZE"), "2"),
    effect(
        "pipelineParallelSize", {"pipelineParallelSize": 2}, lambda o: o.of("StatefulSet")[0]["spec"]["replicas"], 2
    ),
    effect("pipelineParallelSize", {"pipelineParallelSize": 2}, variable("LWS_GROUP_SIZE"), "2"),
    effect("pipelineParallelSize", {"pipelineParallelSize": 2}, option("--k8s-service"), "llama-0-headless:50051"),
    effect("gpusPerPod", {**PAIR, "gpusPerPod": 1}, variable("LWS_GROUP_SIZE"), "4", PAIR),
    effect("gpusPerPod", {**PAIR, "gpusPerPod": 4}, lambda o: o.container.get("args"), None, PAIR),
    effect("gpusPerPod", {**PAIR, "gpusPerPod": 1}, option("--k8s-gpus-per-pod"), "1", PAIR),
    effect("gpuResource", {"gpuResource": "x/gpu"}, lambda o: o.container["resources"]["limits"], {"x/gpu": 1}),
    effect("gpuResource", {"gpuResource": ""}, lambda o: o.container["resources"], {}),
    effect("gpuResource", {"gpuResource": ""}, option("--device"), "cpu"),
    effect(
        "replicas",
        {"replicas": 2},
        lambda o: [each["metadata"]["name"] for each in o.of("StatefulSet")],
        ["llama-0", "llama-1"],
    ),
    effect("replicas", {"replicas": 0}, lambda o: o.of("StatefulSet"), []),
    effect("maxModelLen", {"maxModelLen": 512}, option("--max-model-len"), "512"),
    effect("maxNumSeqs", {"maxNumSeqs": 4}, option("--max-num-seqs"), "4"),
    effect("maxNumSeqs", {"maxNumSeqs": 4}, config("MAX_NUM_SEQS"), "4"),
    effect(
        "blockSize",
        {"engine": {"name": "vllm"}, "blockSize": 32},
        option("--block-size"),
        "32",
        {"engine": {"name": "vllm"}},
    ),
    effect("blockSize", {"engine": CUSTOM, "blockSize": 32}, config("BLOCK_SIZE"), "32", {"engine": CUSTOM}),
    effect(
        "pod.resources.requests",
        {"pod": {"resources": {"requests": {"cpu": 2}}}},
        lambda o: o.container["resources"]["requests"],
        {"cpu": 2, "nvidia.com/gpu": 1},
    ),
    effect(
        "pod.resources.limits",
        {"pod": {"resources": {"limits": {"memory": "1Gi"}}}},
        lambda o: o.container["resources"]["limits"],
        {"memory": "1Gi", "nvidia.com/gpu": 1},
    ),
    effect("pod.nodeSelector", {"pod": {"nodeSelector": {"a": "b"}}}, in_pod("nodeSelector"), {"a": "b"}),
    effect("pod.tolerations.key", tolerations(key="a"), toleration, {"key": "a", "operator": "Equal"}),
    effect("pod.tolerations.operator", tolerations(operator="Exists"), toleration, {"operator": "Exists"}),
    effect("pod.tolerations.value", tolerations(key="a", value="b"), lambda o: toleration(o).get("value"), "b"),
    effect(
        "pod.tolerations.effect",
        tolerations(key="a", effect="NoSchedule"),
        toleration,
        {"key": "a", "operator": "Equal", "effect": "NoSchedule"},
    ),
    effect(
        "pod.tolerations.tolerationSeconds",
        tolerations(key="a", effect="NoExecute", tolerationSeconds=3),
        lambda o: toleration(o).get("tolerationSeconds"),
        3,
    ),
    effect(
        "pod.affinity",
        {"pod": {"affinity": {"nodeAffinity": {"x": 1}}}},
        in_pod("affinity"),
        {"nodeAffinity": {"x": 1}},
    ),
    effect(
        "pod.affinity",
        {**PAIR, "pod": {"affinity": {"podAntiAffinity": {PREFERRED: [{"podAffinityTerm": {"topologyKey": "t"}}]}}}},
        kept_apart,
        ["kubernetes.io/hostname", "t"],
        PAIR,
    ),
    effect(
        "pod.annotations",
        {"pod": {"annotations": {"a": "b"}}},
        lambda o: o.template["metadata"]["annotations"].get("a"),
        "b",
    ),
    effect("pod.labels", {"pod": {"labels": {"a": "b"}}}, lambda o: o.template["metadata"]["labels"].get("a"), "b"),
    effect("pod.volumes.name", volumes(name="x"), lambda o: o.pod["volumes"][-1]["name"], "x", volumes()),
    effect("pod.volumes.mountPath", volumes(mountPath="/x"), lambda o: "/x" in o.mounts, True, volumes()),
    effect(
        "pod.volumes.readOnly",
        volumes(readOnly=True),
        lambda o: o.container["volumeMounts"][-1].get("readOnly"),
        True,
        volumes(),
    ),
    effect(
        "pod.volumes.subPath",
        volumes(subPath="x"),
        lambda o: o.container["volumeMounts"][-1].get("subPath"),
        "x",
        volumes(),
    ),
    effect("pod.volumes.source", volumes(source={"emptyDir": {}}), mounted("/data"), {"emptyDir": {}}, volumes()),
    effect("pod.priorityClassName", {"pod": {"priorityClassName": "x"}}, in_pod("priorityClassName"), "x"),
    effect("pod.runtimeClassName", {"pod": {"runtimeClassName": "x"}}, in_pod("runtimeClassName"), "x"),
    effect("pod.schedulerName", {"pod": {"schedulerName": "x"}}, in_pod("schedulerName"), "x"),
    effect(
        "pod.imagePullSecrets.name",
        {"pod": {"imagePullSecrets": [{"name": "x"}]}},
        in_pod("imagePullSecrets"),
        [{"name": "x"}],
    ),
    effect("pod.runAsUser", {"pod": {"runAsUser": 7}}, in_pod("securityContext", "runAsUser"), 7),
    effect("pod.runAsUser", {"pod": {"runAsUser": 7}}, in_pod("securityContext", "fsGroup"), 7),
    effect("env.name", env(value="1"), lambda o: "A" in o.env, True),
    effect("env.name", {"env": [{"name": "HOME", "value": "/x"}]}, variable("HOME"), "/x"),
    effect("env.value", env(value="1"), variable("A"), "1"),
    effect(
        "env.valueFrom.secretKeyRef.name",
        env(valueFrom={"secretKeyRef": SECRET}),
        variable("A"),
        {"secretKeyRef": SECRET},
    ),
    effect(
        "env.valueFrom.secretKeyRef.key",
        env(valueFrom={"secretKeyRef": SECRET}),
        variable("A"),
        {"secretKeyRef": SECRET},
    ),
    effect(
        "env.valueFrom.configMapKeyRef.name",
        env(valueFrom={"configMapKeyRef": SECRET}),
        variable("A"),
        {"configMapKeyRef": SECRET},
    ),
    effect(
        "env.valueFrom.configMapKeyRef.key",
        env(valueFrom={"configMapKeyRef": SECRET}),
        variable("A"),
        {"configMapKeyRef": SECRET},
    ),
    effect(
        "envFrom.prefix",
        {"envFrom": [{"prefix": "X_", "secretRef": {"name": "s"}}]},
        lambda o: o.container["envFrom"][-1].get("prefix"),
        "X_",
    ),
    effect(
        "envFrom.configMapRef.name",
        {"envFrom": [{"configMapRef": {"name": "c"}}]},
        lambda o: o.container["envFrom"][-1],
        {"configMapRef": {"name": "c"}},
    ),
    effect(
        "envFrom.secretRef.name",
        {"envFrom": [{"secretRef": {"name": "s"}}]},
        lambda o: o.container["envFrom"][-1],
        {"secretRef": {"name": "s"}},
    ),
    effect("startupPolicy", {**PAIR, "startupPolicy": "Parallel"}, in_pod("initContainers"), None, PAIR),
    effect("startTimeoutSeconds", {"startTimeoutSeconds": 61}, option("--start-timeout"), "61"),
    effect(
        "startTimeoutSeconds",
        {"startTimeoutSeconds": 61},
        lambda o: o.container["startupProbe"]["failureThreshold"],
        13,
    ),
    effect("topology.stages", PAIR, kept_apart, ["kubernetes.io/hostname"], {**PAIR, "topology": {"stages": "Any"}}),
    effect(
        "topology.stages",
        {"tensorParallelSize": 2, "gpusPerPod": 1},
        lambda o: [each["topologyKey"] for each in o.pod["affinity"]["podAffinity"][REQUIRED]],
        ["kubernetes.io/hostname"],
        {"tensorParallelSize": 2, "gpusPerPod": 1, "topology": {"stages": "Any", "groupKey": "rack"}},
    ),
    effect(
        "topology.stages",
        {**PAIR, "gpusPerPod": 1},
        lambda o: len(o.pod.get("affinity", {}).get("podAffinity", {}).get(PREFERRED, [])),
        1,
        {**PAIR, "gpusPerPod": 1, "topology": {"stages": "Any"}},
    ),
    effect("topology.nodeKey", {**PAIR, "topology": {"nodeKey": "n"}}, kept_apart, ["n"], PAIR),
    effect(
        "topology.groupKey",
        {**PAIR, "topology": {"groupKey": "rack"}},
        lambda o: [each["topologyKey"] for each in o.pod["affinity"].get("podAffinity", {}).get(REQUIRED, [])],
        ["rack"],
        PAIR,
    ),
    effect("topology.replicasKey", {"topology": {"replicasKey": "zone"}}, kept_apart, ["zone"]),
    effect(
        "network.annotations",
        {"network": {"annotations": {"k8s.v1.cni.cncf.io/networks": "roce"}}},
        lambda o: o.template["metadata"]["annotations"].get("k8s.v1.cni.cncf.io/networks"),
        "roce",
    ),
    effect("network.nccl", {"network": {"nccl": {"NCCL_IB_TC": "106"}}}, variable("NCCL_IB_TC"), "106"),
    effect("network.hostIPC", {"network": {"hostIPC": True}}, in_pod("hostIPC"), True),
    effect("network.hostIPC", {"network": {"hostIPC": True}}, lambda o: "/dev/shm" in o.mounts, False),
    effect(
        "network.shmSize",
        {"network": {"shmSize": "1Gi"}},
        mounted("/dev/shm"),
        {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ),
    effect(
        "network.clients",
        {"network": {"clients": [{"podSelector": {}}]}},
        lambda o: o.one("NetworkPolicy", "llama-api")["spec"]["ingress"][0].get("from"),
        [{"podSelector": {}}],
    ),
    effect("network.ipFamily", {"network": {"ipFamily": "IPv6"}}, option("--host"), "::"),
    effect(
        "network.ipFamily",
        {**PAIR, "network": {"ipFamily": "IPv6"}},
        lambda o: (
            o.container["livenessProbe"]["exec"]["command"][-1],
            "lightvllm worker --listen [::]:50051 " in o.words[2],
        ),
        ("::1", True),
        PAIR,
    ),
    effect("network.policy", {"network": {"policy": False}}, lambda o: o.of("NetworkPolicy"), []),
    effect(
        "autoscaling.kind",
        {"autoscaling": {"kind": "HPA", "maxReplicas": 4}},
        lambda o: len(o.of("HorizontalPodAutoscaler")),
        1,
    ),
    effect(
        "autoscaling.minReplicas",
        {"autoscaling": {**KEDA, "minReplicas": 0}},
        lambda o: keda(o)["minReplicaCount"],
        0,
        {"autoscaling": KEDA},
    ),
    effect(
        "autoscaling.maxReplicas",
        {"autoscaling": {**KEDA, "maxReplicas": 9}},
        lambda o: keda(o)["maxReplicaCount"],
        9,
        {"autoscaling": KEDA},
    ),
    effect(
        "autoscaling.targetPending",
        {"autoscaling": {**KEDA, "targetPending": 3}},
        lambda o: keda(o)["triggers"][0]["metadata"]["threshold"],
        "3",
        {"autoscaling": KEDA},
    ),
    effect(
        "autoscaling.prometheusAddress",
        {"autoscaling": {**KEDA, "prometheusAddress": "http://q"}},
        lambda o: keda(o)["triggers"][0]["metadata"]["serverAddress"],
        "http://q",
        {"autoscaling": KEDA},
    ),
    effect(
        "autoscaling.pollingSeconds",
        {"autoscaling": {**KEDA, "pollingSeconds": 9}},
        lambda o: keda(o)["pollingInterval"],
        9,
        {"autoscaling": KEDA},
    ),
    effect(
        "autoscaling.cooldownSeconds",
        {"autoscaling": {**KEDA, "cooldownSeconds": 9}},
        lambda o: keda(o)["cooldownPeriod"],
        9,
        {"autoscaling": KEDA},
    ),
    effect(
        "tls.secretName",
        {"tls": {"secretName": "t"}},
        mounted("/tls"),
        {"secret": {"secretName": "t", "defaultMode": 0o440}},
    ),
    effect("tls.secretName", {"tls": {"secretName": "t"}}, option("--ssl-certfile"), "/tls/tls.crt"),
    effect(
        "tls.secretName",
        {"tls": {"secretName": "t"}},
        lambda o: o.container["readinessProbe"]["httpGet"]["scheme"],
        "HTTPS",
    ),
    effect(
        "tls.secretName",
        {**PAIR, "tls": {"secretName": "t"}},
        lambda o: o.container["readinessProbe"]["exec"]["command"][4],
        "https",
        PAIR,
    ),
    effect(
        "apiKey.name",
        {"allowUnauthenticated": None, "apiKey": SECRET},
        variable("LIGHTVLLM_API_KEY"),
        {"secretKeyRef": SECRET},
    ),
    effect(
        "apiKey.key",
        {"allowUnauthenticated": None, "apiKey": SECRET, "engine": {"name": "vllm"}},
        variable("VLLM_API_KEY"),
        {"secretKeyRef": SECRET},
    ),
    effect(
        "allowUnauthenticated",
        {"allowUnauthenticated": True},
        option("--allow-unauthenticated"),
        True,
        {"allowUnauthenticated": None, "apiKey": SECRET},
    ),
    effect(
        "drain.pauseSeconds",
        {"drain": {"pauseSeconds": 7}},
        lambda o: o.container["lifecycle"]["preStop"],
        {"sleep": {"seconds": 7}},
    ),
    effect("drain.pauseSeconds", {"drain": {"pauseSeconds": 0}}, lambda o: "lifecycle" in o.container, False),
    effect("drain.timeoutSeconds", {"drain": {"timeoutSeconds": 90}}, option("--shutdown-timeout"), "90"),
    effect("drain.timeoutSeconds", {"drain": {"timeoutSeconds": 90}}, in_pod("terminationGracePeriodSeconds"), 125),
    effect("suspend", {"suspend": True}, lambda o: o.of("StatefulSet")[0]["spec"]["replicas"], 0),
    effect(
        "suspend", {"suspend": True, "autoscaling": KEDA}, lambda o: o.of("ScaledObject"), [], {"autoscaling": KEDA}
    ),
    effect(
        "monitoring.intervalSeconds",
        {"monitoring": {"intervalSeconds": 7}},
        lambda o: monitor(o) and monitor(o)["spec"]["endpoints"][0]["interval"],
        "7s",
    ),
    effect(
        "monitoring.labels",
        {"monitoring": {"labels": {"a": "b"}}},
        lambda o: monitor(o)["metadata"]["labels"].get("a"),
        "b",
        {"monitoring": {}},
    ),
]


@pytest.mark.parametrize("each", EFFECTS, ids=lambda each: f"{each.field}: {each.expected}"[:60])
def test_effect(each: Effect) -> None:
    assert each.look(Objects(inference(**each.spec))) == each.expected
    assert each.look(Objects(inference(**each.without))) != each.expected


def test_no_field_is_left_out() -> None:
    assert set(ALL_FIELDS) == {each.field for each in EFFECTS}

"""The template of a group's pods: one container, its variables, volumes, probes and rights."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from lightvllm.backends.k8s.labels import GROUP, HTTP_PORT, HTTP_PORT_NAME, LEADER, POD_INDEX_LABEL, ROLE_LABEL
from lightvllm.operator.planner.commands import (
    DRIVER_FOLDER,
    IMAGES,
    TLS_FOLDER,
    Running,
    running,
)
from lightvllm.operator.planner.layout import Layout
from lightvllm.operator.planner.names import Names
from lightvllm.operator.planner.placement import affinity
from lightvllm.operator.planner.scripts import ANSWER_SECONDS, WORKERS_FOLDER
from lightvllm.operator.types import OWN_VOLUMES, LLMInference, Model, Spec

CACHE = "/cache"
CONFIG_ANNOTATION = f"{GROUP}/config"
"""A digest of the ConfigMap, so that pods are replaced when it changes."""

_PROBE_SECONDS = ANSWER_SECONDS + 1  # between two probes, and for one of them
_AFTER_DRAINING = 30  # seconds for the engine to let go of its workers and memory
# The first process of a container is not ended by a signal for which it has no trap.
_LEADER_WAITED_FOR = 'trap "exit 143" TERM; until getent hosts "$LWS_LEADER_ADDRESS" >/dev/null; do sleep 1; done'
_PLAIN_RESOURCES = ("cpu", "memory", "ephemeral-storage")


def template(inference: LLMInference, group: int, settings: dict[str, str]) -> dict[str, Any]:
    """The pod template of a group's StatefulSet; ``settings`` is what the ConfigMap holds."""
    spec, names, layout = inference.spec, Names(inference), Layout.of(inference.spec)
    pod = spec.pod
    run = running(inference, group)
    volumes, mounts = _volumes(spec, names, group, run)
    env = _env(spec, names, layout, group, run)
    image = spec.engine.image or IMAGES[spec.engine.name]
    rights = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }
    container = {
        "name": "engine",
        "image": image,
        "imagePullPolicy": spec.engine.image_pull_policy,
        **_given(command=run.command, args=run.args),
        "env": env,
        "envFrom": [{"configMapRef": {"name": names.config_map}}, *map(plain, spec.env_from)],
        "ports": [{"name": HTTP_PORT_NAME, "containerPort": HTTP_PORT}, *run.ports],
        **_probes(spec, run),
        **_given(lifecycle=run.leave and {"preStop": run.leave}),
        "resources": _resources(spec, layout),
        "securityContext": rights,
        "volumeMounts": mounts,
    }
    waiting = {
        "name": "wait-for-leader",
        "image": image,
        "imagePullPolicy": spec.engine.image_pull_policy,
        "command": ["sh", "-c", _LEADER_WAITED_FOR],
        "env": [each for each in env if each["name"] == "LWS_LEADER_ADDRESS"],
        **_given(resources=_plain_resources(spec)),
        "securityContext": rights,
    }
    body = {
        "serviceAccountName": names.service_account,
        "automountServiceAccountToken": False,
        # Variables for the namespace's Services would be taken for settings: VLLM_PORT.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.drain.pause_seconds + spec.drain.timeout_seconds + _AFTER_DRAINING,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": pod.run_as_user,
            "runAsGroup": pod.run_as_user,
            "fsGroup": pod.run_as_user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_given(
            hostIPC=spec.network.host_ipc,
            affinity=affinity(spec, layout, names, group),
            nodeSelector=pod.node_selector,
            tolerations=[plain(each) for each in pod.tolerations],
            priorityClassName=pod.priority_class_name,
            runtimeClassName=pod.runtime_class_name,
            schedulerName=pod.scheduler_name,
            imagePullSecrets=[plain(each) for each in pod.image_pull_secrets],
            initContainers=[waiting] if spec.startup_policy == "LeaderFirst" and layout.pods > 1 else [],
        ),
        "containers": [container],
        "volumes": volumes,
    }
    # In a group of one pod every pod is a leader; in others no template can say so.
    role = {ROLE_LABEL: LEADER} if layout.pods == 1 else {}
    return {
        "metadata": {
            "labels": {**pod.labels, **names.labels(group), **role},
            "annotations": {**spec.network.annotations, **pod.annotations, CONFIG_ANNOTATION: digest(settings)},
        },
        "spec": body,
    }


def digest(settings: dict[str, str]) -> str:
    """Short, the same for the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def plain(model: Model) -> dict[str, Any]:
    """A part of the spec that has the form of Kubernetes' own."""
    return model.model_dump(by_alias=True, exclude_none=True)


def _given(**fields: Any) -> dict[str, Any]:
    """Those that say something."""
    return {name: value for name, value in fields.items() if value}


def _env(spec: Spec, names: Names, layout: Layout, group: int, run: Running) -> list[dict[str, Any]]:
    ours: list[dict[str, Any]] = [
        {"name": "LWS_LEADER_ADDRESS", "value": names.host(group, 0)},
        {"name": "LWS_GROUP_SIZE", "value": str(layout.pods)},
        {
            "name": "LWS_WORKER_INDEX",
            "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{POD_INDEX_LABEL}']"}},
        },
        {"name": "HOME", "value": CACHE},
        {"name": "USER", "value": "lightvllm"},  # there is no entry for the user id in the image
        {"name": "XDG_CACHE_HOME", "value": CACHE},
        {"name": "HF_HOME", "value": f"{CACHE}/huggingface"},
        *run.env,
        *({"name": name, "value": value} for name, value in spec.network.nccl.items()),
    ]
    theirs = [plain(each) for each in spec.env]
    replaced = {each["name"] for each in theirs}
    return [*(each for each in ours if each["name"] not in replaced), *theirs]


def _volumes(spec: Spec, names: Names, group: int, run: Running) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and mounts, each in the same order."""
    cache = (
        {"persistentVolumeClaim": {"claimName": spec.cache.claim_name}}
        if spec.cache.claim_name is not None
        else {"emptyDir": _given(sizeLimit=spec.cache.size_limit)}
    )
    ours: list[tuple[str, str, bool, dict[str, Any]]] = [
        ("tmp", "/tmp", False, {"emptyDir": {}}),  # noqa: S108
        ("cache", CACHE, False, cache),
    ]
    if not spec.network.host_ipc:
        ours.append(("shm", "/dev/shm", False, {"emptyDir": {"medium": "Memory", "sizeLimit": spec.network.shm_size}}))  # noqa: S108
    if spec.model_source is not None:
        claim = {"claimName": spec.model_source.claim_name, "readOnly": True}
        ours.append(("model", spec.model_source.mount_path, True, {"persistentVolumeClaim": claim}))
    if spec.tls is not None:
        ours.append(("tls", TLS_FOLDER, True, _secret(spec.tls.secret_name)))
    if run.group_files:
        ours.append(("workers", WORKERS_FOLDER, True, _secret(names.workers_secret(group))))
        ours.append(("driver", DRIVER_FOLDER, True, _secret(names.driver_secret(group))))
    volumes = [{"name": OWN_VOLUMES + name, **source} for name, _, _, source in ours]
    mounts = [
        {"name": OWN_VOLUMES + name, "mountPath": path, **_given(readOnly=read_only)}
        for name, path, read_only, _ in ours
    ]
    for volume in spec.pod.volumes:
        volumes.append({"name": volume.name, **volume.source})
        mount = {"name": volume.name, "mountPath": volume.mount_path}
        mounts.append({**mount, **_given(readOnly=volume.read_only, subPath=volume.sub_path)})
    return volumes, mounts


def _secret(name: str) -> dict[str, Any]:
    # The kubelet gives these files to root and the pod's group; nobody else may read them.
    return {"secret": {"secretName": name, "defaultMode": 0o440}}


def _resources(spec: Spec, layout: Layout) -> dict[str, Any]:
    resources = spec.pod.resources
    gpus = {spec.gpu_resource: layout.per_pod} if spec.gpu_resource else {}
    return _given(requests={**resources.requests, **gpus}, limits={**resources.limits, **gpus})


def _plain_resources(spec: Spec) -> dict[str, Any]:
    """For the init container the same, which costs nothing, for it ends before the other begins: a pod whose containers
    do not all have limits is not of the class Guaranteed, and a namespace with a quota refuses it."""
    given = {"requests": spec.pod.resources.requests, "limits": spec.pod.resources.limits}
    return _given(**{kind: {name: of[name] for name in _PLAIN_RESOURCES if name in of} for kind, of in given.items()})


def _probes(spec: Spec, run: Running) -> dict[str, Any]:
    result: dict[str, Any] = {}
    often = {"periodSeconds": _PROBE_SECONDS, "timeoutSeconds": _PROBE_SECONDS}
    if spec.engine.name == "custom":
        return _given(readinessProbe=run.ready)
    if run.ready is not None:
        attempts = math.ceil(spec.start_timeout_seconds / _PROBE_SECONDS)
        result["startupProbe"] = {**run.ready, **often, "failureThreshold": attempts}
        result["readinessProbe"] = {**run.ready, **often}
    if run.live is not None:
        result["livenessProbe"] = {**run.live, **often, "failureThreshold": 6}
    return result

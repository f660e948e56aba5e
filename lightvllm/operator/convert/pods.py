"""The pods of a RayCluster: which of its groups runs the model, how many GPUs it has, and its template as ``spec.pod``.

An LLMInference has one template. It is made of the first worker group with GPUs, else of the head if that has GPUs,
else of the first worker group, else of the head. What the head has besides is added where that can be, and named where
not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lightvllm.operator.convert.options import Report, Variable
from lightvllm.operator.convert.tracked import Node
from lightvllm.operator.types import OWN_VOLUMES, RESERVED

GPUS = re.compile(r"nvidia\.com/(gpu|mig-.*)|amd\.com/gpu|gpu\.intel\.com/(i915|xe)")
_UNKNOWN = re.compile(r"google\.com/tpu|aws\.amazon\.com/neuron.*|habana\.ai/gaudi|huawei\.com/.*")
_NETWORKS = re.compile(r"(k8s\.)?v1\.(multus-cni\.io|cni\.cncf\.io)/.*")
_OF_RAY = re.compile(r"RAY_.*|VLLM_(USE_)?RAY_.*|VLLM_HOST_IP")
_PLANNED = "the plan has its own"
_ONE_TEMPLATE = "all pods of a group have one template, which is made of another group of this cluster"
_HUB_CACHE = "/.cache/huggingface"
_CONTAINERS_OWN = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "ports", "terminationMessagePath")


@dataclass
class Group:
    """One group of pods of a RayCluster.

    Attributes:
        node: where it is.
        gpus: of one pod.
        resource: what they are called; "" for none.
        pods, most: how many there are, and may be.
    """

    node: Node
    gpus: int
    resource: str
    pods: int
    most: int

    @property
    def template(self) -> Node:
        return self.node.at("template")

    @property
    def container(self) -> Node:
        return self.template.at("spec", "containers", 0)


def groups(cluster: Node) -> tuple[Group, list[Group]]:
    """The head, and the groups of workers."""
    head = _group(cluster.at("headGroupSpec"))
    workers = [_group(node) for node in cluster.at("workerGroupSpecs").elements()]
    if not head.container and not any(each.container for each in workers):
        raise cluster.error("has no group with a container; expected headGroupSpec.template.spec.containers")
    return head, workers


def chosen(head: Group, workers: list[Group]) -> Group:
    """The group whose template the pods get."""
    with_gpus = [each for each in [*workers, head] if each.gpus]
    return (with_gpus or [*workers, head])[0]


def _group(node: Node) -> Group:
    resources = node.at("template", "spec", "containers", 0, "resources")
    found: dict[str, Node] = {}
    for kind in ("requests", "limits"):
        for name, quantity in resources.at(kind).fields():
            if _UNKNOWN.fullmatch(name):
                raise quantity.error("is asked for; lightvllm runs vLLM on GPUs and CPUs")
            if GPUS.fullmatch(name):
                if name in found and str(found[name].value) != str(quantity.value):
                    raise quantity.error(
                        f"is {quantity.value!r}, and requests say {found[name].value!r}; they must agree"
                    )
                found[name] = quantity
    if len(found) > 1:
        raise resources.error(f"asks for {' and '.join(found)}; expected one kind of GPU")
    (resource, count) = next(iter(found.items()), ("", None))
    pods = node.at("replicas").take_int()
    hosts = node.at("numOfHosts").take_int(1) or 1
    pods = 1 if pods is None else pods
    most = node.at("maxReplicas").take_int()
    node.at("minReplicas").take_int()
    node.at("groupName").take()
    gpus = 0 if count is None else count.take_int() or 0
    return Group(node, gpus, resource if gpus else "", pods * hosts, max(pods, most or 0) * hosts)


class Pods:
    """Fills a spec from templates."""

    def __init__(self, spec: dict[str, Any], env: dict[str, Variable]) -> None:
        self.spec = spec
        self.pod: dict[str, Any] = {}
        self.network: dict[str, Any] = {}
        self.env: dict[str, dict[str, Any]] = {}
        self.env_from: list[dict[str, Any]] = []
        for name, variable in env.items():
            self._add(name, {"value": variable.value}, variable.report)

    def carry(self, group: Group, world: int, image: str | None) -> None:
        """The template of ``group``, which the pods get. ``world`` is how many GPUs a replica needs."""
        group.node.at("rayStartParams").replaced("Ray's own")
        metadata, body, container = group.template.at("metadata"), group.template.at("spec"), group.container
        self._metadata(metadata)
        container.at("name").take()
        self._image(container, image)
        self._resources(group, world)
        self.add_env(container)
        self._simple(body)
        self._volumes(body, container)
        if body.at("hostIPC").value is True and group.gpus < self.spec.get("tensorParallelSize", 1):
            self.network["hostIPC"] = body.at("hostIPC").take()
        else:
            body.at("hostIPC").replaced("the workers of a pod share its own /dev/shm")
        self._rights(body, container)
        self._needless(body, container)

    def add_head(self, head: Group, like: Group, image: str | None) -> None:
        """What the head has that the pods do not have yet."""
        head.node.at("rayStartParams").replaced("Ray's own")
        container = head.container
        container.at("name").take()
        self.add_env(container)
        self._needless(head.template.at("spec"), container)
        if image is not None:
            container.at("image").replaced("--image takes its place")
        if not head.gpus:
            container.at("resources").replaced("the head has no pod of its own; the leader is a pod like the others")
        pairs = [
            *(
                (head.template.at("metadata", key), like.template.at("metadata", key))
                for key in ("labels", "annotations")
            ),
            *((node, like.template.at("spec", name)) for name, node in head.template.at("spec").fields()),
            *((node, like.container.at(name)) for name, node in container.fields()),
        ]
        for node, same in pairs:
            if node.path in node.ledger.seen or node.path[-1] in ("containers", "env", "envFrom"):
                continue
            if node.value == same.value:
                node.take()
            elif node.path[-1] in ("labels", "annotations"):
                self._same_fields(node, same)
            else:
                node.lost(_ONE_TEMPLATE)

    def add_env(self, container: Node) -> None:
        """Variables of a container, after those that are there already."""
        for variable in container.at("env").elements():
            name = variable.at("name").take_text() or ""
            source = variable.at("valueFrom")
            if not source:
                entry: dict[str, Any] = {"value": variable.at("value").take_text() or ""}
            else:
                found = [key for key in ("secretKeyRef", "configMapKeyRef") if source.at(key)]
                if not found:
                    if _OF_RAY.fullmatch(name):
                        variable.replaced("the plan sets what takes its place")
                    else:
                        variable.lost("variables get their values from text, Secrets and ConfigMaps")
                    continue
                reference = source.at(found[0])
                keys = {key: reference.at(key).take_text() for key in ("name", "key")}
                entry = {"valueFrom": {found[0]: keys}}
            self._add(name, entry, variable.reporter())
        for source in container.at("envFrom").elements():
            made: dict[str, Any] = {}
            if source.at("prefix"):
                made["prefix"] = source.at("prefix").take_text()
            for key in ("configMapRef", "secretRef"):
                if source.at(key):
                    made[key] = {"name": source.at(key, "name").take_text()}
            if made and made not in self.env_from:
                self.env_from.append(made)

    def finish(self) -> None:
        """Put what was found into the spec."""
        found = {"pod": self.pod, "network": self.network, "envFrom": self.env_from}
        env = [{"name": name, **entry} for name, entry in self.env.items()]
        self.spec.update({name: value for name, value in {**found, "env": env}.items() if value})

    def _add(self, name: str, entry: dict[str, Any], report: Report) -> None:
        done = self._place(name, entry)
        if done == "ray":
            report("replaced", "Ray's own, or set by the plan")
        elif done == "reserved":
            report("lost", "variables LWS_* and LIGHTVLLM_K8S_* are the plan's; use another name")
        elif done == "other":
            report("lost", "the variable has another value elsewhere in the manifest, which wins")
        elif done == "key":
            report("lost", "a key does not belong into a manifest: put it into a Secret, named with --api-key-secret")
        elif re.search("TOKEN|SECRET|PASSWORD|API_KEY", name) and entry.get("value"):
            report(
                "check", "looks like a secret in the open; better put it into a Secret and use valueFrom.secretKeyRef"
            )

    def _place(self, name: str, entry: dict[str, Any]) -> str:
        if _OF_RAY.fullmatch(name):
            return "ray"
        if name.startswith(RESERVED):
            return "reserved"
        if name == "VLLM_API_KEY" and "secretKeyRef" in entry.get("valueFrom", {}):
            found = self.spec.setdefault("apiKey", entry["valueFrom"]["secretKeyRef"])
            return "ok" if found == entry["valueFrom"]["secretKeyRef"] else "other"
        if name == "VLLM_API_KEY" and "value" in entry:
            return "key"
        if name.startswith("NCCL_") and "value" in entry and name not in self.env:
            nccl = self.network.setdefault("nccl", {})
            return "ok" if nccl.setdefault(name, entry["value"]) == entry["value"] else "other"
        if name in self.network.get("nccl", {}):
            return "other"
        return "ok" if self.env.setdefault(name, entry) == entry else "other"

    def _metadata(self, metadata: Node) -> None:
        for kind in ("labels", "annotations"):
            for name, node in metadata.at(kind).fields():
                if name.startswith("ray.io/"):
                    node.replaced("Ray's own")
                elif kind == "annotations" and _NETWORKS.fullmatch(name):
                    self.network.setdefault(kind, {})[name] = node.take_text()
                elif kind == "labels" and name.startswith(("lightvllm.io/", "app.kubernetes.io/")):
                    node.lost("labels lightvllm.io/* and app.kubernetes.io/* are set by the plan")
                else:
                    self.pod.setdefault(kind, {})[name] = node.take_text()

    def _same_fields(self, node: Node, same: Node) -> None:
        for name, each in node.fields():
            if name.startswith("ray.io/"):
                each.replaced("Ray's own")
            elif (same.value or {}).get(name) == each.value:
                each.take()
            else:
                each.lost(_ONE_TEMPLATE)

    def _image(self, container: Node, image: str | None) -> None:
        node = container.at("image")
        self.spec["engine"]["image"] = image or node.take_text()
        if image is not None:
            node.replaced("--image takes its place")
        elif node:
            node.check("the image must hold vLLM and lightvllm[k8s], of one version of Python; Ray is not needed")
        policy = container.at("imagePullPolicy").take_text()
        if policy is not None:
            self.spec["engine"]["imagePullPolicy"] = policy

    def _resources(self, group: Group, world: int) -> None:
        resources = group.container.at("resources")
        made: dict[str, Any] = {}
        for kind in ("requests", "limits"):
            for name, node in resources.at(kind).fields():
                value = node.take()
                if name != group.resource:
                    made.setdefault(kind, {})[name] = value if isinstance(value, int) else node.take_text()
        if made:
            self.pod["resources"] = made
        if group.gpus > world and made:
            resources.check(
                f"was for a pod with {group.gpus} GPUs; a pod has {world} now, and as much of the rest as before"
            )

    def _simple(self, body: Node) -> None:
        for name in ("nodeSelector", "priorityClassName", "runtimeClassName", "schedulerName", "affinity"):
            node = body.at(name)
            if node:
                self.pod[name] = node.take()
        for name, known in (
            ("tolerations", ("key", "operator", "value", "effect", "tolerationSeconds")),
            ("imagePullSecrets", ("name",)),
        ):
            for element in body.at(name).elements():
                made = {key: element.at(key).take() for key in known if element.at(key)}
                self.pod.setdefault(name, []).append(made)

    def _volumes(self, body: Node, container: Node) -> None:
        volumes = {node.at("name").take_text(): node for node in body.at("volumes").elements()}
        names: set[str] = set()
        for mount in container.at("volumeMounts").elements():
            name, path = mount.at("name").take_text() or "", mount.at("mountPath").take_text() or ""
            volume = volumes.get(name)
            if volume is None:
                raise mount.error(f"mounts the volume {name!r}, which the pod does not have")
            self._mount(mount, volume, name, path.rstrip("/") or "/", names)

    def _mount(self, mount: Node, volume: Node, name: str, path: str, names: set[str]) -> None:
        source = {key: node for key, node in volume.fields() if key != "name"}
        claim = volume.at("persistentVolumeClaim", "claimName")
        sub_path = mount.at("subPath")
        if path == "/dev/shm":  # noqa: S108
            self._shared_memory(volume)
        elif path in ("/tmp", "/tmp/ray"):  # noqa: S108
            if "emptyDir" in source:
                volume.replaced(_PLANNED)
            else:
                volume.lost(_PLANNED)
        elif path == "/cache" and claim and not sub_path:
            self.spec["cache"] = {"claimName": claim.take_text()}
        elif path == "/cache":
            volume.lost("/cache is a volume of the plan's; see spec.cache")
        elif claim and not sub_path and self._holds_model(path):
            self.spec["modelSource"] = {"claimName": claim.take_text(), "mountPath": path}
            self.spec["model"] = self.spec["model"][len(path) + 1 :].rstrip("/")
            mount.at("readOnly").take()
            volume.at("persistentVolumeClaim", "readOnly").take()
        elif name in names:
            mount.lost("a volume is mounted once; add it once more under another name to spec.pod.volumes")
        else:
            names.add(name)
            made: dict[str, Any] = {"name": f"ray-{name}" if name.startswith(OWN_VOLUMES) else name, "mountPath": path}
            for key in ("readOnly", "subPath"):
                if mount.at(key):
                    made[key] = mount.at(key).take()
            made["source"] = {key: node.take() for key, node in source.items()}
            self.pod.setdefault("volumes", []).append(made)
            if path.endswith(_HUB_CACHE) and "HF_HOME" not in self.env:
                self._place("HF_HOME", {"value": path})
                mount.ledger.note("check", mount.path, "HF_HOME is set to it; user 65532 must be able to write there")

    def _holds_model(self, path: str) -> bool:
        below = str(self.spec["model"]).removeprefix(f"{path}/")
        return "modelSource" not in self.spec and below != self.spec["model"] and below.strip("/") != ""

    def _shared_memory(self, volume: Node) -> None:
        empty = volume.at("emptyDir")
        size = empty.at("sizeLimit") if empty else empty
        if size:
            self.network["shmSize"] = size.take_text()
            empty.at("medium").take()
        else:
            volume.check("shared memory is 8Gi now; spec.network.shmSize says how much")

    def _rights(self, body: Node, container: Node) -> None:
        for context in (container.at("securityContext"), body.at("securityContext")):
            user = context.at("runAsUser")
            if user.value == 0:
                user.lost("pods run as a user that is not root")
            elif user and "runAsUser" not in self.pod:
                self.pod["runAsUser"] = user.take_int(1)
            for name, node in context.fields():
                if name != "runAsUser":
                    node.lost(
                        "the plan's pods have no rights of their own, a root file system that is read-only and fsGroup"
                    )

    def _needless(self, body: Node, container: Node) -> None:
        for name in _CONTAINERS_OWN:
            container.at(name).replaced(_PLANNED)
        for name in ("command", "args"):
            node = container.at(name)
            if node and node.path not in node.ledger.seen:
                node.lost("the plan runs vLLM in its own way; what else the command did belongs into the image")
        for name in ("restartPolicy", "terminationGracePeriodSeconds", "dnsPolicy", "enableServiceLinks"):
            body.at(name).replaced(_PLANNED)
        for sidecar in body.at("containers").elements()[1:]:
            sidecar.lost("pods have one container")
        body.at("initContainers").lost(
            "pods have no init containers of yours; do it in the image, or put it on a volume"
        )
        body.at("serviceAccountName").lost("pods have a ServiceAccount of the plan's, which may do nothing")

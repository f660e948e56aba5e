"""The kind ``LLMInference`` (``lightvllm.io/v1``) as pydantic models: every field with its meaning, default and bounds.

The CRD is made from them (``crd.py``), and so are the tables of docs/kubernetes.md. An object that these models take is
one that the API server takes, and the other way round: types are strict, unknown fields are refused, and what must hold
between fields is a ``Rule``. A field exists only if ``planner`` acts upon it. Names are camelCase in YAML.

Not here: an embedded PodTemplateSpec. ``Pod`` has what such pods need; a few corners (affinity, a volume's source, a
readiness probe) are Kubernetes' own objects, passed on as they are and checked by the API server when they are used.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from lightvllm.backends.k8s.labels import GROUP, KIND, VERSION
from lightvllm.operator.rules import Fixed, Rule

API_VERSION = f"{GROUP}/{VERSION}"

MAX_NAME = 45
"""Characters of an LLMInference's name: ``-999-headless`` added, it is a Service's; ``-999`` added, a StatefulSet's."""

MAX_WORLD = 1024
"""Most workers of one replica."""

MAX_REPLICAS = 999

OWN_VOLUMES = "lightvllm-"
"""How the planner's own volumes are called; a user's must not begin so."""

OWN_PATHS = ("/cache", "/dev/shm", "/etc/lightvllm/driver", "/etc/lightvllm/workers", "/tls", "/tmp")  # noqa: S108
"""Where the planner mounts them."""
_MOUNTED = f"{', '.join(OWN_PATHS)} are the plan's own; mount it elsewhere"

_NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
_FOLDER = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*"
_LABEL_VALUE = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_PATH = r"^(/[^:/]+)+$"
_GPU_RESOURCE = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"

Quantity = Annotated[str, StringConstraints(pattern=_QUANTITY, max_length=32)] | Annotated[int, Field(ge=0)]
Size = Annotated[str, StringConstraints(pattern=_QUANTITY, max_length=32)]
ObjectName = Annotated[str, StringConstraints(pattern=_OBJECT_NAME)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
AbsolutePath = Annotated[str, StringConstraints(pattern=_PATH, max_length=1024)]
LabelValue = Annotated[str, StringConstraints(pattern=f"^({_LABEL_VALUE})?$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
FreeForm = dict[str, Any]
"""An object of Kubernetes' own, passed on as it is."""

RESERVED = ("LWS_", "LIGHTVLLM_K8S_")
"""Beginnings of variables that the planner sets and nobody else may."""


class Model(BaseModel):
    """Base of all of them."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    fixed: ClassVar[tuple[Fixed, ...]] = ()

    @model_validator(mode="after")
    def _keep_rules(self) -> Model:
        broken = [rule.message for rule in self.rules if not rule.holds(self)]
        if broken:
            raise PydanticCustomError("rule", "{message}", {"message": "; ".join(broken)})
        return self


class SecretKey(Model):
    """One entry of a Secret."""

    name: ObjectName
    """The Secret, in the same namespace."""
    key: Text
    """The entry in it."""


class ConfigMapKey(Model):
    """One entry of a ConfigMap."""

    name: ObjectName
    """The ConfigMap, in the same namespace."""
    key: Text
    """The entry in it."""


class ObjectReference(Model):
    """An object of the same namespace."""

    name: ObjectName
    """Its name."""


class EnvValueFrom(Model):
    """Where a variable's value comes from: one of the two."""

    secret_key_ref: SecretKey | None = None
    """A Secret's entry."""
    config_map_key_ref: ConfigMapKey | None = None
    """A ConfigMap's entry."""

    rules = (
        Rule(
            "has(self.secretKeyRef) != has(self.configMapKeyRef)",
            "valueFrom needs either secretKeyRef or configMapKeyRef",
            lambda self: (self.secret_key_ref is None) != (self.config_map_key_ref is None),
        ),
    )


class EnvVar(Model):
    """A variable of every pod."""

    name: VariableName
    """Its name. It takes the place of a variable of that name which the plan would set; LWS_* and LIGHTVLLM_K8S_* are
    the plan's alone."""
    value: Annotated[str, StringConstraints(max_length=4096)] | None = None
    """Its value."""
    value_from: EnvValueFrom | None = None
    """Where its value comes from, in place of value."""

    rules = (
        Rule(
            "has(self.value) != has(self.valueFrom)",
            "a variable needs either value or valueFrom",
            lambda self: (self.value is None) != (self.value_from is None),
        ),
        Rule(
            " && ".join(f"!self.name.startsWith('{prefix}')" for prefix in RESERVED),
            "variables LWS_* and LIGHTVLLM_K8S_* are set by the plan; use another name",
            lambda self: not self.name.startswith(RESERVED),
        ),
    )


class EnvFrom(Model):
    """All entries of a ConfigMap or Secret as variables of every pod."""

    prefix: VariableName | None = None
    """What each variable's name begins with, before the entry's name."""
    config_map_ref: ObjectReference | None = None
    """The ConfigMap."""
    secret_ref: ObjectReference | None = None
    """The Secret, such as one with HF_TOKEN."""

    rules = (
        Rule(
            "has(self.configMapRef) != has(self.secretRef)",
            "envFrom needs either configMapRef or secretRef",
            lambda self: (self.config_map_ref is None) != (self.secret_ref is None),
        ),
    )


class ModelSource(Model):
    """Weights on a volume, in place of a download by every pod."""

    claim_name: ObjectName
    """A PersistentVolumeClaim that every pod can mount."""
    mount_path: AbsolutePath = "/models"
    """Where it is mounted, read-only; spec.model is a folder below it."""

    rules = (
        Rule(
            f"!(self.mountPath in {list(OWN_PATHS)})",
            _MOUNTED,
            lambda self: self.mount_path not in OWN_PATHS,
        ),
    )


class Cache(Model):
    """Where downloads and compiled code are kept: /cache, which is HOME."""

    claim_name: ObjectName | None = None
    """A ReadWriteMany PersistentVolumeClaim that outlives the pods; without it an emptyDir."""
    size_limit: Size | None = None
    """Most bytes of the emptyDir, such as 200Gi; without it what the node has."""

    rules = (
        Rule(
            "!(has(self.claimName) && has(self.sizeLimit))",
            "sizeLimit is for an emptyDir; leave it or claimName out",
            lambda self: self.claim_name is None or self.size_limit is None,
        ),
    )


EngineName = Literal["lightvllm", "vllm", "sglang", "custom"]


class Engine(Model):
    """What serves the model."""

    name: EngineName = "lightvllm"
    """lightvllm: this project's engine. vllm: vLLM, its workers behind lightvllm's executor. sglang: SGLang, one
    process per pod. custom: an image and command of your own, the same in every pod, told apart by LWS_WORKER_INDEX.
    Cannot be changed."""
    image: Text | None = None
    """The container image. lightvllm:latest for lightvllm, lightvllm-vllm:latest for vllm; sglang and custom have no
    default."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the image is pulled."""
    command: list[Text] | None = Field(default=None, max_length=64)
    """For custom only: the command of every pod; without it the image's own."""
    args: list[Text] = Field(default=[], max_length=256)
    """Further arguments: of lightvllm serve, vllm serve, sglang.launch_server, or of the custom command."""
    readiness_probe: FreeForm | None = None
    """For custom only: a readiness probe of Kubernetes' own for every pod; without it a pod is ready when it runs. The
    API is expected at port 8000, which is called http."""

    rules = (
        Rule(
            "self.name in ['lightvllm', 'vllm'] || has(self.image)",
            "engine sglang or custom has no default image; give engine.image",
            lambda self: self.name in ("lightvllm", "vllm") or self.image is not None,
        ),
        Rule(
            "self.name == 'custom' || !has(self.command)",
            "command is for engine custom; the others have their own and take args",
            lambda self: self.name == "custom" or self.command is None,
        ),
        Rule(
            "self.name == 'custom' || !has(self.readinessProbe)",
            "readinessProbe is for engine custom; the others have their own",
            lambda self: self.name == "custom" or self.readiness_probe is None,
        ),
    )


class Resources(Model):
    """What a pod's container asks for, besides its GPUs."""

    requests: dict[str, Quantity] = Field(default={}, max_length=32)
    """What the scheduler keeps free, such as cpu, memory or rdma/hca. GPUs come from gpusPerPod."""
    limits: dict[str, Quantity] = Field(default={}, max_length=32)
    """The most it may use."""


class Toleration(Model):
    """A taint that the pods put up with."""

    key: Text | None = None
    """The taint's key; none matches every key."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """How value is compared."""
    value: Annotated[str, StringConstraints(max_length=256)] | None = None
    """The taint's value, with Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; none matches every effect."""
    toleration_seconds: int | None = Field(default=None, ge=0)
    """With NoExecute: how long a pod stays."""

    rules = (
        Rule(
            "self.operator == 'Exists' || has(self.key)",
            "a toleration without key needs operator Exists",
            lambda self: self.operator == "Exists" or self.key is not None,
        ),
        Rule(
            "self.operator == 'Equal' || !has(self.value)",
            "operator Exists compares no value; leave one of the two out",
            lambda self: self.operator == "Equal" or self.value is None,
        ),
        Rule(
            "!has(self.tolerationSeconds) || has(self.effect) && self.effect == 'NoExecute'",
            "tolerationSeconds is for effect NoExecute",
            lambda self: self.toleration_seconds is None or self.effect == "NoExecute",
        ),
    )


class Volume(Model):
    """A further volume of every pod."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    """Its name, which does not begin with lightvllm-."""
    mount_path: AbsolutePath
    """Where it is mounted."""
    read_only: bool = False
    """Whether it is mounted read-only."""
    sub_path: Text | None = None
    """The folder of the volume that is mounted; without it the whole."""
    source: FreeForm = Field(min_length=1, max_length=1)
    """A volume source of Kubernetes' own, such as {persistentVolumeClaim: {claimName: data}}."""

    rules = (
        Rule(
            f"!self.name.startsWith('{OWN_VOLUMES}')",
            f"names of volumes that begin with {OWN_VOLUMES} are the plan's; use another name",
            lambda self: not self.name.startswith(OWN_VOLUMES),
        ),
    )


class Pod(Model):
    """Every pod of a group, the leader's included: a StatefulSet has one template."""

    resources: Resources = Resources()
    """What the container asks for, besides its GPUs."""
    node_selector: dict[str, LabelValue] = Field(default={}, max_length=64)
    """Labels that a node must have."""
    tolerations: list[Toleration] = Field(default=[], max_length=64)
    """Taints that the pods put up with."""
    affinity: FreeForm | None = None
    """Affinity of Kubernetes' own, whose terms are added to those that topology makes."""
    annotations: dict[str, str] = Field(default={}, max_length=64)
    """Annotations of the pods."""
    labels: dict[str, LabelValue] = Field(default={}, max_length=64)
    """Labels of the pods, besides the plan's own, which they cannot replace."""
    volumes: list[Volume] = Field(default=[], max_length=32)
    """Further volumes."""
    priority_class_name: ObjectName | None = None
    """The pods' PriorityClass."""
    runtime_class_name: ObjectName | None = None
    """The pods' RuntimeClass, such as nvidia."""
    scheduler_name: ObjectName | None = None
    """A scheduler other than the cluster's default."""
    image_pull_secrets: list[ObjectReference] = Field(default=[], max_length=16)
    """Secrets for pulling the image."""
    run_as_user: int = Field(default=65532, ge=1, le=2147483647)
    """The user and group that the container runs as; never root."""

    rules = (
        Rule(
            "self.volumes.all(v, self.volumes.exists_one(w, w.name == v.name))",
            "two volumes have the same name; give each its own",
            lambda self: len({volume.name for volume in self.volumes}) == len(self.volumes),
        ),
        Rule(
            "self.volumes.all(v, self.volumes.exists_one(w, w.mountPath == v.mountPath))",
            "two volumes have the same mountPath; give each its own",
            lambda self: len({volume.mount_path for volume in self.volumes}) == len(self.volumes),
        ),
        Rule(
            f"self.volumes.all(v, !(v.mountPath in {list(OWN_PATHS)}))",
            _MOUNTED,
            lambda self: all(volume.mount_path not in OWN_PATHS for volume in self.volumes),
        ),
        Rule(
            f"self.labels.all(k, !k.startsWith('{GROUP}/') && !k.startsWith('app.kubernetes.io/'))",
            f"labels {GROUP}/* and app.kubernetes.io/* are set by the plan; use other labels",
            lambda self: not any(key.startswith((f"{GROUP}/", "app.kubernetes.io/")) for key in self.labels),
        ),
    )


class Topology(Model):
    """Where the pods of a group, and the groups, come to lie."""

    stages: Literal["Spread", "Any"] = "Spread"
    """Spread: pods that hold whole pipeline stages prefer different nodes; pods that hold a share of a stage are kept
    on one node instead, which is required if there is one stage, and preferred if there are more. Any: wherever there
    is room."""
    node_key: Text = "kubernetes.io/hostname"
    """The node label that tells nodes apart."""
    group_key: Text | None = None
    """A node label whose value all pods of a group must share, such as a rack's or a fast network's."""
    replicas_key: Text | None = None
    """A node label of which groups prefer different values, such as topology.kubernetes.io/zone."""


class Network(Model):
    """How workers reach each other, and who reaches the leader."""

    annotations: dict[str, str] = Field(default={}, max_length=32)
    """Annotations of the pods for a secondary network, such as k8s.v1.cni.cncf.io/networks for RoCE or SR-IOV."""
    nccl: dict[str, Annotated[str, StringConstraints(max_length=256)]] = Field(default={}, max_length=64)
    """NCCL's variables: NCCL_IB_GID_INDEX, NCCL_SOCKET_IFNAME, NCCL_IB_TC and others that begin with NCCL_."""
    host_ipc: bool = Field(default=False, alias="hostIPC")
    """Share the node's IPC namespace and /dev/shm, so that NCCL's shared memory crosses pods of one node. Only for pods
    that hold a share of a stage: everything else in that namespace can be reached, too."""
    ip_family: Literal["IPv4", "IPv6"] = "IPv4"
    """IPv6 where pods have no IPv4 address: the servers listen on :: in place of 0.0.0.0. A custom engine sees to it
    itself."""
    shm_size: Size = "8Gi"
    """Most bytes of /dev/shm, which is memory and counts as the pod's. With hostIPC it is the node's, and this says
    nothing."""
    clients: list[FreeForm] = Field(default=[], max_length=32)
    """Who may reach the leader's API: peers as in a NetworkPolicy's from, the router and Prometheus among them. Empty:
    everybody."""
    policy: bool = True
    """Make NetworkPolicies: only a group's own pods reach its workers."""

    rules = (
        Rule(
            "self.nccl.all(k, k.startsWith('NCCL_'))",
            "nccl takes variables NCCL_* only; put others into spec.env",
            lambda self: all(key.startswith("NCCL_") for key in self.nccl),
        ),
        Rule(
            "self.policy || self.clients.size() == 0",
            "clients needs the NetworkPolicies that policy: false leaves out",
            lambda self: self.policy or not self.clients,
        ),
    )


class Autoscaling(Model):
    """Replicas by the requests that the router has for the model. Scales the LLMInference by its scale subresource."""

    kind: Literal["KEDA", "HPA"] = "KEDA"
    """KEDA: a ScaledObject that asks Prometheus. HPA: a HorizontalPodAutoscaler on the external metric
    lightvllm_router_pending_requests, which a metrics adapter must serve."""
    min_replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """Fewest replicas; 0, with KEDA only, ends the last one when nobody asks."""
    max_replicas: int = Field(ge=1, le=MAX_REPLICAS)
    """Most replicas."""
    target_pending: int = Field(default=16, ge=1, le=100000)
    """Requests, held and running, for which one replica is wanted."""
    prometheus_address: Text | None = None
    """With KEDA: the URL of the Prometheus that has the router's metrics."""
    polling_seconds: int = Field(default=5, ge=1, le=3600)
    """With KEDA: seconds between two looks."""
    cooldown_seconds: int = Field(default=600, ge=0, le=3600)
    """Seconds without requests before replicas are ended."""

    rules = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            "minReplicas is above maxReplicas; lower it or raise the other",
            lambda self: self.min_replicas <= self.max_replicas,
        ),
        Rule(
            "self.kind == 'KEDA' || self.minReplicas >= 1",
            "an HPA does not scale to zero; use kind KEDA, or minReplicas from 1",
            lambda self: self.kind == "KEDA" or self.min_replicas >= 1,
        ),
        Rule(
            "(self.kind == 'KEDA') == has(self.prometheusAddress)",
            "kind KEDA needs prometheusAddress, such as http://prometheus.monitoring.svc:9090; HPA takes none",
            lambda self: (self.kind == "KEDA") == (self.prometheus_address is not None),
        ),
    )


class Tls(Model):
    """TLS of the API. The workers' own mutual TLS is always on."""

    secret_name: ObjectName
    """A Secret of type kubernetes.io/tls: the certificate that the leader shows its clients. Mounted at /tls."""


class Drain(Model):
    """How a pod ends."""

    pause_seconds: int = Field(default=5, ge=0, le=300)
    """Seconds between the order to end and SIGTERM: Services go on sending for a moment."""
    timeout_seconds: int = Field(default=30, ge=0, le=86400)
    """Seconds that requests may take to finish after it."""


class Monitoring(Model):
    """A ServiceMonitor for the leader's /metrics, where the cluster has that kind."""

    interval_seconds: int = Field(default=15, ge=1, le=3600)
    """Seconds between two looks."""
    labels: dict[str, LabelValue] = Field(default={}, max_length=32)
    """Labels by which Prometheus selects it."""


class Spec(Model):
    """What is asked for."""

    model: Text
    """The model: a name or hub id that the engine knows, or with modelSource a folder below its mountPath."""
    served_model_name: Text | None = None
    """What requests call the model; without it what model says."""
    model_source: ModelSource | None = None
    """Weights on a volume; without it the engine downloads them."""
    cache: Cache = Cache()
    """Where downloads and compiled code are kept."""
    engine: Engine = Engine()
    """What serves the model."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Workers that share each layer. Cannot be changed."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=64)
    """Stages that the layers are split into. Cannot be changed."""
    gpus_per_pod: int | None = Field(default=None, ge=1, le=64)
    """Workers, each with a GPU, of one pod; without it tensorParallelSize: one pod per stage. A multiple of
    tensorParallelSize, or a divisor of it. Cannot be changed."""
    gpu_resource: Annotated[str, StringConstraints(pattern=_GPU_RESOURCE, max_length=253)] = "nvidia.com/gpu"
    """The resource that a GPU is asked for by; "" for workers that compute on the CPU."""
    replicas: int = Field(default=1, ge=0, le=MAX_REPLICAS)
    """Groups, each of which holds the whole model. With autoscaling its target writes it, by the scale subresource."""
    max_model_len: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """Longest prompt plus output, tokens; without it the engine's default."""
    max_num_seqs: int | None = Field(default=None, ge=1, le=2**20)
    """Sequences that a group runs at a time; without it the engine's default."""
    block_size: int | None = Field(default=None, ge=1, le=1024)
    """Tokens per block of the KV cache; without it the engine's default. lightvllm always has 16."""
    pod: Pod = Pod()
    """Every pod of a group."""
    env: list[EnvVar] = Field(default=[], max_length=128)
    """Variables of every pod."""
    env_from: list[EnvFrom] = Field(default=[], max_length=32)
    """ConfigMaps and Secrets whose entries are variables of every pod."""
    startup_policy: Literal["LeaderFirst", "Parallel"] = "LeaderFirst"
    """LeaderFirst: the other pods wait until the leader's name resolves. Parallel: nobody waits. The leader never waits
    for the others to be ready. The wait is an init container that needs sh and getent in the image."""
    start_timeout_seconds: int = Field(default=1800, ge=10, le=86400)
    """Seconds that a group may take to load the model, before its pods are started again. Not for custom."""
    topology: Topology = Topology()
    """Where the pods come to lie."""
    network: Network = Network()
    """How workers reach each other, and who reaches the leader."""
    autoscaling: Autoscaling | None = None
    """Replicas by demand; without it there are as many as replicas says."""
    tls: Tls | None = None
    """TLS of the API; without it the API is plain HTTP. A custom engine finds the files at /tls."""
    api_key: SecretKey | None = None
    """A Secret's entry with the key that requests must bring. A custom engine finds it in API_KEY."""
    allow_unauthenticated: bool = False
    """Serve without apiKey everybody whom the network lets through."""
    drain: Drain = Drain()
    """How a pod ends."""
    suspend: bool = False
    """End all pods, and start them again when it is false; all else stays."""
    monitoring: Monitoring | None = None
    """A ServiceMonitor; without it none is made. With tls, Prometheus trusts the entry ca.crt of its Secret, and the
    certificate must be for NAME.NAMESPACE.svc."""

    rules = (
        Rule(
            "(self.tensorParallelSize * self.pipelineParallelSize) % "
            "(has(self.gpusPerPod) ? self.gpusPerPod : self.tensorParallelSize) == 0 && "
            "((has(self.gpusPerPod) ? self.gpusPerPod : self.tensorParallelSize) % self.tensorParallelSize == 0 || "
            "self.tensorParallelSize % (has(self.gpusPerPod) ? self.gpusPerPod : self.tensorParallelSize) == 0)",
            "the workers (tensorParallelSize × pipelineParallelSize) must fill the pods: gpusPerPod must be a divisor "
            "of tensorParallelSize, or tensorParallelSize times a divisor of pipelineParallelSize",
            lambda self: _fills_pods(
                self.tensor_parallel_size,
                self.pipeline_parallel_size,
                self.tensor_parallel_size if self.gpus_per_pod is None else self.gpus_per_pod,
            ),
        ),
        Rule(
            f"self.tensorParallelSize * self.pipelineParallelSize <= {MAX_WORLD}",
            f"tensorParallelSize × pipelineParallelSize is above {MAX_WORLD}; use replicas for more",
            lambda self: self.tensor_parallel_size * self.pipeline_parallel_size <= MAX_WORLD,
        ),
        Rule(
            "!has(self.autoscaling) || self.replicas <= self.autoscaling.maxReplicas",
            "replicas is above autoscaling.maxReplicas; lower it or raise the other",
            lambda self: self.autoscaling is None or self.replicas <= self.autoscaling.max_replicas,
        ),
        Rule(
            "!has(self.autoscaling) || self.autoscaling.kind == 'KEDA' || "
            f"(has(self.servedModelName) ? self.servedModelName : self.model).matches('^{_LABEL_VALUE}$')",
            "an HPA finds its metric by a label with the model's name, which takes up to 63 letters, digits and any of "
            "_.-; give a servedModelName",
            lambda self: (
                self.autoscaling is None
                or self.autoscaling.kind == "KEDA"
                or re.fullmatch(_LABEL_VALUE, self.served_model_name or self.model) is not None
            ),
        ),
        Rule(
            "self.engine.name != 'lightvllm' || !has(self.blockSize)",
            "engine lightvllm has blocks of 16 tokens; leave blockSize out",
            lambda self: self.engine.name != "lightvllm" or self.block_size is None,
        ),
        Rule(
            "self.engine.name == 'custom' ? !(has(self.apiKey) && self.allowUnauthenticated) : "
            "has(self.apiKey) != self.allowUnauthenticated",
            "give apiKey, or set allowUnauthenticated if everybody whom the network lets through may use the model; "
            "not both",
            lambda self: (
                not (self.api_key is not None and self.allow_unauthenticated)
                if self.engine.name == "custom"
                else (self.api_key is not None) != self.allow_unauthenticated
            ),
        ),
        Rule(
            f"!has(self.modelSource) || self.model.matches('^{_FOLDER}$')",
            "with modelSource, model is a folder below its mountPath, such as llama/8b",
            lambda self: self.model_source is None or re.fullmatch(_FOLDER, self.model) is not None,
        ),
        Rule(
            "!has(self.modelSource) || self.pod.volumes.all(v, v.mountPath != self.modelSource.mountPath)",
            "a volume of pod.volumes has the mountPath of modelSource; give each its own",
            lambda self: (
                self.model_source is None
                or all(volume.mount_path != self.model_source.mount_path for volume in self.pod.volumes)
            ),
        ),
        Rule(
            "!self.model.startsWith('-')",
            "model must not begin with a dash, which would make it an option",
            lambda self: not self.model.startswith("-"),
        ),
        Rule(
            "self.env.all(e, self.env.exists_one(f, f.name == e.name))",
            "env names a variable more than once; keep one",
            lambda self: len({each.name for each in self.env}) == len(self.env),
        ),
    )
    # A group's layout is its identity: pods of two layouts would share one StatefulSet's names while it rolls, and
    # could not form a group with each other. The engine likewise: two of them have no protocol in common.
    fixed = tuple(
        Fixed(
            field,
            optional,
            "make another LLMInference with the same servedModelName, and delete this one when it answers",
        )
        for field, optional in (
            ("tensorParallelSize", False),
            ("pipelineParallelSize", False),
            ("gpusPerPod", True),
            ("engine.name", False),
        )
    )


def _fills_pods(tensor: int, pipeline: int, per_pod: int) -> bool:
    return (tensor * pipeline) % per_pod == 0 and (per_pod % tensor == 0 or tensor % per_pod == 0)


class Condition(Model):
    """metav1.Condition."""

    type: Annotated[str, StringConstraints(max_length=316)]
    """Available, Progressing, Degraded or Suspended."""
    status: Literal["True", "False", "Unknown"]
    """Whether it is so."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """Why, in one word for programs."""
    message: Annotated[str, StringConstraints(max_length=32768)]
    """Why, for people."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """When status changed last."""
    observed_generation: int | None = Field(default=None, ge=0)
    """The metadata.generation that it speaks of."""


class WorkerStatus(Model):
    """One worker of a group."""

    name: Text
    """Its pod."""
    rank: int = Field(ge=0)
    """Its global rank in its group."""
    stage: int = Field(ge=0)
    """Its pipeline stage."""
    ready: bool
    """Whether its pod is ready."""
    node: Text | None = None
    """The node of its pod, once there is one."""


class Status(Model):
    """What has become of it; written by the operator alone."""

    observed_generation: int | None = Field(default=None, ge=0)
    """The metadata.generation that the rest speaks of."""
    conditions: list[Condition] = Field(
        default=[],
        max_length=16,
        json_schema_extra={"x-kubernetes-list-map-keys": ["type"], "x-kubernetes-list-type": "map"},
    )
    """Available, Progressing, Degraded, Suspended."""
    replicas: int = Field(default=0, ge=0)
    """Groups that exist."""
    ready_replicas: int = Field(default=0, ge=0)
    """Groups that answer requests."""
    updated_replicas: int = Field(default=0, ge=0)
    """Groups that are of the present spec."""
    selector: str | None = None
    """Selects leaders only, so that an autoscaler's averages count groups."""
    url: str | None = None
    """Where the API is served inside the cluster."""
    workers: list[WorkerStatus] = Field(default=[], max_length=8192)
    """Every worker of every group."""
    group_restarts: int = Field(default=0, ge=0)
    """How often a group was formed anew after a death."""


class Metadata(Model):
    """Of Kubernetes' ObjectMeta what is read here; the rest is left alone."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, StringConstraints(min_length=1)]
    """The object's name."""
    namespace: str | None = None
    """Its namespace."""
    uid: str | None = None
    """Its identity, once it is in a cluster."""


class LLMInference(Model):
    """A model served by groups of workers, each of which is a leader, that serves OpenAI's API, and its other pods."""

    api_version: Literal["lightvllm.io/v1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["LLMInference"] = KIND  # type: ignore[assignment]
    metadata: Metadata
    spec: Spec
    """What is asked for."""
    status: Status | None = None
    """What has become of it; written by the operator alone."""

    rules = (
        Rule(
            f"self.metadata.name.matches('^{_NAME}$') && self.metadata.name.size() <= {MAX_NAME}",
            f"metadata.name must begin with a letter, have small letters, digits and dashes, at most {MAX_NAME}: "
            "Services and pods are named after it",
            lambda self: re.fullmatch(_NAME, self.metadata.name) is not None and len(self.metadata.name) <= MAX_NAME,
        ),
        Rule(
            "!self.metadata.name.matches('-[0-9]+-headless$')",
            "metadata.name must not end as -0-headless does: so are the Services of others' groups named",
            lambda self: re.search(r"-[0-9]+-headless\Z", self.metadata.name) is None,
        ),
    )

    @property
    def served_model_name(self) -> str:
        """What requests call the model."""
        return self.spec.served_model_name or self.spec.model


def refused_changes(old: LLMInference, new: LLMInference) -> list[str]:
    """Why the API server would refuse to turn ``old`` into ``new``, one line for each field; empty if it would not."""

    def value(inference: LLMInference, field: str) -> Any:
        found: Any = inference.spec.model_dump(by_alias=True)
        for part in field.split("."):
            found = found[part]
        return found

    return [fixed.message for fixed in Spec.fixed if value(old, fixed.field) != value(new, fixed.field)]

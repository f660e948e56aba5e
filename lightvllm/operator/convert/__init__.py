"""A KubeRay manifest that runs vLLM as LLMInferences, with a list of what could not be carried over.

| module | its part |
|---|---|
| ``tracked`` | a YAML document that knows what of it has been dealt with |
| ``serve`` | a RayService's ``serveConfigV2`` |
| ``command`` | a container's command or a RayJob's entrypoint that runs ``vllm serve`` |
| ``options`` | vLLM's options |
| ``pods`` | groups of pods and their templates |

Everything in the input is carried over or named: what no module touches is reported by ``tracked`` as lost. Shapes are
those of ray-project/kuberay (``ray.io/v1``) and of Ray Serve LLM. Talks to no cluster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import yaml

from lightvllm.errors import ConfigError
from lightvllm.operator import text
from lightvllm.operator.convert import command, serve
from lightvllm.operator.convert.options import PARALLEL, Variable, Wanted
from lightvllm.operator.convert.pods import Group, Pods, chosen, groups
from lightvllm.operator.convert.tracked import Ledger, Node, Note
from lightvllm.operator.types import API_VERSION, MAX_NAME, LLMInference, Spec

_KINDS = ("RayService", "RayCluster", "RayJob")
_API_KEY_ENTRY = "api-key"
_SERVERS_OWN = (
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "generation",
    "managedFields",
    "selfLink",
    "ownerReferences",
)
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_NEEDLESS = {
    "RayService": (
        "serviceUnhealthySecondThreshold",
        "deploymentUnhealthySecondThreshold",
        "rayClusterDeletionDelaySeconds",
    ),
    "RayCluster": (
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "gcsFaultToleranceOptions",
        "authOptions",
    ),
    "RayJob": (
        *("submissionMode", "submitterPodTemplate", "submitterConfig", "jobId", "backoffLimit", "metadata"),
        *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources"),
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the manifest does not say.

    Attributes:
        image: takes the place of the manifest's; it holds vLLM and lightvllm.
        api_key: the Secret and its entry with the key that requests must bring; None for NAME-api-key.
        unauthenticated: no key is needed.
        prometheus: the URL by which KEDA scales; None for as many replicas as there are at first.
    """

    image: str | None = None
    api_key: tuple[str, str] | None = None
    unauthenticated: bool = False
    prometheus: str | None = None


@dataclass(frozen=True)
class Converted:
    """What one Ray object became.

    Attributes:
        came_from: such as ``RayService llama``.
        documents: LLMInferences, one for each model, that are known to be valid.
        notes: what could not be carried over, must be looked at, or is needless now.
    """

    came_from: str
    documents: list[dict[str, Any]]
    notes: list[Note]

    @property
    def is_complete(self) -> bool:
        """Whether nothing was lost and nothing needs a look."""
        return all(note.kind == "replaced" for note in self.notes)


def convert(content: str, source: str, settings: Settings) -> list[Converted]:
    """Every Ray object in ``content``, YAML of one or more documents.

    Raises:
        ConfigError: it is no YAML, holds no Ray object, or one that runs no vLLM that could be read, or whose GPUs do
            not fit; the message names ``source`` and the place.
    """
    documents = _read(content, source)
    of_ray = [each for each in documents if str(each.get("apiVersion", "")).startswith("ray.io/")]
    if not of_ray:
        kinds = ", ".join(sorted({str(each.get("kind")) for each in documents})) or "nothing"
        raise ConfigError(f"{source} holds {kinds}; expected a RayService, RayCluster or RayJob of ray.io/v1")
    result = [_object(each, source, settings) for each in of_ray]
    others = [each for each in documents if each not in of_ray]
    kept = [
        Note(
            "check",
            f"{each.get('kind')} {_metadata_name(each)}",
            "is not Ray's and not part of this; apply it as before",
        )
        for each in others
    ]
    result[0] = replace(result[0], notes=[*result[0].notes, *kept])
    names = [(each["metadata"].get("namespace"), each["metadata"]["name"]) for one in result for each in one.documents]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{source}: two LLMInferences would be called {twice[1]}; rename one of the Ray objects")
    return result


def _read(content: str, source: str) -> list[dict[str, Any]]:
    try:
        documents = [each for each in yaml.safe_load_all(content) if each is not None]
    except RecursionError:
        raise ConfigError(f"{source}: no YAML that could be read: it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{where}: no YAML: {getattr(error, 'problem', None) or error}") from None
    flat: list[Any] = []
    for each in documents:
        listed = isinstance(each, dict) and each.get("kind") == "List" and isinstance(each.get("items"), list)
        flat += each["items"] if listed else [each]
    for each in flat:
        if not isinstance(each, dict):
            raise ConfigError(f"{source} holds a {type(each).__name__}; expected objects of Kubernetes")
    return flat


def _metadata_name(document: dict[str, Any]) -> str:
    metadata = document.get("metadata")
    return str(metadata.get("name")) if isinstance(metadata, dict) else "without a name"


def _object(document: dict[str, Any], source: str, settings: Settings) -> Converted:
    kind = document.get("kind")
    came_from = f"{kind} {_metadata_name(document)}"
    ledger = Ledger(f"{source}: {came_from}")
    root = Node(document, (), ledger)
    if kind not in _KINDS:
        raise root.error(f"cannot be converted; expected {', '.join(_KINDS)}")
    root.at("apiVersion").take()
    root.at("kind").take()
    root.at("status").replaced("written by Ray's operator")
    spec = root.at("spec")
    if not spec:
        raise root.error("spec is missing")
    cluster = {"RayService": spec.at("rayClusterConfig"), "RayJob": spec.at("rayClusterSpec")}.get(str(kind), spec)
    if not cluster:
        raise cluster.error("is missing; it says what the pods are like")
    for names, node in ((_NEEDLESS[str(kind)], spec), (_NEEDLESS["RayCluster"], cluster)):
        for name in names:
            node.at(name).replaced("Ray's own")
    head, workers = groups(cluster)
    wanted = _wanted(root, str(kind), spec, head, settings)
    suspended = any(each.take() is True for each in (spec.at("suspend"), cluster.at("suspend")) if each)
    made = [_inference(root, one, len(wanted) > 1, head, workers, settings, suspended) for one in wanted]
    _compare_gpus(cluster, made, head, workers)
    if kind == "RayService":
        service = f"{_metadata_name(document)}-serve-svc"
        ledger.note(
            "replaced", ("metadata", "name"), f"the Service {service} is called as the LLMInference now, port 8000"
        )
    ledger.report_rest(root)
    order = ("lost", "check", "replaced")
    notes = sorted(ledger.notes, key=lambda note: order.index(note.kind))
    return Converted(came_from, made, notes)


def _wanted(root: Node, kind: str, spec: Node, head: Group, settings: Settings) -> list[Wanted]:
    """Each model that is asked for."""
    if kind == "RayService":
        config = spec.at("serveConfigV2")
        if not config:
            raise config.error("is missing; it says what is served")
        return serve.models(config, settings.prometheus)
    if kind == "RayJob":
        entrypoint = spec.at("entrypoint")
        if not isinstance(entrypoint.value, str) or not command.runs_vllm(entrypoint.value):
            raise entrypoint.error("does not run vllm serve; a job of another kind cannot be converted")
        env: dict[str, Variable] = {}
        runtime = spec.at("runtimeEnvYAML")
        if runtime:
            serve.environment(runtime.embedded(_embedded_yaml(runtime)), env)
        wanted = _command(entrypoint.value, [entrypoint], head, env)
        for name in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"):
            if spec.at(name).value is not False:
                spec.at(name).lost("an LLMInference serves until it is deleted")
            else:
                spec.at(name).take()
        return [wanted]
    for group in [head, *(Group(each, 0, "", 0, 0) for each in spec.at("workerGroupSpecs").elements())]:
        if not group.container:
            continue
        start = group.container.at("lifecycle", "postStart", "exec")
        for nodes in ([group.container.at("command"), group.container.at("args")], [start.at("command")]):
            script = _script(nodes, _overwrites(root) or _overwrites(group.template))
            if command.runs_vllm(script):
                return [_command(script, nodes, group, {})]
    raise root.error(
        "runs no vLLM: neither command nor args of a container has vllm serve; "
        "what is submitted to the cluster from elsewhere is not in the manifest"
    )


def _embedded_yaml(node: Node) -> Any:
    try:
        return yaml.safe_load(node.value) if isinstance(node.value, str) else node.value
    except yaml.YAMLError as error:
        raise node.error(f"is no YAML: {getattr(error, 'problem', None) or 'it cannot be read'}") from None


def _overwrites(node: Node) -> bool:
    """Whether KubeRay runs the container's own command, word by word, instead of one line of shell."""
    return bool(node.at("metadata", "annotations", "ray.io/overwrite-container-cmd").value == "true")


def _script(nodes: list[Node], exact: bool) -> str:
    words = [str(each.value) for node in nodes for each in node.elements()]
    shell = words[:1] and words[0].rpartition("/")[2] in ("bash", "sh")
    if shell and (flag := next((n for n, word in enumerate(words) if re.fullmatch(r"-[a-z]*c", word)), None)):
        rest = [word for word in words[flag + 1 :] if word != "--"]
        return "\n".join(rest)
    if not exact:
        return " ".join(words)
    return " ".join('"' + re.sub(r'(["\\])', r"\\\1", word) + '"' for word in words)


def _command(script: str, nodes: list[Node], group: Group, env: dict[str, Variable]) -> Wanted:
    found = {}
    for variable in group.container.at("env").elements():
        if variable.at("value"):
            found[str(variable.at("name").value)] = str(variable.at("value").value)
    place = next(node for node in nodes if node)
    for node in nodes:
        node.take()
    where = f"{place.ledger.source}: {'.'.join(map(str, place.path[-1:]))}"
    wanted = command.parse(script, found | {name: each.value for name, each in env.items()}, place.reporter(), where)
    wanted.env = env | wanted.env
    return wanted


def _inference(
    root: Node, wanted: Wanted, several: bool, head: Group, workers: list[Group], settings: Settings, suspended: bool
) -> dict[str, Any]:
    group = chosen(head, workers)
    metadata = _metadata(root.at("metadata"), wanted, several)
    spec: dict[str, Any] = {"model": wanted.model, "engine": {"name": "vllm"}}
    if wanted.served not in (None, wanted.model):
        spec["servedModelName"] = wanted.served
    spec.update(wanted.fields)
    world = _layout(root, spec, wanted, group, head, workers)
    if suspended:
        spec["suspend"] = True
    if settings.unauthenticated:
        spec["allowUnauthenticated"] = True
    elif settings.api_key is not None:
        spec["apiKey"] = dict(zip(("name", "key"), settings.api_key, strict=True))
    model = spec["model"]
    pods = Pods(spec, wanted.env)
    if root.at("kind").value != "RayService" and head.container:
        pods.add_env(head.container)  # vLLM itself ran there
    pods.carry(group, world, settings.image)
    if group is not head and head.container:
        pods.add_head(head, group, settings.image)
    for other in workers:
        if other is not group:
            other.node.lost("a group of another kind: all pods are like those of the first group with GPUs")
    if settings.unauthenticated and spec.pop("apiKey", None) is not None:
        root.ledger.note("replaced", ("spec",), "the key of VLLM_API_KEY: --allow-unauthenticated says none is needed")
    elif not settings.unauthenticated and "apiKey" not in spec:
        secret = f"{metadata['name']}-{_API_KEY_ENTRY}"
        spec["apiKey"] = {"name": secret, "key": _API_KEY_ENTRY}
        why = f"requests need a key now, from the Secret {secret}; --allow-unauthenticated serves everybody"
        root.ledger.note("check", ("spec",), why)
    if spec["model"] != model and "servedModelName" not in spec:
        spec["servedModelName"] = model  # requests go on calling it by its whole path
    pods.finish()
    if wanted.args:
        spec["engine"]["args"] = wanted.args
    ordered = {field.alias: spec[field.alias] for field in Spec.model_fields.values() if field.alias in spec}
    document = {"apiVersion": API_VERSION, "kind": "LLMInference", "metadata": metadata, "spec": ordered}
    _checked(document, root.ledger.source)
    return document


def _checked(document: dict[str, Any], source: str) -> LLMInference:
    return text.check(document, f"{source}: the LLMInference made of it")


def _metadata(node: Node, wanted: Wanted, several: bool) -> dict[str, Any]:
    given = node.at("name").take_text() or node.at("generateName").take_text() or "model"
    full = f"{given}-{wanted.name}" if several and wanted.name else given
    name = re.sub(r"[^a-z0-9]+", "-", full.lower()).strip("-")
    name = name if name[:1].isalpha() else f"model-{name}".rstrip("-")
    name = name[:MAX_NAME].rstrip("-")
    if name != given and not several:
        node.ledger.note("check", (*node.path, "name"), f"is {name} now: Services and pods are named after it")
    result: dict[str, Any] = {"name": name}
    if namespace := node.at("namespace").take_text():
        result["namespace"] = namespace
    for kind in ("labels", "annotations"):
        for key, each in node.at(kind).fields():
            if key.startswith("ray.io/") or key == _APPLIED:
                each.replaced("Ray's own, or kubectl's")
            else:
                result.setdefault(kind, {})[key] = each.take_text()
    for key in _SERVERS_OWN:
        node.at(key).replaced("set by the API server")
    return result


def _layout(root: Node, spec: dict[str, Any], wanted: Wanted, group: Group, head: Group, workers: list[Group]) -> int:
    """Sets gpusPerPod and gpuResource; how many workers are in a pod."""
    tensor, pipeline = wanted.tensor, wanted.pipeline
    world = tensor * pipeline
    if not group.gpus:
        spec["gpuResource"] = ""
        why = "no pod asks for GPUs, so that vLLM computes on the CPU; say otherwise in spec.gpuResource and gpusPerPod"
        root.ledger.note("check", group.node.path, why)
        return tensor
    if group.resource != "nvidia.com/gpu":
        spec["gpuResource"] = group.resource
    per_pod = min(group.gpus, world)
    there = sum(each.gpus * each.most for each in [head, *workers] if each.resource == group.resource)
    asked = f"{PARALLEL['--tensor-parallel-size']} {tensor} × {PARALLEL['--pipeline-parallel-size']} {pipeline}"
    if world > there:
        raise root.error(f"{asked} needs {world} GPUs, the cluster has {there}; change one of them")
    if world % per_pod or (per_pod % tensor and tensor % per_pod):
        raise root.error(
            f"{asked} does not fit pods of {group.gpus} GPUs: these must be a divisor of {tensor}, or {tensor} times a "
            f"divisor of {pipeline}"
        )
    if per_pod != tensor:
        spec["gpusPerPod"] = per_pod
    return per_pod


def _compare_gpus(cluster: Node, made: list[dict[str, Any]], head: Group, workers: list[Group]) -> None:
    """Says so if the cluster had more GPUs than its replicas use now."""
    there = sum(each.gpus * each.pods for each in [head, *workers])
    used = 0
    for document in made:
        spec = document["spec"]
        used += spec.get("tensorParallelSize", 1) * spec.get("pipelineParallelSize", 1) * spec.get("replicas", 1)
    if there > used:
        why = f"had {there} GPUs, of which the replicas use {used}; raise spec.replicas if the rest is to be used"
        cluster.ledger.note("check", cluster.path, why)

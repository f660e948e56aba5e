"""What a pod's container runs, per engine, and how it is asked whether it is well.

lightvllm and vllm, in groups of several pods: every pod runs ``lightvllm worker`` with a server for each of its GPUs,
and the leader the engine, too, which finds the workers by the headless Service's names (``scripts``). In groups of one
pod the engine starts its workers itself. sglang: one process per pod; they find each other by the leader's name.
custom: as given.

``$(NAME)`` in an argument is replaced by the kubelet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightvllm.backends.k8s.labels import HTTP_PORT
from lightvllm.operator.planner import scripts
from lightvllm.operator.planner.layout import Layout
from lightvllm.operator.planner.names import Names
from lightvllm.operator.planner.scripts import WORKER_PORT
from lightvllm.operator.types import LLMInference, Spec

SGLANG_PORT = 20000
"""Where SGLang's processes meet."""

DRIVER_FOLDER, TLS_FOLDER = "/etc/lightvllm/driver", "/tls"
IMAGES = {"lightvllm": "lightvllm:latest", "vllm": "lightvllm-vllm:latest"}
EVERYWHERE = {"IPv4": "0.0.0.0", "IPv6": "::"}  # noqa: S104  as pods are reached; NetworkPolicies say by whom
LOOPBACK = {"IPv4": "127.0.0.1", "IPv6": "::1"}
EXECUTOR = "lightvllm.adapters.vllm.KubernetesExecutor"


@dataclass(frozen=True)
class Running:
    """How an engine runs in a pod.

    Attributes:
        command, args: of the container; an empty command is the image's own.
        env: variables that the engine needs.
        ready, live: probes; None for none.
        leave: the ``preStop`` hook; None for none.
        group_files: whether the group's token and certificates are mounted.
        ports: of the workers.
    """

    command: list[str]
    args: list[str]
    env: list[dict[str, Any]] = field(default_factory=list)
    ready: dict[str, Any] | None = None
    live: dict[str, Any] | None = None
    leave: dict[str, Any] | None = None
    group_files: bool = False
    ports: list[dict[str, Any]] = field(default_factory=list)


def needs_group_files(spec: Spec) -> bool:
    """Whether the group's pods talk to each other over authenticated gRPC."""
    return spec.engine.name in ("lightvllm", "vllm") and Layout.of(spec).pods > 1


def running(inference: LLMInference, group: int) -> Running:
    """How the pods of a group run its engine."""
    spec, layout, names = inference.spec, Layout.of(inference.spec), Names(inference)
    make = {"lightvllm": _lightvllm, "vllm": _vllm, "sglang": _sglang, "custom": _custom}[spec.engine.name]
    return make(inference, layout, names, group)


def _lightvllm(inference: LLMInference, layout: Layout, names: Names, group: int) -> Running:
    spec = inference.spec
    several = layout.pods > 1
    server = [
        *("lightvllm", "serve", model_argument(spec), "--executor=k8s"),
        f"--tensor-parallel-size={layout.tensor}",
        f"--pipeline-parallel-size={layout.pipeline}",
        *_common(inference),
        f"--start-timeout={spec.start_timeout_seconds}",
        f"--shutdown-timeout={spec.drain.timeout_seconds}",
        "--exit-on-engine-failure",
        *_optional("--max-model-len", spec.max_model_len),
        *_optional("--max-num-seqs", spec.max_num_seqs),
        *([] if spec.gpu_resource else ["--device=cpu"]),
        *(["--allow-unauthenticated"] if spec.allow_unauthenticated else []),
    ]
    if several:
        server += [
            f"--k8s-service={names.headless(group)}:{WORKER_PORT}",
            f"--k8s-gpus-per-pod={layout.per_pod}",
            f"--k8s-token-file={DRIVER_FOLDER}/token",
            f"--k8s-tls-cert={DRIVER_FOLDER}/cert.pem",
            f"--k8s-tls-key={DRIVER_FOLDER}/key.pem",
            f"--k8s-tls-ca={DRIVER_FOLDER}/ca.pem",
        ]
    env = [_pod_ip("LIGHTVLLM_HOST_IP"), *_key("LIGHTVLLM_API_KEY", spec)]
    return _beside_workers(spec, layout, [*server, *spec.engine.args], env, ready="/health", live="/live")


def _vllm(inference: LLMInference, layout: Layout, names: Names, group: int) -> Running:
    spec = inference.spec
    server = [
        *("vllm", "serve", model_argument(spec)),
        f"--tensor-parallel-size={layout.tensor}",
        f"--pipeline-parallel-size={layout.pipeline}",
        f"--distributed-executor-backend={EXECUTOR}",
        *_common(inference),
        f"--shutdown-timeout={spec.drain.timeout_seconds}",
        *_optional("--max-model-len", spec.max_model_len),
        *_optional("--max-num-seqs", spec.max_num_seqs),
        *_optional("--block-size", spec.block_size),
    ]
    settings = {"LIGHTVLLM_START_TIMEOUT": str(spec.start_timeout_seconds)}
    if layout.pods > 1:
        settings |= {
            "LIGHTVLLM_K8S_SERVICE": f"{names.headless(group)}:{WORKER_PORT}",
            "LIGHTVLLM_K8S_GPUS_PER_POD": str(layout.per_pod),
            "LIGHTVLLM_K8S_TOKEN_FILE": f"{DRIVER_FOLDER}/token",
            "LIGHTVLLM_K8S_TLS_CERT": f"{DRIVER_FOLDER}/cert.pem",
            "LIGHTVLLM_K8S_TLS_KEY": f"{DRIVER_FOLDER}/key.pem",
            "LIGHTVLLM_K8S_TLS_CA": f"{DRIVER_FOLDER}/ca.pem",
        }
    env = [_pod_ip("VLLM_HOST_IP"), *_key("VLLM_API_KEY", spec)]
    env += [{"name": name, "value": value} for name, value in settings.items()]
    return _beside_workers(spec, layout, [*server, *spec.engine.args], env, ready="/health", live="/health")


def _beside_workers(
    spec: Spec, layout: Layout, server: list[str], env: list[dict[str, Any]], ready: str, live: str
) -> Running:
    """The engine in the leader, beside the worker servers of its pod if there are several pods."""
    if layout.pods == 1:
        return Running(server, [], env, _http(spec, ready), _http(spec, live), _pause(spec))
    drain = spec.drain
    leave = scripts.leave(drain.pause_seconds, drain.pause_seconds + drain.timeout_seconds)
    ports = [WORKER_PORT + number for number in range(layout.per_pod)]
    return Running(
        ["bash", "-c", scripts.run(layout.per_pod, EVERYWHERE[spec.network.ip_family]), "run"],
        server,
        env,
        _ask(spec, layout.per_pod, ready),
        _ask(spec, layout.per_pod, live),
        {"exec": {"command": ["bash", "-c", leave]}},
        group_files=True,
        # The first one's name is that of the headless Service's port.
        ports=[{"name": "grpc" if not n else f"grpc-{n}", "containerPort": port} for n, port in enumerate(ports)],
    )


def _sglang(inference: LLMInference, layout: Layout, names: Names, group: int) -> Running:
    spec = inference.spec
    server = [
        *("python3", "-m", "sglang.launch_server", f"--model-path={model_argument(spec)}"),
        f"--tp={layout.tensor}",
        f"--pp-size={layout.pipeline}",
        f"--dist-init-addr=$(LWS_LEADER_ADDRESS):{SGLANG_PORT}",
        "--nnodes=$(LWS_GROUP_SIZE)",
        "--node-rank=$(LWS_WORKER_INDEX)",
        *_common(inference),
        *_optional("--context-length", spec.max_model_len),
        *_optional("--max-running-requests", spec.max_num_seqs),
        *_optional("--page-size", spec.block_size),
        *([] if spec.gpu_resource else ["--device=cpu"]),
        *(["--api-key=$(API_KEY)"] if spec.api_key is not None else []),
    ]
    # Every node answers /health, the leader's API is behind the same port; without TLS where it is not the leader's.
    probe = _http(spec, "/health")
    if spec.tls is not None and layout.pods > 1:
        probe = _ask(spec, 1, "/health", HTTP_PORT)
    return Running([*server, *spec.engine.args], [], _key("API_KEY", spec), probe, probe, _pause(spec))


def _custom(inference: LLMInference, layout: Layout, names: Names, group: int) -> Running:
    spec = inference.spec
    return Running(
        list(spec.engine.command or ()),
        list(spec.engine.args),
        _key("API_KEY", spec),
        spec.engine.readiness_probe,
        leave=_pause(spec),
    )


def model_argument(spec: Spec) -> str:
    """The model as the engine is told it."""
    folder = spec.model_source.mount_path.rstrip("/") + "/" if spec.model_source is not None else ""
    return _literal(folder + spec.model)


def _common(inference: LLMInference) -> list[str]:
    """What all three servers call alike."""
    tls = [f"--ssl-certfile={TLS_FOLDER}/tls.crt", f"--ssl-keyfile={TLS_FOLDER}/tls.key"]
    return [
        f"--served-model-name={_literal(inference.served_model_name)}",
        f"--host={EVERYWHERE[inference.spec.network.ip_family]}",
        f"--port={HTTP_PORT}",
        *(tls if inference.spec.tls is not None else []),
    ]


def _pause(spec: Spec) -> dict[str, Any] | None:
    """The kubelet's own sleep, for which the image needs no command; it may not be of no seconds."""
    return {"sleep": {"seconds": spec.drain.pause_seconds}} if spec.drain.pause_seconds else None


def _literal(text: str) -> str:
    """Not to be replaced by the kubelet."""
    return text.replace("$(", "$$(")


def _optional(option: str, value: int | None) -> list[str]:
    return [] if value is None else [f"{option}={value}"]


def _pod_ip(name: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


def _key(name: str, spec: Spec) -> list[dict[str, Any]]:
    if spec.api_key is None:
        return []
    return [{"name": name, "valueFrom": {"secretKeyRef": {"name": spec.api_key.name, "key": spec.api_key.key}}}]


def _http(spec: Spec, path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http", "scheme": "HTTPS" if spec.tls is not None else "HTTP"}}


def _ask(spec: Spec, workers: int, path: str, worker_port: int = WORKER_PORT) -> dict[str, Any]:
    host = LOOPBACK[spec.network.ip_family]
    command = scripts.ask(path, tls=spec.tls is not None, workers=workers, worker_port=worker_port, host=host)
    return {"exec": {"command": command}}

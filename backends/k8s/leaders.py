"""Which ``LLMInference`` objects there are and which leader pods they have, kept up to date by list and watch.

``LeaderWatch`` calls back with a ``Leaders`` whenever something changed. Two threads of its own talk to the API server,
one for the objects and one for the pods (``watch.py``); names and labels are those of ``labels.py``. The only module
that imports kubernetes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lightvllm.backends.k8s import labels
from lightvllm.backends.k8s.watch import (
    FIRST_PAUSE,
    GRACE_SECONDS,
    RESYNC_SECONDS,
    WATCH_SECONDS,
    Mirror,
    Refused,
    object_key,
)
from lightvllm.errors import ConfigError, MissingExtra

_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", None)


class Inference(msgspec.Struct, frozen=True):
    """An LLMInference.

    Attributes:
        model: what clients call it: ``spec.servedModelName``, else ``spec.model``.
    """

    namespace: str
    name: str
    model: str


class Leader(msgspec.Struct, frozen=True):
    """A leader pod that has an address.

    Attributes:
        inference: the name of its LLMInference.
        ready: its condition Ready is true and nobody has deleted it.
    """

    namespace: str
    name: str
    inference: str
    address: str
    port: int
    ready: bool


class Leaders(msgspec.Struct, frozen=True):
    """All of them, in order of namespace and name."""

    inferences: tuple[Inference, ...] = ()
    leaders: tuple[Leader, ...] = ()


class LeaderWatch:
    """Follows the API server from ``start`` to ``close``.

    Args:
        on_change: called, from a thread of the watch, with each new state; the first when both have been listed.
        namespace: None watches all that the credentials may see.
        selector: a label selector that the LLMInference objects must match.
        kubeconfig, context: where the API server is; without a file: the pod's service account if this is a pod, else
            the usual kubeconfig.
        watch_seconds, grace_seconds, resync_seconds, first_pause: see ``watch.py``.

    Raises MissingExtra without the package kubernetes, and ConfigError if nothing says where the API server is.
    """

    def __init__(
        self,
        on_change: Callable[[Leaders], None],
        namespace: str | None = None,
        selector: str = "",
        kubeconfig: Path | None = None,
        context: str | None = None,
        *,
        watch_seconds: int = WATCH_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        resync_seconds: float = RESYNC_SECONDS,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self._on_change = on_change
        self._lock = threading.Lock()
        self._last: Leaders | None = None
        self._api = _api_client(kubeconfig, context)
        kubernetes = _kubernetes()
        core, custom = kubernetes.client.CoreV1Api(self._api), kubernetes.client.CustomObjectsApi(self._api)
        pods = core.list_pod_for_all_namespaces if namespace is None else partial(core.list_namespaced_pod, namespace)
        objects = (
            partial(custom.list_cluster_custom_object, labels.GROUP, labels.VERSION, labels.PLURAL)
            if namespace is None
            else partial(custom.list_namespaced_custom_object, labels.GROUP, labels.VERSION, namespace, labels.PLURAL)
        )
        times = (watch_seconds, grace_seconds, resync_seconds, first_pause)
        of_leaders = f"{labels.INFERENCE_LABEL},{labels.ROLE_LABEL}={labels.LEADER}"
        self._objects = Mirror(
            labels.PLURAL, partial(_refusing, objects, label_selector=selector), self._changed, *times
        )
        self._pods = Mirror("leader pods", partial(_refusing, pods, label_selector=of_leaders), self._changed, *times)

    def start(self) -> None:
        self._objects.start()
        self._pods.start()

    def close(self, timeout: float = 5.0) -> None:
        """End both threads; idempotent. ``on_change`` is not called after it has returned."""
        deadline = time.monotonic() + timeout
        for mirror in (self._objects, self._pods):
            mirror.stop()
        for mirror in (self._objects, self._pods):
            mirror.join(deadline)
        with self._lock:
            self._on_change = _ignore
        self._api.close()

    def _changed(self) -> None:
        with self._lock:
            objects, pods = self._objects.current, self._pods.current
            if objects is None or pods is None:
                return
            inferences = sorted(filter(None, map(_inference, objects.values())), key=_place)
            known = {_place(inference) for inference in inferences}
            leaders = sorted(
                (
                    leader
                    for leader in filter(None, map(_leader, pods.values()))
                    if (leader.namespace, leader.inference) in known
                ),
                key=_place,
            )
            state = Leaders(tuple(inferences), tuple(leaders))
            if state != self._last:
                self._last = state
                self._on_change(state)


def _inference(content: dict[str, Any]) -> Inference | None:
    """None for an object that names no model."""
    spec = content.get("spec") or {}
    model = spec.get("servedModelName") or spec.get("model")
    namespace, name = object_key(content)
    return Inference(namespace, name, model) if isinstance(model, str) and model else None


def _leader(pod: dict[str, Any]) -> Leader | None:
    """None for a pod that has no address yet, or has ended."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    address = status.get("podIP")
    if not address or status.get("phase") in ("Succeeded", "Failed"):
        return None
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions") or ()}
    ports = [
        port["containerPort"]
        for container in (pod.get("spec") or {}).get("containers") or ()
        for port in container.get("ports") or ()
        if port.get("name") == labels.HTTP_PORT_NAME
    ]
    return Leader(
        namespace=metadata.get("namespace", ""),
        name=metadata["name"],
        inference=(metadata.get("labels") or {}).get(labels.INFERENCE_LABEL, ""),
        address=address,
        port=ports[0] if ports else labels.HTTP_PORT,
        ready=conditions.get("Ready") == "True" and not metadata.get("deletionTimestamp"),
    )


def _place(named: Inference | Leader) -> tuple[str, str]:
    return named.namespace, named.name


def _refusing(list_call: Callable[..., Any], **arguments: Any) -> Any:
    """``list_call``, with the client's exception for a refusal turned into ours."""
    try:
        return list_call(**arguments)
    except _kubernetes().client.ApiException as error:
        raise Refused(error.status or 0, error.reason or "") from None


def _ignore(state: Leaders) -> None:
    """What is called back after the end."""


def _kubernetes() -> Any:
    try:
        import kubernetes
    except ModuleNotFoundError:
        raise MissingExtra("kubernetes", "k8s", "finding LLMInference objects") from None
    return kubernetes


def _api_client(kubeconfig: Path | None, context: str | None) -> Any:
    kubernetes = _kubernetes()
    configuration = kubernetes.client.Configuration()
    # A silent host is noticed by the system within about 15 s, well before a watch's own limit.
    keepalive = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    ]
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):
            keepalive.append((socket.IPPROTO_TCP, getattr(socket, option), value))
    if _TCP_USER_TIMEOUT is not None:
        keepalive.append((socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, 15_000))
    configuration.socket_options = keepalive
    config = kubernetes.config
    try:
        if kubeconfig is None and context is None:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                config.load_kube_config(client_configuration=configuration)
        else:
            path = None if kubeconfig is None else str(kubeconfig)
            config.load_kube_config(path, context, client_configuration=configuration)
    except Exception as error:  # noqa: BLE001  whatever the client raises for a file that is wrong
        raise ConfigError(
            f"no Kubernetes API server: {str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            "run in a pod with a service account, or give --kubeconfig"
        ) from None
    configuration.retries = False  # urllib3's own; errors are handled here, with a back-off
    return kubernetes.client.ApiClient(configuration)

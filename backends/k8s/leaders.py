"""Which ``LLMInference`` objects there are and which leader pods they have, kept up to date by list and watch.

``LeaderWatch`` calls back with a ``Leaders`` whenever something changed. Two threads of its own talk to the API server,
one for the objects and one for the pods; names and labels are those of ``labels.py``.

Each lists, then watches from the list's version on. What the official client's ``Watch`` does with an expired version
(410) or a silent connection was read before it was left aside (client 37): it tries a 410 once more from the same
version, yields ``None`` for a line that is no JSON, fails with KeyError on an error event without deserialisation, and
waits for ever on a connection whose other end is gone. Here a 410 lists anew; a watch ends after ``WATCH_SECONDS`` at
the server, and is given up a little later if the server did not end it; any other error lists anew after a back-off.
Every ``RESYNC_SECONDS`` is a list, whatever watches have told.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec

from lightvllm.backends.k8s import labels
from lightvllm.errors import ConfigError, LightvllmError, MissingExtra

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
LIST_SECONDS = 30.0
WATCH_SECONDS = 60
RESYNC_SECONDS = 600.0
GRACE_SECONDS = 10.0
"""How much longer than a watch was asked for it may be silent before its connection counts as dead."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the next list after an error
_PAGE = 500
_GONE = 410
_ADVICE = {
    401: "; the credentials are not valid",
    403: "; the service account needs the verbs list and watch",
    404: "; is the resource's definition installed?",
}
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
        watch_seconds, grace_seconds, resync_seconds, first_pause: see the module.

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
        self._objects = _Mirror(labels.PLURAL, partial(objects, label_selector=selector), self._changed, *times)
        self._pods = _Mirror("leader pods", partial(pods, label_selector=of_leaders), self._changed, *times)

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


class _Mirror:
    """The objects of one list call, as the API server has them."""

    def __init__(
        self,
        what: str,
        list_call: Callable[..., Any],
        on_change: Callable[[], None],
        watch_seconds: int,
        grace_seconds: float,
        resync_seconds: float,
        first_pause: float,
    ) -> None:
        self.current: dict[tuple[str, str], dict[str, Any]] | None = None
        self._what, self._list, self._on_change = what, list_call, on_change
        self._watch_seconds, self._grace, self._resync = watch_seconds, grace_seconds, resync_seconds
        self._first_pause = first_pause
        self._stopped = threading.Event()
        self._response: Any = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"lightvllm k8s {what}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Have the thread end; a read that it waits in ends, too."""
        self._stopped.set()
        with self._lock:
            _cut(self._response)

    def join(self, deadline: float) -> None:
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        pause = self._first_pause
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self._follow()
                pause = self._first_pause
            except Exception as error:  # noqa: BLE001  whatever it was: say so, and list anew
                if self._stopped.is_set():
                    return
                if time.monotonic() - began > LONGEST_PAUSE:  # it had worked
                    pause = self._first_pause
                logger.warning("watching %s: %s; again in about %.1f s", self._what, _reason(error), pause)
                self._stopped.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(pause * 2, LONGEST_PAUSE)

    def _follow(self) -> None:
        """One list and the watches that follow it, until the next list is due."""
        due = time.monotonic() + self._resync
        version = self._list_all()
        while not self._stopped.is_set() and time.monotonic() < due:
            for event in self._watch(version):
                content, kind = event.get("object") or {}, event.get("type")
                if kind == "ERROR":
                    if content.get("code") == _GONE:
                        return
                    raise LightvllmError(f"the API server says {content.get('message') or content}")
                version = content["metadata"]["resourceVersion"]
                if kind == "BOOKMARK":
                    continue
                assert self.current is not None
                if kind == "DELETED":
                    self.current.pop(_key(content), None)
                else:
                    self.current[_key(content)] = content
                self._on_change()

    def _list_all(self) -> str:
        """All objects into ``current``; the version of the list."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        more: dict[str, str] = {}
        while True:
            with self._call(_request_timeout=(CONNECT_SECONDS, LIST_SECONDS), limit=_PAGE, **more) as response:
                page = json.loads(response.data)
            found.update((_key(item), item) for item in page.get("items") or ())
            if not (following := page["metadata"].get("continue")):
                break
            more = {"_continue": following}
        self.current = found
        self._on_change()
        return str(page["metadata"]["resourceVersion"])

    def _watch(self, version: str) -> Iterator[dict[str, Any]]:
        """Events after ``version``; ends when the server ends the watch. A 410 is an event, however it comes."""
        try:
            with self._call(
                watch=True,
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=self._watch_seconds,
                _request_timeout=(CONNECT_SECONDS, self._watch_seconds + self._grace),
            ) as response:
                rest = b""
                for part in response.stream(amt=None, decode_content=False):
                    *lines, rest = (rest + part).split(b"\n")
                    yield from map(json.loads, filter(bytes.strip, lines))
        except _Refused as status:
            if status.code != _GONE:
                raise
            yield {"type": "ERROR", "object": {"code": _GONE}}

    @contextlib.contextmanager
    def _call(self, **arguments: Any) -> Iterator[Any]:
        """The urllib3 response; raises _Refused unless it is 2xx. Can be cut by ``stop``."""
        try:
            response = self._list(_preload_content=False, **arguments)
        except _kubernetes().client.ApiException as error:
            raise _Refused(error.status or 0, error.reason or "") from None
        response = getattr(response, "response", response)
        with self._lock:
            self._response = response
            if self._stopped.is_set():
                _cut(response)
        try:
            if not 200 <= response.status < 300:
                raise _Refused(response.status, response.reason or "")
            yield response
        finally:
            with self._lock:
                self._response = None
            response.close()
            response.release_conn()


class _Refused(LightvllmError):
    """The API server refused."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the API server says {code} {reason}".strip() + _ADVICE.get(code, ""))
        self.code = code


def _inference(content: dict[str, Any]) -> Inference | None:
    """None for an object that names no model."""
    spec = content.get("spec") or {}
    model = spec.get("servedModelName") or spec.get("model")
    namespace, name = _key(content)
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


def _key(content: dict[str, Any]) -> tuple[str, str]:
    metadata = content["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _place(named: Inference | Leader) -> tuple[str, str]:
    return named.namespace, named.name


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


def _cut(response: Any) -> None:
    """End a read of the response that another thread waits in."""
    connection = getattr(response, "connection", None) or getattr(response, "_connection", None)
    sock = cast("socket.socket | None", getattr(connection, "sock", None))
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _reason(error: Exception) -> str:
    if isinstance(error, LightvllmError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:300] if str(error) else type(error).__name__

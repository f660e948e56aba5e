"""A Kubernetes API server for tests, over HTTP on loopback: lists and watches of what a test puts into it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from waiting import LIMIT

from lightvllm.backends.k8s import labels

OBJECTS = f"/apis/{labels.GROUP}/{labels.VERSION}"


class FakeKube:
    """Serves until ``close``.

    Attributes:
        fail: status that every request gets; None: none.
        fail_lists: how many lists fail with it, if not all.
        silent: watches send nothing and never end, whatever they were asked for.
        page: objects per page of a list, at most.
        lists, watches: what was asked: (plural, query).
        gone_before: versions before this are expired: 410 as an event, or as a status if ``gone_as_status``.
    """

    def __init__(self) -> None:
        self.fail: int | None = None
        self.fail_lists = -1
        self.silent = False
        self.garbage = False
        self.page = 500
        self.gone_before = 0
        self.gone_as_status = False
        self.lists: list[tuple[str, dict[str, str]]] = []
        self.watches: list[tuple[str, dict[str, str]]] = []
        self.tokens: set[str | None] = set()
        self._objects: dict[str, dict[tuple[str, str], dict[str, Any]]] = {"pods": {}, labels.PLURAL: {}}
        self._events: list[tuple[int, str, str, dict[str, Any]]] = []
        self._version = 100
        self._changed = threading.Condition()
        self._closed = False
        kube = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                kube._get(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self, folder: Path) -> Path:
        path = folder / "kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {"token": "secret"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(LIMIT)

    # ---- what a test does

    def inference(self, name: str, namespace: str = "ns", **spec: Any) -> None:
        self._put(labels.PLURAL, namespace, name, {"spec": spec, "metadata": {}})

    def leader(
        self,
        name: str,
        inference: str,
        address: str | None = "10.0.0.1",
        *,
        namespace: str = "ns",
        port: int | None = 8000,
        ready: bool = True,
        **metadata: Any,
    ) -> None:
        ports = (
            [] if port is None else [{"name": "metrics", "containerPort": 1}, {"name": "http", "containerPort": port}]
        )
        self._put(
            "pods",
            namespace,
            name,
            {
                "metadata": {
                    "labels": {labels.INFERENCE_LABEL: inference, labels.ROLE_LABEL: labels.LEADER},
                    **metadata,
                },
                "spec": {"containers": [{"name": "main", "ports": ports}]},
                "status": {
                    "phase": "Running",
                    **({"podIP": address} if address else {}),
                    "conditions": [{"type": "Ready", "status": str(ready)}],
                },
            },
        )

    def delete(self, plural: str, name: str, namespace: str = "ns") -> None:
        with self._changed:
            content = self._objects[plural].pop((namespace, name))
            self._event(plural, "DELETED", content)

    def expire(self, *, as_status: bool = False) -> None:
        """Everything that happened so far is forgotten, and standing watches end."""
        with self._changed:
            self._version += 1
            self.gone_before, self.gone_as_status = self._version, as_status
            self._changed.notify_all()

    def forget(self, plural: str, name: str, namespace: str = "ns") -> None:
        """Delete without an event, as if a watch had lost it."""
        with self._changed:
            del self._objects[plural][namespace, name]

    def _put(self, plural: str, namespace: str, name: str, content: dict[str, Any]) -> None:
        content["metadata"].update(name=name, namespace=namespace)
        with self._changed:
            kind = "MODIFIED" if (namespace, name) in self._objects[plural] else "ADDED"
            self._objects[plural][namespace, name] = content
            self._event(plural, kind, content)

    def _event(self, plural: str, kind: str, content: dict[str, Any]) -> None:
        self._version += 1
        content["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, plural, kind, json.loads(json.dumps(content))))
        self._changed.notify_all()

    # ---- what the client asks

    def _get(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        plural = parts.path.rpartition("/")[2]
        namespace = parts.path.rpartition("/namespaces/")[2].partition("/")[0] if "/namespaces/" in parts.path else None
        self.tokens.add(request.headers.get("Authorization"))
        watching = query.get("watch", "").lower() == "true"
        (self.watches if watching else self.lists).append((plural, query))
        if self.fail is not None and (self.fail_lists or watching):
            self.fail_lists -= not watching
            self._json(request, {"kind": "Status", "code": self.fail, "message": "as told"}, self.fail)
        elif watching:
            self._watch(request, plural, namespace, query)
        else:
            self._list(request, plural, namespace, query)

    def _list(self, request: Any, plural: str, namespace: str | None, query: dict[str, str]) -> None:
        with self._changed:
            items = [c for (where, _), c in sorted(self._objects[plural].items()) if namespace in (None, where)]
            start, most = int(query.get("continue", 0)), min(self.page, int(query.get("limit", 500)))
            metadata = {"resourceVersion": str(self._version)}
            if start + most < len(items):
                metadata["continue"] = str(start + most)
            self._json(request, {"metadata": metadata, "items": items[start : start + most]})

    def _json(self, request: Any, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def _watch(self, request: Any, plural: str, namespace: str | None, query: dict[str, str]) -> None:
        version = int(query["resourceVersion"])
        if version < self.gone_before and self.gone_as_status:
            self._json(request, {"kind": "Status", "code": 410, "message": "too old"}, 410)
            return
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        try:
            for event in self._stream(plural, namespace, version, float(query["timeoutSeconds"])):
                text = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
                for half in (text[: len(text) // 2], text[len(text) // 2 :]):  # lines need not come whole
                    request.wfile.write(b"%x\r\n%b\r\n" % (len(half), half))
            request.wfile.write(b"0\r\n\r\n")
        except OSError:
            request.close_connection = True

    def _stream(self, plural: str, namespace: str | None, version: int, seconds: float) -> Iterator[Any]:
        sent = version
        yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}
        while True:
            with self._changed:
                if self.garbage:
                    self.garbage = False
                    yield b"this is no JSON\n"
                if sent < self.gone_before:
                    yield {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}
                    return
                news = (
                    [event for event in self._events if event[0] > sent and event[1] == plural]
                    if not self.silent
                    else []
                )
                if not news:
                    if self._closed or not (self._changed.wait(seconds) or self.silent):
                        return
                    continue
            for number, _, kind, content in news:
                sent = number
                if namespace in (None, content["metadata"]["namespace"]):
                    yield {"type": kind, "object": content}

"""The objects of one list call of the Kubernetes API, kept up to date by list and watch; imports no kubernetes.

What the official client's ``Watch`` (37) does with an expired version (410) or a silent connection was read before it
was left aside: it tries a 410 once more from the same version, yields ``None`` for a line that is no JSON, fails with
KeyError on an error event without deserialisation, and waits for ever on a connection whose other end is gone.
Here a 410 lists anew; a watch ends after ``WATCH_SECONDS`` at the server, and is given up a little later if the server
did not end it; any other error lists anew after a back-off. Every ``RESYNC_SECONDS`` is a list, whatever watches have
told.
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
from typing import Any, cast

from lightvllm.errors import LightvllmError

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


class Mirror:
    """One thread that lists and watches, from ``start`` to ``stop``.

    Args:
        what: for messages and the thread's name.
        list_call: a list function of the official client; it raises Refused, or gives the answer whatever its status.
        on_change: called by the thread after every change of ``current``.
        watch_seconds, grace_seconds, resync_seconds, first_pause: see the constants.

    Attributes:
        current: the objects by namespace and name, never changed but replaced; None until they have been listed.
    """

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
                self._not_too_fast(began)
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
            began = time.monotonic()
            for event in self._watch(version):
                content, kind = event.get("object") or {}, event.get("type")
                if kind == "ERROR":
                    if content.get("code") == _GONE:
                        return
                    raise LightvllmError(f"the API server says {content.get('message') or content}")
                version = content["metadata"]["resourceVersion"]
                if kind == "BOOKMARK":
                    continue
                # Another dict each time: others look at the one before.
                current = dict(self.current or {})
                if kind == "DELETED":
                    current.pop(object_key(content), None)
                else:
                    current[object_key(content)] = content
                self.current = current
                self._on_change()
            self._not_too_fast(began)

    def _not_too_fast(self, began: float) -> None:
        """A server, or a proxy before it, that ends everything at once must not be asked without a pause."""
        if time.monotonic() - began < 1.0:
            self._stopped.wait(self._first_pause)

    def _list_all(self) -> str:
        """All objects into ``current``; the version of the list."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        more: dict[str, str] = {}
        while True:
            with self._call(_request_timeout=(CONNECT_SECONDS, LIST_SECONDS), limit=_PAGE, **more) as response:
                page = json.loads(response.data)
            found.update((object_key(item), item) for item in page.get("items") or ())
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
        except Refused as status:
            if status.code != _GONE:
                raise
            yield {"type": "ERROR", "object": {"code": _GONE}}

    @contextlib.contextmanager
    def _call(self, **arguments: Any) -> Iterator[Any]:
        """The urllib3 response; raises Refused unless it is 2xx. Can be cut by ``stop``."""
        response = self._list(_preload_content=False, **arguments)
        response = getattr(response, "response", response)
        with self._lock:
            self._response = response
            if self._stopped.is_set():
                _cut(response)
        try:
            if not 200 <= response.status < 300:
                raise Refused(response.status, response.reason or "")
            yield response
        finally:
            with self._lock:
                self._response = None
            response.close()
            response.release_conn()


class Refused(LightvllmError):
    """The API server refused."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the API server says {code} {reason}".strip() + _ADVICE.get(code, ""))
        self.code = code


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


def object_key(content: dict[str, Any]) -> tuple[str, str]:
    """Namespace and name."""
    metadata = content["metadata"]
    return metadata.get("namespace", ""), metadata["name"]

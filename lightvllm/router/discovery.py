"""Replicas that Kubernetes knows: leader pods of ``LLMInference`` objects, by ``lightvllm.backends.k8s.leaders``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from lightvllm.backends.k8s.leaders import Leaders, LeaderWatch
from lightvllm.router.pool import Snapshot
from lightvllm.router.replica import Target, check_url


class Kubernetes:
    """``--kubernetes``: each object's model is known, with as many replicas as it has leaders with an address.

    Args:
        namespace: None: all.
        selector: labels of the objects.
        kubeconfig, context: see ``LeaderWatch``.
        scheme: of the leaders' API.
        host: what a leader's certificate proves, because pods have no names of their own; with https.
        check: of addresses.
    """

    name = "Kubernetes"

    def __init__(
        self,
        namespace: str | None = None,
        selector: str = "",
        kubeconfig: Path | None = None,
        context: str | None = None,
        scheme: str = "http",
        host: str | None = None,
        check: Callable[[str], str] = check_url,
        *,
        make_watch: Callable[..., LeaderWatch] = LeaderWatch,
    ) -> None:
        check(f"{scheme}://leader.invalid")  # now, rather than when the first pod comes
        self._scheme, self._host = scheme, host
        self._latest: Leaders | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._watch = make_watch(self._changed, namespace, selector, kubeconfig, context)

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        self._loop = asyncio.get_running_loop()
        self._watch.start()
        try:
            while True:
                await self._event.wait()
                self._event.clear()
                if self._latest is not None:
                    yield self._snapshot(self._latest)
        finally:
            await asyncio.to_thread(self._watch.close)

    def _changed(self, leaders: Leaders) -> None:
        """In a thread of the watch."""

        def take() -> None:
            self._latest = leaders
            self._event.set()

        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(take)

    def _snapshot(self, known: Leaders) -> Snapshot:
        models = {(inference.namespace, inference.name): inference.model for inference in known.inferences}
        targets = []
        for leader in known.leaders:
            address = f"[{leader.address}]" if ":" in leader.address else leader.address
            targets.append(
                Target(
                    name=f"{leader.namespace}/{leader.name}",
                    url=f"{self._scheme}://{address}:{leader.port}",
                    models=(models[leader.namespace, leader.inference],),
                    ready=leader.ready,
                    host=self._host,
                )
            )
        return Snapshot(tuple(targets), frozenset(models.values()))

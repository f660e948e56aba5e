"""``Front``: where an engine's requests come from and its events go to, in one event loop.

It knows who is under way and who waits, what the engine has last said of itself, and who is to be told. It does not
know prompts, tokenizers and users (``async_llm.py``), nor where the engine's loop runs (``CoreHandle``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lightvllm.engine.admission import Admission
from lightvllm.engine.core import ended_ranks
from lightvllm.engine.core_messages import (
    Abort,
    Add,
    CheckHealth,
    Ended,
    Event,
    Failure,
    Health,
    Outputs,
    Progress,
    Ready,
)
from lightvllm.engine.core_thread import CoreHandle
from lightvllm.engine.intake import check_priority, check_timeout
from lightvllm.engine.options import check_type
from lightvllm.engine.protocol import EngineState, EngineStats, OutputKind, RankState
from lightvllm.engine.request_stream import RequestStream
from lightvllm.errors import ConfigError, RpcTimeout
from lightvllm.sampling_params import SamplingParams

HEALTH_TIMEOUT = 15.0
"""Seconds for ``check_health``; the executor itself gives its workers ten."""


class Front:
    """Made in the running event loop, which it belongs to.

    Attributes:
        core: the engine's loop; set by whoever starts that, with ``deliver`` for its events.
        ready: done when the first step can be run, failed when the start has.
        state, ranks, stats, start_seconds: as the engine said last.
        failure: why there will be no more steps: that it failed, or a Shutdown.
        streams: the requests under way, by their number.
    """

    core: CoreHandle

    def __init__(self, max_num_seqs: int, max_num_waiting: int, progress: Callable[[str], None] | None) -> None:
        self.state: EngineState = "starting"
        self.failure: Failure | None = None
        self.ranks: list[RankState] = []
        self.stats = EngineStats()
        self.start_seconds = 0.0
        self.streams: dict[int, RequestStream] = {}
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._health: asyncio.Future[None] | None = None
        self._listeners: dict[object, Callable[[], None]] = {}
        self._request_ids: set[str] = set()
        self._num_requests = 0
        self._admission = Admission(max_num_seqs, max_num_waiting)

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """See ``EngineClient.on_change``."""
        key = object()
        self._listeners[key] = listener

        def end() -> None:
            self._listeners.pop(key, None)

        return end

    def check_usable(self) -> None:
        """Raise why there will be no more steps, if that is so."""
        if self.failure is not None:
            raise self.failure.error()

    async def check_health(self) -> None:
        """See ``EngineClient.check_health``. Who asks while an answer is awaited gets that one."""
        self.check_usable()
        if self._health is None:
            self._health = self._loop.create_future()
            self.core.send(CheckHealth())
        try:
            await asyncio.wait_for(asyncio.shield(self._health), HEALTH_TIMEOUT)
        except TimeoutError:
            raise RpcTimeout(
                f"the workers did not answer within {HEALTH_TIMEOUT:g} s; they may be in a long step"
            ) from None

    # ------------------------------------------------------------------------------------------------ requests

    def add(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams | None,
        request_id: str | None,
        arrival_time: float,
        priority: int,
        timeout: float | None,
        output_kind: OutputKind,
    ) -> tuple[int, RequestStream]:
        """Send a request, whose prompt and parameters have been checked, on its way; its number and its stream.

        ``params``: None for an embedding. Raises ConfigError, QueueFull, and why there will be no more steps.
        """
        self.check_usable()
        check_type("request_id", request_id, str | None)
        check_priority(priority)
        check_timeout(timeout)
        num_seqs = 1 if params is None else params.n
        number = self._num_requests
        name = f"request-{number}" if request_id is None else request_id
        if name in self._request_ids:
            raise ConfigError(f"request_id={name!r} is in use; give each unfinished request its own")
        self._admission.admit(num_seqs, self.stats)
        self._num_requests += 1
        stream = RequestStream(name, text, token_ids, num_seqs, arrival_time, output_kind)
        self.streams[number] = stream
        self._request_ids.add(name)
        self.core.send(Add(number, token_ids, params, output_kind != "final", arrival_time, priority, timeout))
        return number, stream

    def drop(self, number: int) -> None:
        """The request's reader has gone, or has read it all."""
        stream = self.streams.get(number)
        if stream is not None:
            self._forget(number, stream)
            self.core.send(Abort(number))

    def _forget(self, number: int, stream: RequestStream) -> None:
        del self.streams[number]
        self._request_ids.discard(stream.request_id)
        self._admission.left(stream.num_unfinished)

    # -------------------------------------------------------------------------------------------------- events

    def deliver(self, events: list[Event]) -> None:
        """Take in what the engine has said."""
        for event in events:
            match event:
                case Outputs():
                    self._take(event)
                case Progress():
                    if self._progress is not None:
                        self._call(self._progress, event.text)
                case Ready():
                    self._begin(event)
                case Health():
                    self._answer_health(event.failure)
                case Ended():
                    self.end(event.failure)
        self._changed()

    def _begin(self, event: Ready) -> None:
        if self.state != "starting":
            return
        self.state, self.ranks, self.stats = "ready", event.ranks, event.stats
        self.start_seconds = event.start_seconds
        if not self.ready.done():
            self.ready.set_result(None)

    def _take(self, event: Outputs) -> None:
        streams, ended = self.streams, 0
        self.stats = event.stats
        for delta in event.deltas:
            stream = streams.get(delta.number)
            if stream is not None:  # else it was aborted while this was under way
                ended += stream.put(delta)
                if delta.finished:
                    self._forget(delta.number, stream)
        for number, failure in event.refused.items():
            stream = streams.get(number)
            if stream is not None:
                self._forget(number, stream)
                stream.fail(failure.error())
        self._admission.ended(ended)

    def end(self, failure: Failure) -> None:
        """No more steps: what waits fails at once."""
        if self.failure is not None:
            return
        self.failure, self.ranks = failure, ended_ranks(self.ranks, failure)
        self.state = "stopped" if failure.kind == "Shutdown" else "failed"
        for number, stream in list(self.streams.items()):
            self._forget(number, stream)
            stream.fail(failure.error())
        self._answer_health(failure)
        if not self.ready.done():
            self.ready.set_exception(failure.error())
        self._changed()

    def _answer_health(self, failure: Failure | None) -> None:
        waiting, self._health = self._health, None
        if waiting is not None and not waiting.done():
            if failure is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(failure.error())
                waiting.exception()  # whoever asked may have gone

    def _changed(self) -> None:
        for listener in list(self._listeners.values()):
            self._call(listener)

    def _call(self, told: Callable[..., None], *args: str) -> None:
        """A defect of who is told must not cost the requests their outputs."""
        try:
            told(*args)
        except Exception as error:  # noqa: BLE001  given to the event loop's handler of such things
            self._loop.call_exception_handler({"message": f"{told!r}, told by AsyncLLM, failed", "exception": error})

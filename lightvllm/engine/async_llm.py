"""``AsyncLLM``: a model for asyncio, in a process of its own. Implements ``EngineClient`` (``protocol.py``).

The front is here, in the caller's event loop: it tokenizes, checks, refuses what would wait too long, and hands each
request's outputs to its reader. The engine's loop is elsewhere (``core.py``), in a process or a thread; what they say
to each other is in ``core_messages.py``.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

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
from lightvllm.engine.core_thread import CoreHandle, ThreadCore
from lightvllm.engine.intake import Intake, Prompt, TokensPrompt, check_priority, check_timeout
from lightvllm.engine.options import Configured, Options, check_type
from lightvllm.engine.outputs import EmbeddingOutput, RequestOutput
from lightvllm.engine.protocol import EngineInfo, EngineState, EngineStats, OutputKind, RankState
from lightvllm.engine.request_stream import RequestStream
from lightvllm.engine.structured import check_structured
from lightvllm.engine.tokenizer import Message, Tokenizer
from lightvllm.errors import ConfigError, RpcTimeout, Shutdown
from lightvllm.sampling_params import SamplingParams
from lightvllm.version import __version__

LONG_TEXT = 8192
"""Characters of a prompt that take about a millisecond to tokenize."""

HEALTH_TIMEOUT = 15.0
"""Seconds for ``check_health``; the executor itself gives its workers ten."""

_OWN_OPTIONS = {"engine_process": bool, "max_num_waiting": int, "shutdown_timeout": float}


class AsyncLLM:
    """Made by ``await AsyncLLM.create(…)``; ended by ``await shutdown()`` or by ``async with``.

    It belongs to the event loop that it was made in. One that is forgotten is ended by the collector, or at the
    interpreter's exit.
    """

    @classmethod
    async def create(
        cls,
        model: str | os.PathLike[str],
        *,
        engine_process: bool = True,
        max_num_waiting: int = 1024,
        shutdown_timeout: float = 10.0,
        progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Self:
        """Start the engine and its workers; returns when the first step can be run.

        When that fails or is cancelled, nothing is left behind. (A thread cannot be broken off: without
        ``engine_process``, a start that is cancelled goes on in the background until it can be ended.)

        Args:
            model: as of ``LLM``.
            engine_process: run the engine in a process of its own, so that nothing that this one does delays a step;
                otherwise in a thread.
            max_num_waiting: sequences that may wait beyond those that run; requests that come then are refused.
            shutdown_timeout: seconds that the engine gets to end by itself.
            progress: called in the event loop; told in a few words what start-up is waiting for.
            options: every other one of ``LLM``, by name.

        Raises:
            ConfigError: an option is unknown or cannot be met, the model cannot be used, an extra is not installed.
            PlacementError, WorkerDied, WorkerError, RpcTimeout, AuthError: the workers could not be started.
        """
        own = {"engine_process": engine_process, "max_num_waiting": max_num_waiting}
        for name, value in {**own, "shutdown_timeout": shutdown_timeout}.items():
            check_type(name, value, _OWN_OPTIONS[name])
        if max_num_waiting < 0:
            raise ConfigError(f"max_num_waiting={max_num_waiting}; use 0 or more")
        if not 0 < shutdown_timeout < float("inf"):
            raise ConfigError(f"shutdown_timeout={shutdown_timeout}; use a positive number of seconds")
        checked = Options.check(options, beside=(*_OWN_OPTIONS, "progress"))
        if checked.return_logits:
            raise ConfigError("return_logits=True: logits are only for LLM's on_step; leave it out, or use LLM")
        configured = await asyncio.to_thread(checked.configure, model)
        tokenizer = None
        if not checked.skip_tokenizer_init:
            tokenizer = await asyncio.to_thread(Tokenizer.from_dir, configured.path)
        made = cls(os.fspath(model), configured, tokenizer, max_num_waiting, shutdown_timeout, progress)
        await made._start(configured, engine_process)
        return made

    def __init__(
        self,
        model: str,
        configured: Configured,
        tokenizer: Tokenizer | None,
        max_num_waiting: int,
        shutdown_timeout: float,
        progress: Callable[[str], None] | None,
    ) -> None:
        """Not for users, who call ``create``."""
        config, path = configured.engine, configured.path
        self._info = EngineInfo(
            model=model,
            path=str(path),
            executor=configured.executor.name,
            config=config,
            version=__version__,
            can_generate=config.model.pooling is None,
            can_embed=config.model.pooling is not None,
            max_num_waiting=max_num_waiting,
        )
        self._tokenizer = tokenizer
        self._shutdown_timeout = shutdown_timeout
        self._progress = progress
        self._state: EngineState = "starting"
        self._failure: Failure | None = None
        self._ranks: list[RankState] = []
        self._stats = EngineStats()
        self._listeners: dict[object, Callable[[], None]] = {}
        self._streams: dict[int, RequestStream] = {}
        self._request_ids: set[str] = set()
        self._num_requests = 0
        self._admission = Admission(config.scheduler.max_num_seqs, max_num_waiting)
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._health: asyncio.Future[None] | None = None
        self._core: CoreHandle

    async def _start(self, configured: Configured, engine_process: bool) -> None:
        deliver = functools.partial(_deliver, weakref.ref(self))
        if engine_process:
            from lightvllm.engine.core_process import ProcessCore

            self._core = ProcessCore(configured, self._tokenizer is None, deliver, self._shutdown_timeout)
        else:
            make = functools.partial(_make_executor, configured)
            self._core = ThreadCore(configured.engine, self._tokenizer, make, deliver, self._shutdown_timeout)
        self._finalizer = weakref.finalize(self, self._core.abandon)  # also at the interpreter's exit
        try:
            await self._ready
        except BaseException:
            await self._core.close(self._shutdown_timeout)
            self._finalizer.detach()
            raise

    # ------------------------------------------------------------------------------------- what is known of it

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError("there is no tokenizer: skip_tokenizer_init=True; leave that out")
        return self._tokenizer

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def failure(self) -> str | None:
        return self._failure.message if self._failure is not None and self._state == "failed" else None

    @property
    def ranks(self) -> list[RankState]:
        return list(self._ranks)

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        key = object()
        self._listeners[key] = listener
        return lambda: self._listeners.pop(key, None) and None

    # ------------------------------------------------------------------------------------------------ requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        """See ``EngineClient.generate``. Nothing happens before the first ``anext``."""
        self._check_usable()
        arrival_time = time.monotonic()
        check_type("output_kind", output_kind, OutputKind)
        structured = getattr(sampling_params, "structured_outputs", None)
        if structured is not None:  # may take seconds; what was found is kept
            await asyncio.to_thread(check_structured, structured, self._info.config.model)
        params = self._intake.params(sampling_params)
        read = await self._read(prompt)
        number, stream = self._add(read, params, request_id, arrival_time, priority, timeout, output_kind)
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            self._drop(number)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_generation_prompt: bool = True,
        priority: int = 0,
        timeout: float | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation: ``generate`` after the model's chat template. Raises ConfigError at once if that
        refuses the messages."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        prompt: TokensPrompt = {"prompt": text, "prompt_token_ids": ids}
        return self.generate(
            prompt, sampling_params, request_id, priority=priority, timeout=timeout, output_kind=output_kind
        )

    async def embed(self, prompt: Prompt, request_id: str | None = None, *, priority: int = 0) -> EmbeddingOutput:
        """See ``EngineClient.embed``. Cancelling the task aborts the request."""
        self._check_usable()
        arrival_time = time.monotonic()
        self._intake.check_embeds()
        read = await self._read(prompt)
        number, stream = self._add(read, None, request_id, arrival_time, priority, None, "final")
        try:
            return EmbeddingOutput.of(await stream.next())
        finally:
            self._drop(number)

    async def check_health(self) -> None:
        """See ``EngineClient.check_health``. While steps run, the workers answer behind the one that is running."""
        self._check_usable()
        if self._health is None:
            self._health = self._loop.create_future()
            self._core.send(CheckHealth())
        try:
            await asyncio.wait_for(asyncio.shield(self._health), HEALTH_TIMEOUT)
        except TimeoutError:
            raise RpcTimeout(
                f"the engine did not answer within {HEALTH_TIMEOUT:g} s; it may be in a long step"
            ) from None

    async def shutdown(self) -> None:
        if self._state in ("starting", "ready"):
            self._end(Failure.of(Shutdown("the engine has been shut down")))
        await self._core.close(self._shutdown_timeout)
        self._finalizer.detach()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.shutdown()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure.error()

    async def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Its text, if that was given, and its tokens, checked. A long text is read in a thread, beside the loop."""
        if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
            return await asyncio.to_thread(self._intake.prompt, prompt)
        return self._intake.prompt(prompt)

    def _add(
        self,
        prompt: tuple[str | None, list[int]],
        params: SamplingParams | None,
        request_id: str | None,
        arrival_time: float,
        priority: int,
        timeout: float | None,
        output_kind: OutputKind,
    ) -> tuple[int, RequestStream]:
        """Check the rest of a request and send it on its way. ``params``: None for an embedding."""
        self._check_usable()
        check_type("request_id", request_id, str | None)
        check_priority(priority)
        check_timeout(timeout)
        num_seqs = 1 if params is None else params.n
        text, token_ids = prompt
        number = self._num_requests
        name = f"request-{number}" if request_id is None else request_id
        if name in self._request_ids:
            raise ConfigError(f"request_id={name!r} is in use; give each unfinished request its own")
        self._admission.admit(num_seqs, self._stats)
        self._num_requests += 1
        stream = RequestStream(name, text, token_ids, num_seqs, arrival_time, output_kind)
        self._streams[number] = stream
        self._request_ids.add(name)
        self._core.send(Add(number, token_ids, params, output_kind != "final", arrival_time, priority, timeout))
        return number, stream

    def _drop(self, number: int) -> None:
        """The request's reader has gone, or has read it all."""
        stream = self._streams.get(number)
        if stream is not None:
            self._forget(number, stream)
            self._core.send(Abort(number))

    def _forget(self, number: int, stream: RequestStream) -> None:
        del self._streams[number]
        self._request_ids.discard(stream.request_id)
        self._admission.left(stream.num_unfinished)

    # -------------------------------------------------------------------------------------------------- events

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Outputs():
                    self._take(event)
                case Progress():
                    if self._progress is not None:
                        self._progress(event.text)
                case Ready():
                    self._begin(event)
                case Health():
                    self._answer_health(event.failure)
                case Ended():
                    self._end(event.failure)
        self._changed()

    def _begin(self, event: Ready) -> None:
        if self._state != "starting":
            return
        self._state, self._ranks, self._stats = "ready", event.ranks, event.stats
        self._info = msgspec.structs.replace(self._info, start_seconds=event.start_seconds)
        self._intake = Intake(self._info.config, self._tokenizer, event.stats.num_kv_blocks)
        if not self._ready.done():
            self._ready.set_result(None)

    def _take(self, event: Outputs) -> None:
        streams, ended = self._streams, 0
        self._stats = event.stats
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

    def _end(self, failure: Failure) -> None:
        """No more steps: what waits fails at once."""
        if self._failure is not None:
            return
        self._failure, self._ranks = failure, ended_ranks(self._ranks, failure)
        self._state = "stopped" if failure.kind == "Shutdown" else "failed"
        for number, stream in list(self._streams.items()):
            self._forget(number, stream)
            stream.fail(failure.error())
        self._answer_health(failure)
        if not self._ready.done():
            self._ready.set_exception(failure.error())
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
            try:
                listener()
            except Exception as error:  # noqa: BLE001  a listener's defect must not cost the requests their outputs
                self._loop.call_exception_handler({"message": "a listener of AsyncLLM failed", "exception": error})


def _deliver(front: weakref.ref[AsyncLLM], events: list[Event]) -> None:
    """The core does not keep its front alive."""
    if (alive := front()) is not None:
        alive._deliver(events)


def _make_executor(configured: Configured, progress: Callable[[str], None]) -> Any:
    from lightvllm.executors.factory import make_executor

    return make_executor(configured.executor, configured.engine, progress)

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

from lightvllm.engine.core_messages import (
    Failure,
)
from lightvllm.engine.core_thread import ThreadCore
from lightvllm.engine.front import Front
from lightvllm.engine.intake import Intake, Prompt, TokensPrompt
from lightvllm.engine.options import Configured, Options, check_type
from lightvllm.engine.outputs import EmbeddingOutput, RequestOutput
from lightvllm.engine.protocol import EngineInfo, EngineState, EngineStats, OutputKind, RankState
from lightvllm.engine.structured import check_structured
from lightvllm.engine.tokenizer import Message, Tokenizer
from lightvllm.errors import ConfigError, Shutdown
from lightvllm.sampling_params import SamplingParams
from lightvllm.version import __version__

LONG_TEXT = 8192
"""Characters of a prompt that take about a millisecond to tokenize."""

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
        self._front = Front(config.scheduler.max_num_seqs, max_num_waiting, progress)

    async def _start(self, configured: Configured, engine_process: bool) -> None:
        front, timeout = self._front, self._shutdown_timeout
        if engine_process:
            from lightvllm.engine.core_process import ProcessCore

            front.core = ProcessCore(configured, self._tokenizer is None, front.deliver, timeout)
        else:
            make = functools.partial(_make_executor, configured)
            front.core = ThreadCore(configured.engine, self._tokenizer, make, front.deliver, timeout)
        self._finalizer = weakref.finalize(self, front.core.abandon)  # also at the interpreter's exit
        try:
            await front.ready
        except BaseException:
            await front.core.close(timeout)
            self._finalizer.detach()
            raise
        self._info = msgspec.structs.replace(self._info, start_seconds=front.start_seconds)
        self._intake = Intake(configured.engine, self._tokenizer, front.stats.num_kv_blocks)

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
        return self._front.state

    @property
    def failure(self) -> str | None:
        failure = self._front.failure
        return failure.message if failure is not None and self.state == "failed" else None

    @property
    def ranks(self) -> list[RankState]:
        return list(self._front.ranks)

    @property
    def stats(self) -> EngineStats:
        return self._front.stats

    def on_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        return self._front.on_change(listener)

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
        self._front.check_usable()
        arrival_time = time.monotonic()
        check_type("output_kind", output_kind, OutputKind)
        structured = getattr(sampling_params, "structured_outputs", None)
        if structured is not None:  # may take seconds; what was found is kept
            await asyncio.to_thread(check_structured, structured, self._info.config.model)
        params = self._intake.params(sampling_params)
        text, token_ids = await self._read(prompt)
        number, stream = self._front.add(
            text, token_ids, params, request_id, arrival_time, priority, timeout, output_kind
        )
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            self._front.drop(number)

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
        self._front.check_usable()
        arrival_time = time.monotonic()
        self._intake.check_embeds()
        text, token_ids = await self._read(prompt)
        number, stream = self._front.add(text, token_ids, None, request_id, arrival_time, priority, None, "final")
        try:
            return EmbeddingOutput.of(await stream.next())
        finally:
            self._front.drop(number)

    async def check_health(self) -> None:
        """See ``EngineClient.check_health``. While steps run, the workers answer behind the one that is running."""
        await self._front.check_health()

    async def shutdown(self) -> None:
        if self.state in ("starting", "ready"):
            self._front.end(Failure.of(Shutdown("the engine has been shut down")))
        await self._front.core.close(self._shutdown_timeout)
        self._finalizer.detach()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Its text, if that was given, and its tokens, checked. A long text is read in a thread, beside the loop."""
        if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
            return await asyncio.to_thread(self._intake.prompt, prompt)
        return self._intake.prompt(prompt)


def _make_executor(configured: Configured, progress: Callable[[str], None]) -> Any:
    from lightvllm.executors.factory import make_executor

    return make_executor(configured.executor, configured.engine, progress)

"""``LLMEngine``: schedule, run, postprocess.

It owns every request's state and drives an executor, of which it knows no more than ``StepExecutor``. Knows no
torch, no worker and no orchestrator. Not thread-safe: one thread calls it.

Up to ``executor.max_concurrent_batches`` steps are in flight. ``step`` fills the pipeline, then waits for the oldest
step and no other: what is scheduled when never depends on timing, so equal requests give equal batches.
"""

from __future__ import annotations

import operator
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

from lightvllm.config import EngineConfig
from lightvllm.engine import sequence
from lightvllm.engine.outputs import RequestOutput
from lightvllm.engine.request import Completion, Request
from lightvllm.engine.scheduler import ScheduledBatch, Scheduler
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError, LightvllmError, Shutdown
from lightvllm.messages import StepInput, StepOutput
from lightvllm.sampling_params import SamplingParams

MAX_TIMINGS = 65_536  # steps whose timing is kept; older ones are dropped


class TokensPrompt(TypedDict):
    """A prompt given as tokens; ``prompt`` is its text, for the output alone."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]


Prompt = str | Sequence[int] | TokensPrompt


class StepExecutor(Protocol):
    """What the engine needs of an executor."""

    @property
    def max_concurrent_batches(self) -> int: ...

    @property
    def num_kv_blocks(self) -> int: ...

    @property
    def step_timeout(self) -> float: ...

    def execute_model(self, scheduler_output: StepInput, non_block: bool = False) -> Any:
        """With ``non_block=True``: a Future of the StepOutput, whose ``result(timeout)`` raises lightvllm's errors."""

    def shutdown(self) -> None: ...


class StepTiming(NamedTuple):
    """One call of ``step``: ``seconds`` in all, ``model_seconds`` of them spent by the output rank."""

    step: int
    num_seqs: int
    num_tokens: int
    seconds: float
    model_seconds: float


OnStep = Callable[[StepInput, StepOutput, ScheduledBatch], None]


class LLMEngine:
    """The step loop over one executor.

    Args:
        config: what the executor was made with.
        executor: ready for its first step; the engine shuts it down.
        tokenizer: None if only token ids go in and out (then there is no text and there are no stop strings).
        on_step: called after each step, before its tokens are taken in; with ``config.return_logits`` it sees the
            logits.

    Attributes:
        timings: of the latest steps.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: StepExecutor,
        *,
        tokenizer: Tokenizer | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.config = config
        self.executor = executor
        self.tokenizer = tokenizer
        self.on_step = on_step
        self.scheduler = Scheduler(
            config.scheduler,
            num_blocks=executor.num_kv_blocks,
            block_size=config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            max_in_flight=executor.max_concurrent_batches,
        )
        self.timings: deque[StepTiming] = deque(maxlen=MAX_TIMINGS)
        # A token beyond the cache can still be sampled, but nothing after it: such a sequence ends there.
        self._max_len = min(config.model.max_model_len, self.scheduler.max_tokens + 1)
        self._requests: dict[str, Request] = {}
        self._completions: dict[int, Completion] = {}  # by seq_id, unfinished ones
        self._in_flight: deque[tuple[ScheduledBatch, Future[StepOutput]]] = deque()
        self._seeds = random.Random(config.seed)  # noqa: S311  not for secrets
        self._next_seq_id = 0
        self._failure: str | None = None
        self._closed = False

    def add_request(
        self, request_id: str, prompt: Prompt, sampling_params: SamplingParams | None = None, *, stream: bool = True
    ) -> None:
        """Queue a prompt: text, token ids, or a mapping with ``prompt_token_ids``.

        With ``stream=False``, ``step`` reports the request only when it is finished.
        Raises ConfigError for a prompt or parameters that cannot be run; nothing is queued then.
        """
        self._check_usable()
        params = SamplingParams() if sampling_params is None else sampling_params
        if request_id in self._requests:
            raise ConfigError(f"request_id={request_id!r} is in use; give each unfinished request its own")
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids)
        self._check_params(params)
        eos = () if params.ignore_eos else self.config.model.eos_token_ids
        completions = []
        for index in range(params.n):
            drawn = self._seeds.getrandbits(63)  # drawn for every sequence, so that one's seed moves no other's
            seq = sequence.Sequence(
                seq_id=self._next_seq_id,
                request_id=request_id,
                token_ids=token_ids.copy(),
                prompt_len=len(token_ids),
                seed=drawn if params.seed is None else (params.seed + index) % 2**63,
                sampling=params,
                stop_token_ids=frozenset((*eos, *(params.stop_token_ids or ()))),
            )
            self._next_seq_id += 1
            completions.append(Completion(index, seq, self.tokenizer))
            self._completions[seq.seq_id] = completions[-1]
            self.scheduler.add(seq)
        self._requests[request_id] = Request(request_id, text, completions, stream, time.monotonic())

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step; the outputs of the requests that got a token, in order of arrival in the batch.

        Returns an empty list when nothing is to be done, and may do so in a step that only computed prompts.

        Raises:
            WorkerDied, WorkerError, RpcTimeout: the step failed. The engine cannot go on; every later call says so.
            Shutdown: after ``shutdown``.
        """
        self._check_usable()
        started = time.perf_counter()
        try:
            while len(self._in_flight) < self.executor.max_concurrent_batches:
                batch = self.scheduler.schedule()
                if batch is None:
                    break
                self._in_flight.append((batch, self._execute(batch)))
            if not self._in_flight:
                return []
            batch, future = self._in_flight[0]
            output = future.result(self.executor.step_timeout)  # interrupted here, a later call waits again
            self._in_flight.popleft()
            if self.on_step is not None:
                self.on_step(batch.step_input, output, batch)
            outputs = self._postprocess(batch, output)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        seconds = time.perf_counter() - started
        self.timings.append(
            StepTiming(output.step, len(batch.sequences), batch.num_tokens, seconds, output.model_seconds)
        )
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request where it stands and return its last output; None if there is no such unfinished request.

        ``step`` does not report it again.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for completion in request.completions:
            if not completion.seq.is_finished:
                completion.finish("abort")
                self._finish(completion)
        request.metrics.finished_time = time.monotonic()
        return request.output()

    def shutdown(self) -> None:
        """End the executor; idempotent. Unfinished requests are dropped."""
        self._closed = True
        self._requests.clear()
        self.executor.shutdown()

    def _execute(self, batch: ScheduledBatch) -> Future[StepOutput]:
        now = time.monotonic()
        for new in batch.step_input.new:
            metrics = self._requests[self._completions[new.seq_id].seq.request_id].metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or now
        try:
            future: Future[StepOutput] = self.executor.execute_model(batch.step_input, non_block=True)
        except BaseException as error:  # an interrupt too: nobody knows how far the step has come
            self._failure = f"{type(error).__name__}: {error}"
            raise
        return future

    def _postprocess(self, batch: ScheduledBatch, output: StepOutput) -> list[RequestOutput]:
        expected = [seq.seq_id for seq in batch.sampled]
        if (output.step, output.seq_ids) != (batch.step_input.step, expected):
            raise LightvllmError(
                f"the executor answered step {output.step} for sequences {output.seq_ids}; expected step "
                f"{batch.step_input.step} for {expected}; do driver and workers run the same lightvllm?"
            )
        now = time.monotonic()
        changed: dict[str, Request] = {}
        for seq in self.scheduler.update(batch, output.token_ids):
            completion = self._completions[seq.seq_id]
            if completion.append(output.logprobs.get(seq.seq_id), self.config.model.eos_token_ids, self._max_len):
                self._finish(completion)
            request = changed[seq.request_id] = self._requests[seq.request_id]
            request.metrics.first_token_time = request.metrics.first_token_time or now
            request.metrics.last_token_time = now
        outputs = []
        for request in changed.values():
            finished = request.finished
            if finished:
                request.metrics.finished_time = now
                del self._requests[request.request_id]
            if finished or request.stream:
                outputs.append(request.output())
        return outputs

    def _finish(self, completion: Completion) -> None:
        self.scheduler.finish(completion.seq)
        del self._completions[completion.seq.seq_id]

    def _check_usable(self) -> None:
        if self._closed:
            raise Shutdown("the engine has been shut down; make a new one")
        if self._failure is not None:
            raise LightvllmError(f"the engine stopped after {self._failure}; make a new one")

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None = None
        ids: Any = prompt
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError("the prompt is text, but there is no tokenizer; give prompt_token_ids")
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" not in prompt:
                raise ConfigError(f"the prompt has the keys {sorted(prompt)}; expected prompt_token_ids")
            text, ids = prompt.get("prompt"), prompt["prompt_token_ids"]
        try:
            return text, [operator.index(i) for i in ids]
        except TypeError:
            raise ConfigError(f"the prompt is {ids!r:.80}; expected text or a list of token ids") from None

    def _check_prompt(self, token_ids: list[int]) -> None:
        model, longest = self.config.model, self.scheduler.max_tokens
        if not token_ids:
            raise ConfigError("the prompt is empty; give at least one token")
        wrong = next((i for i in (min(token_ids), max(token_ids)) if not 0 <= i < model.vocab_size), None)
        if wrong is not None:
            raise ConfigError(f"token id {wrong} is not in the vocabulary; use 0 to {model.vocab_size - 1}")
        if len(token_ids) >= model.max_model_len:
            raise ConfigError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len={model.max_model_len} must hold it and at "
                f"least one more; shorten it to {model.max_model_len - 1} or raise max_model_len"
            )
        if len(token_ids) > longest:
            raise ConfigError(
                f"the prompt has {len(token_ids)} tokens, but the whole KV cache holds {longest} "
                f"(num_kv_blocks={self.scheduler.blocks.num_blocks} × block_size={self.scheduler.block_size}); "
                "shorten it or raise num_kv_blocks"
            )

    def _check_params(self, params: Any) -> None:
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"sampling_params is {params!r:.80}; expected SamplingParams")
        vocab_size = self.config.model.vocab_size
        if wrong := [i for i in params.stop_token_ids or () if not 0 <= i < vocab_size]:
            raise ConfigError(f"stop_token_ids={wrong} are not in the vocabulary; use 0 to {vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ConfigError(f"stop={params.stop!r} needs text, but there is no tokenizer; use stop_token_ids")

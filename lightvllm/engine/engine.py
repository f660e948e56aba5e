"""``LLMEngine``: schedule, run, postprocess.

It owns every request's state and drives an executor, of which it knows no more than ``StepExecutor``. Knows no
torch, no worker and no orchestrator. Not thread-safe: one thread calls it.

Up to ``executor.max_concurrent_batches`` steps are in flight; with asynchronous scheduling two, the second of which is
planned before the tokens of the first are known. ``step`` fills the pipeline, then waits for the oldest step and no
other: what is scheduled when never depends on timing (but for requests that bring a time-out), so equal requests give
equal batches.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

from lightvllm.config import EngineConfig
from lightvllm.engine import sequence
from lightvllm.engine.deadlines import Deadlines
from lightvllm.engine.intake import Intake, Prompt, TokensPrompt, check_priority, check_stream, check_timeout
from lightvllm.engine.outputs import RequestOutput
from lightvllm.engine.request import Completion, Request, Stream
from lightvllm.engine.scheduler import ScheduledBatch, Scheduler
from lightvllm.engine.sequence import FinishReason
from lightvllm.engine.stats import EngineStats, StepClock
from lightvllm.engine.steps import MAX_TIMINGS, InFlight, OnStep, StepExecutor, StepTiming
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError, LightvllmError, Shutdown
from lightvllm.messages import StepOutput
from lightvllm.sampling_params import SamplingParams

__all__ = ["LLMEngine", "OnStep", "Prompt", "StepExecutor", "StepTiming", "TokensPrompt"]


class LLMEngine:
    """The step loop over one executor.

    Args:
        config: what the executor was made with.
        executor: ready for its first step; the engine shuts it down.
        tokenizer: None if only token ids go in and out (then there is no text and there are no stop strings).
        on_step: called after each step, before its tokens are taken in; with ``config.return_logits`` it sees the
            logits. Rows sampled for sequences that have ended meanwhile are left out.
        structured_checked: see ``Intake``.

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
        structured_checked: bool = False,
    ) -> None:
        self.config = config
        self.executor = executor
        self.tokenizer = tokenizer
        self.on_step = on_step
        depth = executor.max_concurrent_batches
        lookahead = config.async_scheduling and depth == 1
        self._depth = 2 if lookahead else depth
        self.scheduler = Scheduler(
            config.scheduler,
            num_blocks=executor.num_kv_blocks,
            block_size=config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching and config.model.reads_prefix_cache,
            max_in_flight=self._depth,
            lookahead=lookahead,
        )
        self.timings: deque[StepTiming] = deque(maxlen=MAX_TIMINGS)
        # A token beyond the cache can still be sampled, but nothing after it: such a sequence ends there.
        self._max_len = min(config.model.max_model_len, self.scheduler.max_tokens + 1)
        self._requests: dict[str, Request] = {}
        self._completions: dict[int, Completion] = {}  # by seq_id, unfinished ones
        self._in_flight: deque[InFlight] = deque()
        self._deadlines = Deadlines(self._is_due_then)
        self._ended: list[RequestOutput] = []  # by expiry, for the next ``step`` or ``expire`` to report
        self._intake = Intake(config, tokenizer, executor.num_kv_blocks, structured_checked=structured_checked)
        self._clock = StepClock()
        self._prompt_tokens = self._generation_tokens = self._step_tokens = 0
        self._seeds = random.Random(config.seed)  # noqa: S311  not for secrets
        self._next_seq_id = 0
        self._failure: str | None = None
        self._closed = False

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Stream = True,
        priority: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Queue a prompt: text, token ids, or a mapping with ``prompt_token_ids``.

        Args:
            stream: what ``step`` reports before the request is finished: all so far (True), only what is new since the
                output before (``"delta"``: text, token ids and log-probabilities, of those sequences that have
                changed; the finished output as well), or nothing (False).
            priority: lower goes first (vLLM's meaning), equal ones in order of arrival.
            timeout: seconds from now after which the request is ended where it stands, waiting or running, with the
                finish reason ``"timeout"``, which ``step`` or ``expire`` reports.

        Raises ConfigError for what cannot be run; nothing is queued then.
        """
        self._check_new(request_id, priority, timeout)
        check_stream(stream)
        params = self._intake.params(sampling_params)
        text, token_ids = self._intake.prompt(prompt)
        bad_words = self._intake.bad_words(params)
        max_len = self._max_len if params.max_tokens is None else len(token_ids) + params.max_tokens
        # A grammar allows the end-of-sequence token only where it may end, and must be able to.
        eos = () if params.ignore_eos and not params.structured_outputs else self.config.model.eos_token_ids
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
                bad_words=bad_words,
                max_len=min(max_len, self._max_len),
                priority=priority,
            )
            self._next_seq_id += 1
            completions.append(Completion(index, seq, self.tokenizer))
        self._queue(request_id, text, completions, stream, timeout)

    def add_embedding_request(
        self, request_id: str, prompt: Prompt, *, priority: int = 0, timeout: float | None = None
    ) -> None:
        """Queue a prompt whose embedding ``step`` reports: a finished output with ``RequestOutput.embedding``.

        Arguments and errors are those of ``add_request``, which such a model refuses.
        """
        self._check_new(request_id, priority, timeout)
        self._intake.check_embeds()
        text, token_ids = self._intake.prompt(prompt)
        seq = sequence.Sequence(
            seq_id=self._next_seq_id,
            request_id=request_id,
            token_ids=token_ids,
            prompt_len=len(token_ids),
            seed=0,
            sampling=SamplingParams(max_tokens=1),
            max_len=len(token_ids) + 1,
            priority=priority,
        )
        self._next_seq_id += 1
        self._queue(request_id, text, [Completion(0, seq, None)], False, timeout)

    def _check_new(self, request_id: str, priority: int, timeout: float | None) -> None:
        self._check_usable()
        if request_id in self._requests:
            raise ConfigError(f"request_id={request_id!r} is in use; give each unfinished request its own")
        check_priority(priority)
        check_timeout(timeout)

    def _queue(
        self, request_id: str, text: str | None, completions: list[Completion], stream: Stream, timeout: float | None
    ) -> None:
        for completion in completions:
            self._completions[completion.seq.seq_id] = completion
            self.scheduler.add(completion.seq)
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        self._requests[request_id] = Request(request_id, text, completions, stream, now, deadline)
        if deadline is not None:
            self._deadlines.add(deadline, request_id)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Run one step; the outputs of the requests that have expired, then of those that got a token, in order of
        arrival in the batch.

        Returns an empty list when nothing is to be done, and may do so in a step that only computed prompts.

        Raises:
            WorkerDied, WorkerError, RpcTimeout: the step failed. The engine cannot go on; every later call says so.
            Shutdown: after ``shutdown``.
        """
        self._check_usable()
        started = time.perf_counter()
        self._expire()
        try:
            self._fill()
            if self._in_flight:
                # Interrupted, a later call waits again.
                output = self._in_flight[0].future.result(self.executor.step_timeout)
                with self._wholly():
                    self._ended += self._finish_step(self._in_flight.popleft(), output, started)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        return self._take_ended()

    def expire(self) -> list[RequestOutput]:
        """End the requests that are past their time-out, as ``step`` does at its beginning; their last outputs.

        For a caller that does not step just now.
        """
        self._check_usable()
        self._expire()
        return self._take_ended()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request where it stands and return its last output; None if there is no such unfinished request.

        ``step`` does not report it again.
        """
        request = self._requests.get(request_id)
        return None if request is None else self._end(request, "abort")

    def stats(self) -> EngineStats:
        """Where the engine stands now; costs next to nothing."""
        scheduler, clock = self.scheduler, self._clock
        total, free = scheduler.blocks.num_blocks, scheduler.blocks.num_free
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=1 - free / total,
            num_kv_blocks=total,
            num_free_kv_blocks=free,
            total_prefix_cache_queries=scheduler.num_queried_tokens,
            total_prefix_cache_hits=scheduler.num_cached_tokens,
            total_preemptions=scheduler.num_preemptions,
            total_prompt_tokens=self._prompt_tokens,
            total_generation_tokens=self._generation_tokens,
            total_steps=clock.steps,
            total_step_seconds=clock.step_seconds,
            total_model_seconds=clock.model_seconds,
            total_executor_seconds=clock.executor_seconds,
            step_tokens=self._step_tokens,
        )

    def shutdown(self) -> None:
        """End the executor; idempotent. Unfinished requests are dropped."""
        self._closed = True
        self._requests.clear()
        self.executor.shutdown()

    def _fill(self) -> None:
        """Plan and send steps until as many are in flight as there may be, or nothing more can be planned."""
        while len(self._in_flight) < self._depth:
            planned = time.perf_counter()
            with self._wholly():
                batch = self.scheduler.schedule()
                if batch is None:
                    break
                now = time.monotonic()
                for new in batch.step_input.new:
                    metrics = self._requests[self._completions[new.seq_id].seq.request_id].metrics
                    metrics.first_scheduled_time = metrics.first_scheduled_time or now
                sent = time.perf_counter()
                future: Future[StepOutput] = self.executor.execute_model(batch.step_input, non_block=True)
                self._in_flight.append(InFlight(batch, future, planned, sent))

    @contextlib.contextmanager
    def _wholly(self) -> Iterator[None]:
        """What is broken off in here, be it by an interrupt, leaves nobody knowing how far it has come."""
        try:
            yield
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def _finish_step(self, step: InFlight, output: StepOutput, started: float) -> list[RequestOutput]:
        """Take in a step's result, and account for it; ``started`` is when the call of ``step`` was made."""
        replied, batch = time.perf_counter(), step.batch
        step.check(output)
        if self.on_step is not None:
            step.tell(self.on_step, output)
        outputs = self._postprocess(batch, output)
        ended = time.perf_counter()
        self._clock.add(step.planned, step.sent, replied, ended, output.model_seconds)
        self._prompt_tokens += batch.num_prompt_tokens
        self._step_tokens = batch.num_tokens
        self.timings.append(
            StepTiming(output.step, len(batch.sequences), batch.num_tokens, ended - started, output.model_seconds)
        )
        return outputs

    def _postprocess(self, batch: ScheduledBatch, output: StepOutput) -> list[RequestOutput]:
        now = time.monotonic()
        changed: dict[str, Request] = {}
        for seq_id, found in output.prompt_logprobs.items():
            if seq_id in self._completions:
                self._completions[seq_id].take_prompt_logprobs(found)
        alive = self.scheduler.update(batch, output.token_ids)
        embeddings: dict[int, list[float]] = {}
        if output.embeddings is not None:
            embeddings = dict(zip(output.seq_ids, output.embeddings.numpy().tolist(), strict=True))
        self._generation_tokens += sum(not (s.seq_id in output.errors or s.seq_id in embeddings) for s in alive)
        eos_token_ids, logprobs = self.config.model.eos_token_ids, output.logprobs
        for seq in alive:
            completion = self._completions[seq.seq_id]
            error = output.errors.get(seq.seq_id)
            if error is not None:
                completion.fail(error)
            elif seq.seq_id in embeddings:
                completion.embed(embeddings[seq.seq_id])
            else:
                completion.append(logprobs.get(seq.seq_id), eos_token_ids)
            if seq.finish_reason is not None:
                self._finish(completion)
            request = changed[seq.request_id] = self._requests[seq.request_id]
            metrics = request.metrics
            metrics.last_token_time = now
            if metrics.first_token_time is None:
                metrics.first_token_time = now
        outputs = []
        for request in changed.values():
            finished = request.finished
            if finished:
                request.metrics.finished_time = now
                del self._requests[request.request_id]
            if finished or request.stream:
                outputs.append(request.output())
        return outputs

    def _expire(self) -> None:
        for request_id in self._deadlines.pop_due(time.monotonic()):
            self._ended.append(self._end(self._requests[request_id], "timeout"))

    def _is_due_then(self, deadline: float, request_id: str) -> bool:
        """Whether this is the deadline of a request that is unfinished."""
        request = self._requests.get(request_id)
        return request is not None and request.deadline == deadline

    def _take_ended(self) -> list[RequestOutput]:
        outputs, self._ended = self._ended, []
        return outputs

    def _end(self, request: Request, reason: FinishReason) -> RequestOutput:
        del self._requests[request.request_id]
        for completion in request.completions:
            if not completion.seq.is_finished:
                completion.finish(reason)
                self._finish(completion)
        request.metrics.finished_time = time.monotonic()
        return request.output()

    def _finish(self, completion: Completion) -> None:
        self.scheduler.finish(completion.seq)
        del self._completions[completion.seq.seq_id]

    def _check_usable(self) -> None:
        if self._closed:
            raise Shutdown("the engine has been shut down; make a new one")
        if self._failure is not None:
            raise LightvllmError(f"the engine stopped after {self._failure}; make a new one")

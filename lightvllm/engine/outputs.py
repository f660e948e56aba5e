"""What a caller gets: vLLM's ``RequestOutput`` and ``CompletionOutput``, with the same field names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightvllm.engine.sequence import FinishReason
from lightvllm.errors import LightvllmError


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token under the raw logits, its rank (1 is the most probable), and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of the prompt, as far as it has come; in a delta stream ``text``, ``token_ids`` and ``logprobs``
    hold what is new since the output before.

    Attributes:
        index: of the sequence in its request, 0 to ``n`` - 1.
        text: cumulative; while unfinished, without characters or stop strings that are not yet complete.
        token_ids: cumulative, a stop or end-of-sequence token included.
        cumulative_logprob: sum over all tokens so far; None unless ``SamplingParams.logprobs`` is set.
        logprobs: per token, by token id: the chosen one first, then the most probable ones.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"``, ``"timeout"``, ``"error"`` (no token could be chosen: a
            grammar beyond its limits, or masks that leave nothing), or None while unfinished.
        stop_reason: the stop string or stop token id that ended it, or what the error is; None for the
            end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, later: CompletionOutput) -> None:
        """Take in what a delta stream told next of this sequence."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += later.logprobs
        self.cumulative_logprob = later.cumulative_logprob
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


def merge(outputs: list[CompletionOutput], later: Iterable[CompletionOutput]) -> None:
    """Add the next outputs of the same delta stream to ``outputs``, each to the one of its index."""
    known = {output.index: output for output in outputs}
    for output in later:
        if output.index in known:
            known[output.index].add(output)
        else:
            outputs.append(output)


@dataclass(slots=True)
class RequestMetrics:
    """Times are seconds of ``time.monotonic()``; None for what has not happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    def snapshot(self, num_preemptions: int) -> RequestMetrics:
        """As it is now, with that count; much faster than ``dataclasses.replace``, and needed for every output."""
        return RequestMetrics(
            self.arrival_time,
            self.first_scheduled_time,
            self.first_token_time,
            self.last_token_time,
            self.finished_time,
            num_preemptions,
        )


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt and all its continuations; in a delta stream, those that have changed.

    Attributes:
        prompt: the text, or None if token ids were given.
        prompt_index: position of the prompt in the call of ``LLM`` that this belongs to.
        num_cached_tokens: prompt tokens of the first sequence found in the prefix cache; None before it is scheduled.
        prompt_logprobs: with ``SamplingParams.prompt_logprobs``, for each token of the prompt what ``logprobs`` is for
            the generated ones; None for the first, which nothing predicts. Only in the first output of a delta stream.
        embedding: of the prompt, if that was asked for; there is one output then, without tokens.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int | None = None
    prompt_index: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    embedding: list[float] | None = None

    def add(self, later: RequestOutput) -> None:
        """Take in the next output of the same delta stream, so that both become one (vLLM's ``RequestOutput.add``)."""
        merge(self.outputs, later.outputs)
        self.finished, self.metrics = later.finished, later.metrics
        self.num_cached_tokens = later.num_cached_tokens
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt as a vector of ``hidden_size`` numbers."""

    request_id: str
    prompt_token_ids: list[int]
    embedding: list[float]
    num_cached_tokens: int | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> EmbeddingOutput:
        """A finished output of an embedding request. Raises LightvllmError if it ended otherwise."""
        if output.embedding is None:
            raise LightvllmError(f"embedding {output.request_id} ended with {output.outputs[0].finish_reason}")
        return cls(output.request_id, output.prompt_token_ids, output.embedding, output.num_cached_tokens)

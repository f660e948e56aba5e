"""One request: a prompt and its ``n`` sequences, with their text and the rules that end them (vLLM's)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lightvllm.engine.detokenizer import Detokenizer
from lightvllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from lightvllm.engine.sequence import FinishReason, Sequence
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.messages import TokenLogprobs


class Completion:
    """A sequence and the text that it has become. Without a tokenizer the text stays empty."""

    def __init__(self, index: int, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.seq = seq
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, seq.sampling) if tokenizer else None
        self._logprobs: list[dict[int, Logprob]] | None = None if seq.sampling.logprobs is None else []
        self._cumulative_logprob = 0.0

    def append(self, logprobs: TokenLogprobs | None, eos_token_ids: Collection[int], max_len: int) -> bool:
        """Account for the token that the sequence has just got; True if it ends the sequence.

        In this order: a stop token or end-of-sequence token (not before ``min_tokens``), ``max_tokens`` or ``max_len``
        tokens in all, prompt included; and over those, a stop string in the text.
        """
        seq, sampling = self.seq, self.seq.sampling
        token_id = seq.token_ids[-1]
        num_output = seq.num_output_tokens
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(self._describe(token_id, logprobs))
            self._cumulative_logprob += logprobs.logprob
        if token_id in seq.stop_token_ids and num_output >= sampling.min_tokens:
            seq.finish_reason = "stop"
            seq.stop_reason = None if token_id in eos_token_ids and not sampling.ignore_eos else token_id
        elif num_output == sampling.max_tokens or len(seq.token_ids) >= max_len:
            seq.finish_reason = "length"
        if self._detokenizer is not None:
            stop = None
            if seq.finish_reason != "stop" or sampling.include_stop_str_in_output:
                stop = self._detokenizer.append(token_id)
            if stop is None and seq.finish_reason is not None:
                stop = self._detokenizer.flush()
            if stop is not None:
                seq.finish_reason, seq.stop_reason = "stop", stop
        return seq.finish_reason is not None

    def finish(self, reason: FinishReason) -> None:
        """End it from outside; the text that was held back becomes final."""
        self.seq.finish_reason = reason
        if self._detokenizer is not None:
            self._detokenizer.flush()

    def output(self) -> CompletionOutput:
        seq = self.seq
        return CompletionOutput(
            index=self.index,
            text=self._detokenizer.visible if self._detokenizer else "",
            token_ids=seq.output_token_ids,
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _describe(self, token_id: int, found: TokenLogprobs) -> dict[int, Logprob]:
        described = {token_id: Logprob(found.logprob, found.rank, self._text_of(token_id))}
        for rank, (top_id, logprob) in enumerate(zip(found.top_ids, found.top_logprobs, strict=True), 1):
            if top_id not in described:
                described[top_id] = Logprob(logprob, rank, self._text_of(top_id))
        return described

    def _text_of(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False) if self._tokenizer else ""


class Request:
    """``stream`` says whether unfinished outputs are wanted, too."""

    def __init__(
        self, request_id: str, prompt: str | None, completions: list[Completion], stream: bool, arrival_time: float
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.completions = completions
        self.stream = stream
        self.metrics = RequestMetrics(arrival_time)
        first = completions[0].seq
        self._prompt_token_ids = first.token_ids[: first.prompt_len]

    @property
    def finished(self) -> bool:
        return all(c.seq.finish_reason is not None for c in self.completions)

    def output(self) -> RequestOutput:
        """A snapshot; it does not change when the request goes on."""
        cached = self.completions[0].seq.num_cached_tokens
        preemptions = sum(c.seq.num_preemptions for c in self.completions)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[c.output() for c in self.completions],
            finished=self.finished,
            metrics=replace(self.metrics, num_preemptions=preemptions),
            num_cached_tokens=None if cached < 0 else cached,
        )

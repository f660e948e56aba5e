"""One request: a prompt and its ``n`` sequences, with their text and the rules that end them (vLLM's)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from lightvllm.engine.detokenizer import Detokenizer
from lightvllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from lightvllm.engine.sequence import FinishReason, Sequence
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import LightvllmError
from lightvllm.messages import TokenLogprobs

Stream = bool | Literal["delta"]


class Completion:
    """A sequence and the text that it has become. Without a tokenizer the text stays empty."""

    def __init__(self, index: int, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.seq = seq
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, seq.sampling) if tokenizer else None
        self._logprobs: list[dict[int, Logprob]] | None = None if seq.sampling.logprobs is None else []
        self._cumulative_logprob = 0.0
        # By token of the prompt; of the first sequence of a request alone, as they are the same for all.
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if seq.sampling.prompt_logprobs is not None and index == 0:
            self.prompt_logprobs = [None]
        else:
            seq.num_prompt_logprobs = seq.prompt_len
        self.embedding: list[float] | None = None
        self._changed = False
        self._reported_tokens = self._reported_chars = 0  # by ``delta``

    def append(self, logprobs: TokenLogprobs | None, eos_token_ids: Collection[int]) -> bool:
        """Account for the token that the sequence has just got; True if it ends the sequence.

        In this order: a stop token or end-of-sequence token (not before ``min_tokens``, unless a grammar wants the end
        there), ``Sequence.max_len`` tokens in all (which covers ``max_tokens``); and over those, a stop string in the
        text.
        """
        seq, sampling = self.seq, self.seq.sampling
        token_id = seq.token_ids[-1]
        self._changed = True
        if seq.num_prompt_logprobs != seq.prompt_len:
            raise self._wrong_prompt_logprobs(0)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(self._describe(token_id, logprobs))
            self._cumulative_logprob += logprobs.logprob
        structured = sampling.structured_outputs is not None
        if token_id in seq.stop_token_ids and (structured or seq.num_output_tokens >= sampling.min_tokens):
            seq.finish_reason = "stop"
            is_end = token_id in eos_token_ids and (structured or not sampling.ignore_eos)
            seq.stop_reason = None if is_end else token_id
        elif len(seq.token_ids) >= seq.max_len:
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

    def take_prompt_logprobs(self, found: list[TokenLogprobs]) -> None:
        """Those of the next tokens of the prompt, which have been computed."""
        seq, known = self.seq, self.prompt_logprobs
        if known is None or len(known) + len(found) > seq.prompt_len:
            raise self._wrong_prompt_logprobs(len(found))
        known += [self._describe(seq.token_ids[i], one) for i, one in enumerate(found, len(known))]
        seq.num_prompt_logprobs = len(known)

    def _wrong_prompt_logprobs(self, given: int) -> LightvllmError:
        seq = self.seq
        return LightvllmError(
            f"the executor gave {given} prompt_logprobs for sequence {seq.seq_id}, of which "
            f"{seq.prompt_len - seq.num_prompt_logprobs} were wanted; do driver and workers run the same lightvllm?"
        )

    def fail(self, error: str) -> None:
        """End it, because the workers could choose no token: the one that it got means nothing, and is taken back."""
        self.seq.token_ids.pop()
        self.seq.stop_reason = error
        self.finish("error")

    def embed(self, vector: list[float]) -> None:
        """End it with what was asked for: its prompt's embedding, in the place of a token."""
        self.seq.token_ids.pop()
        self.embedding = vector
        self.finish("stop")

    def finish(self, reason: FinishReason) -> None:
        """End it from outside; the text that was held back becomes final."""
        self.seq.finish_reason = reason
        self._changed = True
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

    def delta(self) -> CompletionOutput | None:
        """What is new since the last call; None if it got no token and did not end since then.

        Costs what is new, not what there is; after it, ``output`` has only the log-probabilities that are new.
        """
        if not self._changed:
            return None
        self._changed = False
        seq, text, logprobs = self.seq, self._detokenizer.visible if self._detokenizer else "", self._logprobs
        new_text, self._reported_chars = text[self._reported_chars :], len(text)
        new_tokens = seq.token_ids[seq.prompt_len + self._reported_tokens :]
        self._reported_tokens += len(new_tokens)
        if logprobs is not None:
            self._logprobs = []
        return CompletionOutput(
            index=self.index,
            text=new_text,
            token_ids=new_tokens,
            cumulative_logprob=None if logprobs is None else self._cumulative_logprob,
            logprobs=logprobs,
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
        return self._tokenizer.token_text(token_id) if self._tokenizer else ""


class Request:
    """``stream`` says what is reported while it is unfinished: nothing, all so far, or (``"delta"``) what is new.

    Attributes:
        deadline: ``time.monotonic()`` at which it is ended; None for never.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        completions: list[Completion],
        stream: Stream,
        arrival_time: float,
        deadline: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.completions = completions
        self.stream = stream
        self.deadline = deadline
        self.metrics = RequestMetrics(arrival_time)
        self._told_prompt_logprobs = False
        first = completions[0].seq
        self._prompt_token_ids = first.token_ids[: first.prompt_len]

    @property
    def finished(self) -> bool:
        for completion in self.completions:  # noqa: SIM110  for every output: a generator takes four times as long
            if completion.seq.finish_reason is None:
                return False
        return True

    def output(self) -> RequestOutput:
        """A snapshot; it does not change when the request goes on. A delta stream's tells each thing once."""
        cached = self.completions[0].seq.num_cached_tokens
        outputs, preemptions = [], 0
        for completion in self.completions:
            preemptions += completion.seq.num_preemptions
            output = completion.delta() if self.stream == "delta" else completion.output()
            if output is not None:
                outputs.append(output)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            metrics=self.metrics.snapshot(preemptions),
            num_cached_tokens=None if cached < 0 else cached,
            prompt_logprobs=self._prompt_logprobs(),
            embedding=self.completions[0].embedding,
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """All of them, or None until they are complete; in a delta stream once."""
        first = self.completions[0]
        if first.seq.wants_prompt_logprobs or (self.stream == "delta" and self._told_prompt_logprobs):
            return None
        found = first.prompt_logprobs
        if self.stream == "delta":
            self._told_prompt_logprobs, first.prompt_logprobs = True, None  # they are large, and not needed any more
        return found

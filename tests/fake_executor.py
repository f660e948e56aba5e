"""An executor without a model: a worker that checks what the engine tells it, and computes tokens by a pure function.

``FakeExecutor`` stands where the real one stands. It holds what a worker holds (tokens, block tables, a KV cache of
slots) and plays each step as a worker would: it forgets, learns, writes the slots of the scheduled positions and then
reads the whole sequence's slots back. A slot holds a digest of all tokens up to its position, as keys and values
depend on them. So a block shared wrongly, reused too early or never computed fails the step that reads it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec

from lightvllm.errors import Shutdown
from lightvllm.messages import SAMPLED_LAST, NewSequence, StepInput, StepOutput, TokenLogprobs

NextToken = Callable[[Sequence[int], int], int]
"""``(all tokens so far, seed) -> the next one``."""


def scrambled(vocab_size: int) -> NextToken:
    """A token that depends on every token before it and on the seed."""

    def next_token(token_ids: Sequence[int], seed: int) -> int:
        return zlib.crc32(repr((list(token_ids), seed)).encode()) % vocab_size

    return next_token


def scripted(text_ids: Sequence[int], prompt_len: int) -> NextToken:
    """The given tokens one after the other, behind a prompt of ``prompt_len`` tokens; then token 0."""

    def next_token(token_ids: Sequence[int], seed: int) -> int:
        position = len(token_ids) - prompt_len
        return text_ids[position] if position < len(text_ids) else 0

    return next_token


def chain(token_ids: Sequence[int]) -> list[bytes]:
    """For each position, a digest of the tokens up to it."""
    digests, digest = [], b""
    for token_id in token_ids:
        digest = hashlib.sha1(digest + token_id.to_bytes(4, "little")).digest()
        digests.append(digest)
    return digests


@dataclass
class WorkerSequence:
    """A worker's copy of a sequence. ``sampled_last`` is a token that the driver has not said anything of yet."""

    new: NewSequence
    token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    sampled_last: int | None = None
    num_prompt_logprobs: int = 1


class FakeExecutor:
    """See the module's docstring.

    Args:
        next_token: the "model".
        num_kv_blocks, block_size: of its cache.
        max_concurrent_batches: steps that the engine may have in flight.
        max_num_seqs, max_num_batched_tokens: limits that a step is checked against, if given.
        vocab_size: only for the log-probabilities it makes up.
        lookahead: a sequence may be in two steps in flight; None allows it where ``max_concurrent_batches`` is 1. A
            token that the driver cannot know yet must be named by ``SAMPLED_LAST``, and one that it can know must not.

    Attributes:
        steps: every StepInput seen.
        sequences: what the worker knows now, by seq_id.
        fail_at: step number -> exception that it, and every later one, fails with.
    """

    def __init__(
        self,
        next_token: NextToken,
        *,
        num_kv_blocks: int = 64,
        block_size: int = 4,
        max_concurrent_batches: int = 1,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        vocab_size: int = 256,
        lookahead: bool | None = None,
    ) -> None:
        self.next_token = next_token
        self.num_kv_blocks = num_kv_blocks
        self.block_size = block_size
        self.max_concurrent_batches = max_concurrent_batches
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.vocab_size = vocab_size
        self.lookahead = max_concurrent_batches == 1 if lookahead is None else lookahead
        self.step_timeout = 10.0
        self.steps: list[StepInput] = []
        self.sequences: dict[int, WorkerSequence] = {}
        self.fail_at: dict[int, Exception] = {}
        self.num_shutdowns = 0
        self._slots: dict[int, bytes] = {}
        self._unanswered: Counter[int] = Counter()  # steps whose result was not fetched yet, by sequence

    def execute_model(self, scheduler_output: StepInput, non_block: bool = False) -> Future[StepOutput]:
        """Executed at once, as its place in the order is all that matters; the message goes through its encoding."""
        assert non_block, "the engine always asks for a future"
        for row in scheduler_output.scheduled:
            pending = bool(self._unanswered[row.seq_id]) and self.sequences[row.seq_id].sampled_last is not None
            assert row.new_token_ids.count(SAMPLED_LAST) == pending, "what the driver can know, and no more, it says"
        future: Future[StepOutput] = _Answer(self, [row.seq_id for row in scheduler_output.scheduled])
        if self.num_shutdowns:
            raise Shutdown("the executor has been shut down")
        step_input = msgspec.msgpack.decode(msgspec.msgpack.encode(scheduler_output), type=StepInput)
        self.steps.append(step_input)
        failure = next((error for step, error in self.fail_at.items() if step <= step_input.step), None)
        if failure is not None:
            future.set_exception(failure)
        else:
            future.set_result(self._run(step_input))
        return future

    def shutdown(self) -> None:
        self.num_shutdowns += 1

    def _run(self, step: StepInput) -> StepOutput:
        assert step.step == len(self.steps), "steps are numbered from 1, without gaps"
        assert step.scheduled, "an empty step is not worth a message"
        for seq_id in step.finished:
            del self.sequences[seq_id]  # KeyError: told to forget what it does not know
        for new in step.new:
            assert new.seq_id not in self.sequences, f"sequence {new.seq_id} is known already"
            self.sequences[new.seq_id] = WorkerSequence(
                new, list(new.token_ids), num_prompt_logprobs=new.num_prompt_logprobs
            )
        scheduled = [row.seq_id for row in step.scheduled]
        assert len(set(scheduled)) == len(scheduled)
        assert {new.seq_id for new in step.new} <= set(scheduled)
        if self.max_num_seqs is not None:
            assert len(scheduled) <= self.max_num_seqs
            assert len(self.sequences) <= self.max_num_seqs
        if self.max_num_batched_tokens is not None:
            assert sum(row.count for row in step.scheduled) <= self.max_num_batched_tokens

        chains: dict[int, list[bytes]] = {}
        for row in step.scheduled:
            seq = self.sequences[row.seq_id]
            if row.new_token_ids:
                assert len(row.new_token_ids) == 1, "of a sequence that is known, only the token sampled last is new"
                assert row.new_token_ids[0] in (SAMPLED_LAST, seq.sampled_last)
                assert seq.sampled_last is not None
                seq.token_ids.append(seq.sampled_last)
                seq.sampled_last = None
            assert seq.sampled_last is None, "a row that takes no notice of the token sampled before"
            seq.block_table += row.new_block_ids
            assert row.count >= 1
            assert row.start + row.count <= len(seq.token_ids)
            assert row.start + row.count <= len(seq.block_table) * self.block_size
            chains[row.seq_id] = chain(seq.token_ids)
            for position in range(row.start, row.start + row.count):
                self._slots[self._slot(seq, position)] = chains[row.seq_id][position]
        seq_ids, token_ids, logprobs, prompt_logprobs = [], [], {}, {}
        for row in step.scheduled:
            seq = self.sequences[row.seq_id]
            end = row.start + row.count
            held = [self._slots.get(self._slot(seq, position)) for position in range(end)]
            assert held == chains[row.seq_id][:end], f"the cache of sequence {row.seq_id} holds another's keys"
            wanted = seq.new.sampling.prompt_logprobs
            scored = range(max(row.start + 1, seq.num_prompt_logprobs), min(end + 1, seq.new.prompt_len))
            if wanted is not None and scored:
                assert scored.start == seq.num_prompt_logprobs, "a token of the prompt was left out"
                seq.num_prompt_logprobs = scored.stop
                prompt_logprobs[row.seq_id] = [self._logprobs(seq.token_ids[i], wanted) for i in scored]
            if end == len(seq.token_ids):
                token_id = seq.sampled_last = self.next_token(seq.token_ids, seq.new.seed)
                seq_ids.append(row.seq_id)
                token_ids.append(token_id)
                if seq.new.sampling.logprobs is not None:
                    logprobs[row.seq_id] = self._logprobs(token_id, seq.new.sampling.logprobs)
        return StepOutput(
            step=step.step,
            seq_ids=seq_ids,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            model_seconds=1e-6,
        )

    def _slot(self, seq: WorkerSequence, position: int) -> int:
        block = seq.block_table[position // self.block_size]
        assert 0 <= block < self.num_kv_blocks
        return block * self.block_size + position % self.block_size

    def _logprobs(self, token_id: int, count: int) -> TokenLogprobs:
        top = [(token_id + i) % self.vocab_size for i in range(count)]
        return TokenLogprobs(-0.5, 1, top, [-0.5 - i for i in range(count)])


class _Answer(Future[StepOutput]):
    """Notes that a sequence is in flight until its step's result is fetched."""

    def __init__(self, executor: FakeExecutor, seq_ids: list[int]) -> None:
        super().__init__()
        executor._unanswered.update(seq_ids)
        most = 2 if executor.lookahead else 1
        assert all(executor._unanswered[seq_id] <= most for seq_id in seq_ids), "scheduled while it was in flight"
        self._executor, self._seq_ids = executor, seq_ids

    def result(self, timeout: float | None = None) -> StepOutput:
        assert timeout is not None, "whatever waits has a time-out"
        self._executor._unanswered.subtract(self._seq_ids)
        return super().result(timeout)

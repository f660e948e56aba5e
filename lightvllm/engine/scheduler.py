"""Which tokens are computed in the next step: continuous batching, by priority, then first come, first served.

Pure: it knows no model, no executor and no time, and the same calls in the same order give the same batches.

* **One kind of work.** A sequence has tokens, and keys and values for the first ``num_computed_tokens`` of them.
  A step computes the next ones: the rest of a prompt or as much of it as the token budget allows (chunked prefill),
  or the one token sampled last (decode). A token is sampled when a sequence has caught up with itself.
* **Admission by memory.** A waiting sequence is admitted when blocks for all its tokens are free, and one more for
  each running sequence; so a prefill once begun never lacks blocks, and admitting does not preempt at once.
* **Prefixes.** Full blocks of equal beginnings are computed once and shared, but for a sequence whose prompt's
  log-probabilities are wanted: it looks nothing up.
* **Order.** Sequences are served by priority (lower first), equal ones by arrival. A waiting sequence never preempts
  a running one.
* **Preemption by recompute.** When a running sequence needs a block and none is free, the last one in the
  order gives up its blocks and waits again; its tokens stay, and are computed anew (or found in the prefix cache).

Several batches may be in flight. What makes that safe:

* Every worker executes the batches in the order in which they were scheduled. So blocks that a batch in flight
  still uses may be given to a *later* batch at once, and a prefix may be shared as soon as the batch that computes
  it is scheduled: whoever reads it comes later in the order. (Inside one batch, a layer writes the keys and values
  of all rows before any row attends to them.)
* A sequence in flight is not preempted until all its batches have been updated. It can be aborted; its tokens in
  flight are then dropped when they come.

With ``max_in_flight`` alone (the depth of a pipeline), a sequence in flight is not scheduled either, and a batch takes
at most its share of the sequences, so that the others can fill the other stages. With ``lookahead`` (asynchronous
scheduling) a sequence in flight is scheduled on:

* While the token that a batch in flight samples is *pending*, the sequence may be scheduled for that very token, by
  ``messages.SAMPLED_LAST`` in its place: the workers know it. At most one token is pending when a batch is planned.
* An end that can be foreseen (``Sequence.max_len``) is: no row is wasted behind it. One that depends on the token (end
  of sequence, stop token or string) is found late; the row in flight behind it is computed in vain and dropped, as
  after an abort.
* A block with a pending token in it is registered in the prefix cache when the token is known, not before.
* When nobody can be preempted, because all are in flight, a sequence without a block is left out of the batch, and
  with it those behind it, until a batch has been updated.

What the workers are told: a sequence is in ``StepInput.new`` exactly when they do not know it, and in
``StepInput.finished`` exactly once for each time that they knew it and shall no longer (finished or preempted).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from itertools import compress

from lightvllm.config import SchedulerConfig
from lightvllm.engine.block_manager import BlockManager
from lightvllm.engine.sequence import Sequence, SequenceStatus
from lightvllm.messages import SAMPLED_LAST, NewSequence, ScheduledSequence, StepInput


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step: the message to the workers, and the sequences that it speaks of.

    Attributes:
        step_input: what the workers get.
        sequences: in the order of ``step_input.scheduled``.
        sampled: those of them that get a token, in the same order.
        num_tokens: tokens computed in this step.
        num_prompt_tokens: those of them that are part of a prompt.
    """

    step_input: StepInput
    sequences: list[Sequence]
    sampled: list[Sequence]
    num_tokens: int
    num_prompt_tokens: int

    def only(self, wanted: ListOf[bool]) -> ScheduledBatch:
        """The same, as if only these of ``sampled`` had been."""
        return replace(self, sampled=list(compress(self.sampled, wanted)))


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order


def _remove(queue: list[Sequence], seq: Sequence) -> None:
    del queue[bisect_left(queue, seq.order, key=_order)]


class Scheduler:
    """See the module's docstring.

    Args:
        config: limits of one step; ``max_num_seqs`` also bounds the sequences that are running at a time.
        num_blocks: blocks of the KV cache.
        block_size: tokens per block.
        enable_prefix_caching: share full blocks of equal prefixes.
        max_in_flight: batches that may be scheduled before the first of them is updated.
        lookahead: sequences in flight are scheduled on; ``max_in_flight`` must be 2.

    Attributes:
        num_preemptions, num_queried_tokens, num_cached_tokens: so far; the latter two count the tokens of sequences
            admitted for the first time that were looked up in the prefix cache, and found.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        max_in_flight: int = 1,
        lookahead: bool = False,
    ) -> None:
        assert max_in_flight == 2 or not lookahead, "of each sequence, only the token sampled last can be named"
        self.config = config
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.max_in_flight = max_in_flight
        self.lookahead = lookahead
        self.blocks = BlockManager(num_blocks)
        self.waiting: list[Sequence] = []  # both in the sequences' order
        self.running: list[Sequence] = []
        self._forget: list[int] = []  # for the next StepInput.finished
        self._num_steps = 0
        self.num_preemptions = self.num_queried_tokens = self.num_cached_tokens = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence whose keys and values fit the cache, alone."""
        return self.blocks.num_blocks * self.block_size

    def add(self, seq: Sequence) -> None:
        """Queue a sequence of at most ``max_tokens`` tokens; the engine has refused longer ones."""
        assert seq.status is SequenceStatus.WAITING
        assert len(seq.token_ids) <= self.max_tokens
        insort(self.waiting, seq, key=_order)

    def schedule(self) -> ScheduledBatch | None:
        """The next batch, or None when nothing can be computed before a batch in flight is updated (or at all).

        Never None while a sequence is unfinished and nothing is in flight: the first running sequence may preempt
        all others, and alone it fits (the engine finishes a sequence that has grown beyond ``max_tokens``).
        """
        budget = self.config.max_num_batched_tokens
        num_prompt_tokens = 0
        unfinished = min(len(self.running) + len(self.waiting), self.config.max_num_seqs)
        max_rows = unfinished if self.lookahead else -(-unfinished // self.max_in_flight)
        new: list[NewSequence] = []
        rows: list[ScheduledSequence] = []
        sequences: list[Sequence] = []
        sampled: list[Sequence] = []

        def take(seq: Sequence) -> None:
            nonlocal budget, num_prompt_tokens
            start, known, length = seq.num_computed_tokens, len(seq.token_ids), seq.length
            count = min(length - start, budget)
            budget -= count
            if start < seq.prompt_len:
                num_prompt_tokens += min(start + count, seq.prompt_len) - start
            rows.append(
                ScheduledSequence(
                    seq.seq_id,
                    start,
                    count,
                    seq.token_ids[seq.num_sent_tokens :] + [SAMPLED_LAST] * (length - max(known, seq.num_sent_tokens)),
                    seq.block_table[seq.num_sent_blocks :],
                )
            )
            sequences.append(seq)
            if start + count == length:
                sampled.append(seq)
                seq.num_pending += 1
            seq.num_sent_tokens, seq.num_sent_blocks = length, len(seq.block_table)
            seq.num_computed_tokens = start + count
            seq.num_in_flight += 1
            self._register(seq)

        for seq in self.running.copy():
            if len(rows) == max_rows or not budget:
                break
            if seq.status is not SequenceStatus.RUNNING:  # preempted a moment ago
                continue
            if seq.num_in_flight and not (self.lookahead and seq.length < seq.max_len):
                continue
            if not self._grow(seq):
                break  # no block is free: nobody can be admitted below
            take(seq)

        while self.waiting and len(self.running) < self.config.max_num_seqs and len(rows) < max_rows and budget:
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            tokens = seq.token_ids.copy()
            new.append(
                NewSequence(
                    seq.seq_id,
                    tokens,
                    seq.prompt_len,
                    seq.seed,
                    seq.sampling,
                    sorted(seq.stop_token_ids),
                    seq.bad_words,
                    seq.num_prompt_logprobs,
                )
            )
            seq.num_sent_tokens = len(tokens)
            take(seq)

        if not rows:
            return None
        self._num_steps += 1
        step_input = StepInput(step=self._num_steps, finished=self._forget, new=new, scheduled=rows)
        self._forget = []
        num_tokens = self.config.max_num_batched_tokens - budget
        return ScheduledBatch(step_input, sequences, sampled, num_tokens, num_prompt_tokens)

    def update(self, batch: ScheduledBatch, token_ids: ListOf[int]) -> list[Sequence]:
        """Append the tokens sampled for ``batch.sampled``; batches are updated in the order they were scheduled in.

        Returns the sequences that got a token: all of ``batch.sampled`` but those that have ended meanwhile.
        """
        for seq in batch.sequences:
            seq.num_in_flight -= 1
        alive = []
        for seq, token_id in zip(batch.sampled, token_ids, strict=True):
            seq.num_pending -= 1
            if not seq.is_finished:
                seq.token_ids.append(token_id)
                if self.lookahead:  # the token may already be computed in a later batch, and fill a block
                    self._register(seq)
                alive.append(seq)
        return alive

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands; its blocks may be used by the next batch."""
        if seq.status is SequenceStatus.WAITING:
            _remove(self.waiting, seq)
        elif seq.status is SequenceStatus.RUNNING:
            self._evict(seq)
        seq.status = SequenceStatus.FINISHED

    def _admit(self, seq: Sequence) -> bool:
        """Move a waiting sequence to the running ones, with blocks for all its tokens, if they are free."""
        # At least the last token is computed again, for its logits: it is never taken from the cache.
        length, size = len(seq.token_ids), self.block_size
        look_up = self.enable_prefix_caching and not seq.wants_prompt_logprobs
        cached = self.blocks.match(seq.hashes((length - 1) // size, size)) if look_up else []
        missing = -(-length // size) - len(cached)
        if self.blocks.cost(cached, missing) + len(self.running) > self.blocks.num_free:
            return False
        seq.block_table = self.blocks.acquire(cached, missing)
        seq.num_computed_tokens = len(cached) * size
        seq.num_registered_blocks = len(cached)
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            self.num_queried_tokens += length if look_up else 0
            self.num_cached_tokens += seq.num_computed_tokens
        _remove(self.waiting, seq)
        insort(self.running, seq, key=_order)
        seq.status = SequenceStatus.RUNNING
        return True

    def _grow(self, seq: Sequence) -> bool:
        """See that a running sequence has blocks for all its tokens, preempting those behind it if it must.

        False if what is missing is held by sequences before it or in flight: it keeps what it has, and
        waits for them.
        """
        missing = -(-seq.length // self.block_size) - len(seq.block_table)
        if missing <= 0:
            return True
        while self.blocks.num_free < missing:
            last = next((s for s in reversed(self.running) if not s.num_in_flight), seq)
            if last.order <= seq.order:
                return False
            self._evict(last)
            last.num_preemptions += 1
            self.num_preemptions += 1
            last.status = SequenceStatus.WAITING
            insort(self.waiting, last, key=_order)
        seq.block_table += self.blocks.acquire((), missing)
        return True

    def _evict(self, seq: Sequence) -> None:
        """Take a running sequence's blocks away and have the workers forget it."""
        _remove(self.running, seq)
        self.blocks.release(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = seq.num_sent_tokens = seq.num_sent_blocks = seq.num_registered_blocks = 0
        self._forget.append(seq.seq_id)

    def _register(self, seq: Sequence) -> None:
        """Make the blocks findable whose tokens are all scheduled, and known."""
        first, end = seq.num_registered_blocks, min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if first < end and self.enable_prefix_caching:
            for index, digest in enumerate(seq.hashes(end, self.block_size)[first:], first):
                self.blocks.register(seq.block_table[index], digest)
            seq.num_registered_blocks = end

"""One sequence: its tokens, and where it stands with the scheduler and the workers.

Plain data. The scheduler alone changes ``status`` and everything below it; the engine sets the finish reason.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from lightvllm.engine.block_manager import hash_block
from lightvllm.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


class SequenceStatus(enum.Enum):
    WAITING = "waiting"  # not yet admitted, or preempted: holds no block, and the workers do not know it
    RUNNING = "running"  # holds blocks for all its tokens but, at times, the last; the workers know it
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation of a prompt.

    Attributes:
        seq_id: unique in the engine and ascending by arrival.
        request_id: of the request it belongs to.
        token_ids: prompt, then output; only ever appended to.
        prompt_len: how many of them are the prompt.
        seed: of its random numbers, always set.
        stop_token_ids: end-of-sequence and stop tokens that end it.
        max_len: tokens, prompt included, at which it ends at the latest.
        priority: lower goes first; equal ones in order of arrival.
        finish_reason: ``"stop"`` (end-of-sequence, stop token or stop string), ``"length"``, ``"abort"`` or
            ``"timeout"`` (the request's own time-out), or ``"error"`` (no token could be chosen).
        bad_words: token sequences that may not be completed.
        stop_reason: the stop token or stop string that ended it, or what the error is; None for the end-of-sequence
            token, as in vLLM.
        num_in_flight: batches that it is in and whose result has not been seen yet.
        num_pending: tokens that these will add: sampled, but not yet known here.
        num_computed_tokens: tokens whose keys and values are in the cache, those in flight included.
        num_sent_tokens, num_sent_blocks: how much of ``token_ids`` (pending ones included, by placeholder) and
            ``block_table`` the workers were told.
        num_registered_blocks: how many of its blocks the prefix cache has been told of, or has given.
        num_prompt_logprobs: prompt tokens that need no log-probabilities (any more): the first, which nothing predicts,
            those that have theirs, and all if none are wanted.
        num_cached_tokens: prompt tokens found in the prefix cache when it was first admitted; -1 before.
        block_hashes: hashes of its full blocks, as far as computed.
    """

    seq_id: int
    request_id: str
    token_ids: list[int]
    prompt_len: int
    seed: int
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    max_len: int = 2**63 - 1
    priority: int = 0
    bad_words: list[list[int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    num_in_flight: int = 0
    num_pending: int = 0
    num_computed_tokens: int = 0
    num_sent_tokens: int = 0
    num_sent_blocks: int = 0
    num_registered_blocks: int = 0
    num_prompt_logprobs: int = 1
    num_cached_tokens: int = -1
    num_preemptions: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        """Its place among all sequences: the lowest goes first, the highest is preempted first."""
        return self.priority, self.seq_id

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of its prompt must be computed for their log-probabilities, be it cached or not."""
        return self.sampling.prompt_logprobs is not None and self.num_prompt_logprobs < self.prompt_len

    @property
    def length(self) -> int:
        """Tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of its first ``num_blocks`` blocks, which must be full; each is computed once."""
        known = self.block_hashes
        while len(known) < num_blocks:
            start = len(known) * block_size
            parent = known[-1] if known else b""
            known.append(hash_block(parent, self.token_ids[start : start + block_size]))
        return known[:num_blocks]

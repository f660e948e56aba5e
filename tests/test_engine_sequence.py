"""A sequence's own arithmetic: its output, and the hashes of its full blocks."""

from __future__ import annotations

from lightvllm.engine.block_manager import hash_block
from lightvllm.engine.sequence import Sequence, SequenceStatus
from lightvllm.sampling_params import SamplingParams


def sequence(*token_ids: int) -> Sequence:
    return Sequence(0, "r", list(token_ids), prompt_len=3, seed=0, sampling=SamplingParams())


def test_what_follows_the_prompt_is_output() -> None:
    seq = sequence(1, 2, 3)
    assert (seq.num_output_tokens, seq.output_token_ids) == (0, [])
    seq.token_ids.append(4)
    assert (seq.num_output_tokens, seq.output_token_ids) == (1, [4])


def test_it_waits_at_first() -> None:
    assert sequence(1, 2, 3).status is SequenceStatus.WAITING
    assert not sequence(1, 2, 3).is_finished


def test_its_hashes_are_chained_and_stay_as_it_grows() -> None:
    seq = sequence(1, 2, 3, 4)
    first = hash_block(b"", [1, 2])
    assert seq.hashes(0, 2) == []
    assert seq.hashes(1, 2) == [first]
    assert seq.hashes(2, 2) == [first, hash_block(first, [3, 4])]
    seq.token_ids += [5, 6]
    assert seq.hashes(3, 2)[:2] == seq.hashes(2, 2)
    assert len(seq.block_hashes) == 3

"""The scheduler alone: what is in a batch, admission, preemption, prefix caching, several batches in flight.

The property tests play random arrivals, steps, results and aborts, and let ``fake_executor`` check, as a worker would
see it, that tokens and block tables can be reconstructed and that every position read holds the right keys.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListOf
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
import pytest
from fake_executor import FakeExecutor, scrambled
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvllm.config import SchedulerConfig
from lightvllm.engine.scheduler import ScheduledBatch, Scheduler
from lightvllm.engine.sequence import Sequence, SequenceStatus
from lightvllm.messages import SAMPLED_LAST, StepInput, StepOutput
from lightvllm.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)


def sequence(seq_id: int, token_ids: ListOf[int], priority: int = 0, max_len: int = 10_000) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        request_id=str(seq_id),
        token_ids=list(token_ids),
        prompt_len=len(token_ids),
        seed=seq_id,
        sampling=GREEDY,
        priority=priority,
        max_len=max_len,
    )


def scheduler(
    num_blocks: int = 16,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 32,
    caching: bool = True,
    max_in_flight: int = 1,
    lookahead: bool = False,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
        num_blocks=num_blocks,
        block_size=block_size,
        enable_prefix_caching=caching,
        max_in_flight=2 if lookahead else max_in_flight,
        lookahead=lookahead,
    )


def step(s: Scheduler, token_id: int = 7) -> ScheduledBatch:
    batch = s.schedule()
    assert batch is not None
    s.update(batch, [token_id] * len(batch.sampled))
    return batch


def rows(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    return [(row.seq_id, row.start, row.count) for row in batch.step_input.scheduled]


def test_a_prompt_then_its_tokens_one_by_one() -> None:
    s = scheduler()
    s.add(sequence(0, [1, 2, 3, 4]))
    first, second, third = step(s), step(s), step(s)
    assert rows(first) == [(0, 0, 4)]
    assert first.step_input.new[0].token_ids == [1, 2, 3, 4]
    assert (first.step_input.scheduled[0].new_token_ids, first.step_input.scheduled[0].new_block_ids) == ([], [0])
    assert rows(second) == [(0, 4, 1)]
    assert second.step_input.new == []
    assert (second.step_input.scheduled[0].new_token_ids, second.step_input.scheduled[0].new_block_ids) == ([7], [1])
    assert third.step_input.scheduled[0].new_block_ids == []
    assert [b.step_input.step for b in (first, second, third)] == [1, 2, 3]


def test_nothing_to_do_is_no_batch() -> None:
    assert scheduler().schedule() is None


def test_a_long_prompt_is_prefilled_in_chunks_and_sampled_once() -> None:
    s = scheduler(budget=8)
    s.add(sequence(0, range(1, 20)))
    batches = [step(s) for _ in range(4)]
    assert [rows(b) for b in batches] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 3)], [(0, 19, 1)]]
    assert [len(b.sampled) for b in batches] == [0, 0, 1, 1]
    assert all(b.num_tokens <= 8 for b in batches)


def test_decodes_and_a_chunk_share_the_budget() -> None:
    s = scheduler(budget=8)
    s.add(sequence(0, [1, 2]))
    step(s)
    s.add(sequence(1, range(10, 30)))
    assert rows(step(s)) == [(0, 2, 1), (1, 0, 7)]


def test_at_most_max_num_seqs_run() -> None:
    s = scheduler(max_num_seqs=2)
    for i in range(3):
        s.add(sequence(i, [i + 1]))
    assert [r[0] for r in rows(step(s))] == [0, 1]
    s.finish(s.running[0])
    batch = step(s)
    assert [r[0] for r in rows(batch)] == [1, 2]
    assert batch.step_input.finished == [0]


def test_admission_waits_for_memory_in_order_of_arrival() -> None:
    s = scheduler(num_blocks=4)
    s.add(sequence(0, range(1, 9)))  # 2 blocks
    s.add(sequence(1, range(11, 20)))  # 3 blocks
    s.add(sequence(2, [21]))  # would fit, but is not its turn
    assert [r[0] for r in rows(step(s))] == [0]
    s.finish(s.running[0])
    assert [r[0] for r in rows(step(s))] == [1]


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    s = scheduler(num_blocks=4)
    s.add(sequence(0, range(1, 9)))
    step(s)
    s.add(sequence(1, range(11, 16)))
    assert [r[0] for r in rows(step(s))] == [0], "two blocks are wanted and two free, but the running one may need one"
    s.waiting.clear()
    s.finish(s.running[0])
    s.add(sequence(2, range(21, 29)))
    s.add(sequence(3, range(31, 34)))
    assert [r[0] for r in rows(step(s))] == [2, 3]


def test_the_latest_arrival_is_preempted_and_computed_again() -> None:
    s = scheduler(num_blocks=4, caching=False)
    first, second = sequence(0, [1, 2, 3, 4]), sequence(1, [5])
    s.add(first)
    s.add(second)
    step(s)
    while not second.num_preemptions:
        assert second.status is SequenceStatus.RUNNING
        batch = step(s)
    assert rows(batch) == [(0, len(first.token_ids) - 2, 1)]
    assert batch.step_input.finished == [1], "the workers forget it, exactly once"
    tokens = second.token_ids.copy()
    s.finish(first)
    again = step(s)
    assert again.step_input.finished == [0]
    assert (again.step_input.new[0].token_ids, again.step_input.new[0].prompt_len) == (tokens, 1)
    assert rows(again) == [(1, 0, len(tokens))]


def test_a_sequence_that_fills_the_cache_alone_still_runs() -> None:
    s = scheduler(num_blocks=2)
    seq = sequence(0, [1, 2, 3])
    s.add(seq)
    while len(seq.token_ids) <= s.max_tokens:
        step(s)
    assert len(seq.token_ids) == 9
    assert s.blocks.num_free == 0


def test_a_known_prefix_is_not_computed_again_but_for_the_last_token() -> None:
    s = scheduler()
    prompt = list(range(1, 13))  # three full blocks
    first = sequence(0, prompt)
    s.add(first)
    step(s)
    s.finish(first)
    again, longer = sequence(1, prompt), sequence(2, [*prompt, 13])
    s.add(again)
    s.add(longer)
    assert rows(step(s)) == [(1, 8, 4), (2, 12, 1)]
    assert (first.num_cached_tokens, again.num_cached_tokens, longer.num_cached_tokens) == (0, 8, 12)


def test_a_prefix_is_shared_within_one_batch() -> None:
    s = scheduler()
    for i in range(3):
        s.add(sequence(i, [1, 2, 3, 4, 5]))
    assert rows(step(s)) == [(0, 0, 5), (1, 4, 1), (2, 4, 1)]
    assert len({seq.block_table[0] for seq in s.running}) == 1
    assert len({seq.block_table[1] for seq in s.running}) == 3


def test_without_prefix_caching_everything_is_computed() -> None:
    s = scheduler(caching=False)
    for i in range(2):
        s.add(sequence(i, [1, 2, 3, 4, 5]))
    assert rows(step(s)) == [(0, 0, 5), (1, 0, 5)]


def test_an_evicted_prefix_is_computed_again() -> None:
    s = scheduler(num_blocks=3)
    for i, prompt in enumerate([range(1, 9), range(11, 23), range(1, 9)]):
        seq = sequence(i, prompt)
        s.add(seq)
        assert rows(step(s)) == [(i, 0, len(prompt))]
        s.finish(seq)


def test_a_sequence_in_flight_is_left_alone_and_batches_share_the_sequences() -> None:
    s = scheduler(max_in_flight=2)
    for i in range(4):
        s.add(sequence(i, [i + 1]))
    first, second = s.schedule(), s.schedule()
    assert first is not None
    assert second is not None
    assert [[r[0] for r in rows(b)] for b in (first, second)] == [[0, 1], [2, 3]]
    assert s.schedule() is None
    s.update(first, [7, 7])
    third = s.schedule()
    assert third is not None
    assert [r[0] for r in rows(third)] == [0, 1]


def test_a_sequence_in_flight_is_not_preempted_but_waited_for() -> None:
    s = scheduler(num_blocks=8, max_num_seqs=2, budget=4, max_in_flight=2, caching=False)
    old, young = sequence(0, [1, 2, 3, 4]), sequence(1, range(11, 35))  # 1 and 6 blocks; one is left
    s.add(old)
    s.add(young)
    in_flight = deque([s.schedule(), s.schedule()])
    while True:
        done = in_flight.popleft()
        assert done is not None
        s.update(done, [7] * len(done.sampled))
        batch = s.schedule()
        if batch is None:
            break
        in_flight.append(batch)
    assert len(old.token_ids) == 9, "it needs a third block"
    assert young.num_in_flight == 1
    assert s.blocks.num_free == 0
    (last,) = in_flight
    assert last is not None
    s.update(last, [7] * len(last.sampled))
    batch = s.schedule()
    assert batch is not None
    assert batch.step_input.finished == [1]
    assert rows(batch) == [(0, 8, 1)]


def test_an_abort_in_flight_drops_the_token_and_frees_the_blocks_for_the_next_batch() -> None:
    s = scheduler(num_blocks=2)
    seq, other = sequence(0, range(1, 9)), sequence(1, range(11, 19))
    s.add(seq)
    s.add(other)
    batch = s.schedule()
    assert batch is not None
    s.finish(seq)
    assert s.blocks.num_free == 2
    after = s.schedule()
    assert after is not None
    assert after.step_input.finished == [0]
    assert rows(after) == [(1, 0, 8)]
    assert s.update(batch, [7]) == []
    assert seq.token_ids == list(range(1, 9))
    assert s.update(after, [7]) == [other]


def test_an_abort_while_waiting_is_nothing_to_the_workers() -> None:
    s = scheduler(max_num_seqs=1)
    running, waiting = sequence(0, [1]), sequence(1, [2])
    s.add(running)
    s.add(waiting)
    step(s)
    s.finish(waiting)
    s.finish(waiting)
    assert step(s).step_input.finished == []
    assert s.waiting == []


# ----------------------------------------------------------------------------------- asynchronous scheduling


def ahead(s: Scheduler) -> ScheduledBatch:
    batch = s.schedule()
    assert batch is not None
    return batch


def test_a_sequence_is_scheduled_for_the_token_that_is_being_sampled() -> None:
    s = scheduler(lookahead=True)
    seq = sequence(0, [1, 2, 3, 4])
    s.add(seq)
    first, second = ahead(s), ahead(s)
    assert [rows(b) for b in (first, second)] == [[(0, 0, 4)], [(0, 4, 1)]]
    assert second.step_input.scheduled[0].new_token_ids == [SAMPLED_LAST]
    assert second.step_input.scheduled[0].new_block_ids == [1]
    s.update(first, [7])
    assert (seq.token_ids, seq.num_pending, seq.num_in_flight) == ([1, 2, 3, 4, 7], 1, 1)
    third = ahead(s)
    assert (rows(third), third.step_input.scheduled[0].new_token_ids) == ([(0, 5, 1)], [SAMPLED_LAST])
    s.update(second, [8])
    s.update(third, [9])
    fourth = ahead(s)
    assert (rows(fourth), fourth.step_input.scheduled[0].new_token_ids) == ([(0, 6, 1)], [9]), "known: it is said"
    assert seq.token_ids == [1, 2, 3, 4, 7, 8, 9]


def test_the_chunks_of_a_prompt_follow_each_other_without_waiting() -> None:
    s = scheduler(lookahead=True, budget=8)
    s.add(sequence(0, range(1, 15)))
    first, second = ahead(s), ahead(s)
    assert [rows(b) for b in (first, second)] == [[(0, 0, 8)], [(0, 8, 6)]]
    assert [len(b.sampled) for b in (first, second)] == [0, 1]


def test_no_row_is_wasted_behind_an_end_that_can_be_foreseen() -> None:
    s = scheduler(lookahead=True)
    short, long = sequence(0, [1, 2], max_len=4), sequence(1, [3], max_len=9)
    s.add(short)
    s.add(long)
    first, second = ahead(s), ahead(s)
    assert rows(second) == [(0, 2, 1), (1, 1, 1)]
    s.update(first, [7, 7])
    assert rows(ahead(s)) == [(1, 2, 1)]


def test_a_row_behind_an_end_that_was_found_late_is_dropped() -> None:
    s = scheduler(lookahead=True, num_blocks=2)
    seq, other = sequence(0, [1, 2, 3]), sequence(1, range(11, 18))
    s.add(seq)
    s.add(other)
    first, second = ahead(s), ahead(s)
    assert [rows(b) for b in (first, second)] == [[(0, 0, 3)], [(0, 3, 1)]]
    assert s.update(first, [7]) == [seq]
    s.finish(seq)
    third = ahead(s)
    assert (rows(third), third.step_input.finished) == ([(1, 0, 7)], [0]), "its blocks go to a later batch"
    assert s.update(second, [9]) == []
    assert seq.token_ids == [1, 2, 3, 7]
    assert s.update(third, [9]) == [other]


def test_a_block_with_a_pending_token_is_shared_when_the_token_is_known() -> None:
    s = scheduler(lookahead=True)
    seq = sequence(0, [1, 2, 3])
    s.add(seq)
    first, second = ahead(s), ahead(s)  # the second one fills the block
    s.update(first, [4])
    s.add(sequence(1, [1, 2, 3, 4, 5]))
    third = ahead(s)
    assert rows(third) == [(0, 4, 1), (1, 4, 1)], "the first block is known, and being computed"
    s.update(second, [7])
    s.update(third, [7, 7])

    s = scheduler(lookahead=True)
    s.add(sequence(0, [1, 2, 3]))
    ahead(s)
    ahead(s)
    s.add(sequence(1, [1, 2, 3, 4, 5]))
    assert s.blocks.match(s.waiting[0].hashes(1, 4)) == []


def test_when_all_are_in_flight_nobody_is_preempted_but_waited_for() -> None:
    s = scheduler(lookahead=True, num_blocks=3, block_size=2, caching=False)
    old, young = sequence(0, [1, 2]), sequence(1, [3])
    s.add(old)
    s.add(young)
    first = ahead(s)
    second = ahead(s)  # the old one takes the last block
    assert s.blocks.num_free == 0
    s.update(first, [7, 7])
    assert rows(second) == [(0, 2, 1), (1, 1, 1)]
    third = ahead(s)
    assert rows(third) == [(0, 3, 1)], "the young one needs a block, and nobody behind it has one"
    s.update(second, [7, 7])
    fourth = ahead(s)
    assert (rows(fourth), fourth.step_input.finished, young.num_preemptions) == ([(0, 4, 1)], [1], 1)


# ------------------------------------------------------------------------------------------- properties


@dataclass
class Plan:
    """A random run: limits, arrivals (prompt, tokens to generate, whether the last one is known beforehand, priority),
    and what happens between the steps."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    caching: bool
    depth: int
    lookahead: bool
    arrivals: list[tuple[list[int], int, bool, int]]
    events: list[tuple[str, int]]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    block_size = draw(st.sampled_from([1, 2, 4]))
    num_blocks = draw(st.integers(1, 12))
    capacity = num_blocks * block_size
    max_num_seqs = draw(st.integers(1, 5))
    # Few different tokens, so that prefixes are often equal.
    prompt = st.lists(st.integers(0, 1), min_size=1, max_size=min(capacity, 14))
    arrival = st.tuples(prompt, st.integers(1, 12), st.booleans(), st.integers(-1, 1))
    lookahead = draw(st.booleans())
    return Plan(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        budget=draw(st.integers(max_num_seqs, 12)),
        caching=draw(st.booleans()),
        depth=2 if lookahead else draw(st.integers(1, 3)),
        lookahead=lookahead,
        arrivals=draw(st.lists(arrival, min_size=1, max_size=8)),
        events=draw(
            st.lists(st.tuples(st.sampled_from(["add", "step", "step", "update", "abort"]), st.integers(0, 9)))
        ),
    )


class Run:
    """Plays a plan against a scheduler and a fake worker, checking the books after every event."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.next_token = scrambled(2)
        self.scheduler = scheduler(
            plan.num_blocks, plan.block_size, plan.max_num_seqs, plan.budget, plan.caching, plan.depth, plan.lookahead
        )
        self.executor = FakeExecutor(
            self.next_token,
            num_kv_blocks=plan.num_blocks,
            block_size=plan.block_size,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.budget,
            lookahead=plan.lookahead,
        )
        self.arrivals = deque(enumerate(plan.arrivals))
        self.sequences: list[Sequence] = []
        self.aborted: set[int] = set()
        self.in_flight: deque[tuple[ScheduledBatch, Future[StepOutput]]] = deque()

    def add(self, _: int = 0) -> None:
        if self.arrivals:
            seq_id, (prompt, tokens, foreseen, priority) = self.arrivals.popleft()
            longest = self.scheduler.max_tokens + 1
            max_len = min(len(prompt) + tokens, longest) if foreseen else longest
            self.sequences.append(sequence(seq_id, prompt, priority, max_len))
            self.scheduler.add(self.sequences[-1])

    def step(self, _: int = 0) -> None:
        if len(self.in_flight) == self.plan.depth:
            return
        batch = self.scheduler.schedule()
        if batch is None:
            assert self.in_flight or not self.unfinished(), "nothing is in flight, yet nothing can be scheduled"
            return
        assert batch.num_tokens == sum(row.count for row in batch.step_input.scheduled)
        self.in_flight.append((batch, self.executor.execute_model(batch.step_input, non_block=True)))

    def update(self, _: int = 0) -> None:
        if not self.in_flight:
            return
        batch, future = self.in_flight.popleft()
        answer = future.result(0)
        assert answer.seq_ids == [seq.seq_id for seq in batch.sampled]
        for seq in self.scheduler.update(batch, answer.token_ids):
            wanted = self.plan.arrivals[seq.seq_id][1]
            if seq.num_output_tokens == wanted or len(seq.token_ids) > self.scheduler.max_tokens:
                self.scheduler.finish(seq)

    def abort(self, which: int) -> None:
        if unfinished := self.unfinished():
            seq = unfinished[which % len(unfinished)]
            self.aborted.add(seq.seq_id)
            self.scheduler.finish(seq)

    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.sequences if not seq.is_finished]

    def check_books(self) -> None:
        s, blocks = self.scheduler, self.scheduler.blocks
        holders = [0] * blocks.num_blocks
        for seq in s.running:
            assert len(set(seq.block_table)) == len(seq.block_table)
            assert seq.num_computed_tokens <= len(seq.block_table) * s.block_size
            for block in seq.block_table:
                holders[block] += 1
        assert holders == [blocks.ref_count(b) for b in range(blocks.num_blocks)]
        assert blocks.num_free == holders.count(0)
        writable = [seq.block_table[i] for seq in s.running for i in self.unwritten(seq)]
        assert len(set(writable)) == len(writable), "two sequences would write to one block"
        assert all(holders[b] == 1 for b in writable)
        assert all(not seq.block_table for seq in self.sequences if seq.status is not SequenceStatus.RUNNING)
        assert len(s.running) <= self.plan.max_num_seqs
        assert {*s.running, *s.waiting} == set(self.unfinished())
        assert [seq.order for seq in s.running] == sorted(seq.order for seq in s.running)
        assert [seq.order for seq in s.waiting] == sorted(seq.order for seq in s.waiting)
        assert all(seq.length <= seq.max_len for seq in s.running), "no row behind an end that was foreseen"
        if not self.in_flight:
            assert not any(seq.num_in_flight or seq.num_pending for seq in self.unfinished())

    def unwritten(self, seq: Sequence) -> range:
        return range(seq.num_computed_tokens // self.plan.block_size, len(seq.block_table))

    def play(self) -> list[StepInput]:
        for name, argument in self.plan.events:
            getattr(self, name)(argument)
            self.check_books()
        while self.arrivals:
            self.add()
        for _ in range(2000):
            if not self.unfinished() and not self.in_flight:
                break
            for _ in range(self.plan.depth):
                self.step()
            self.check_books()
            self.update()
            self.check_books()
        assert not self.unfinished(), "every sequence finishes"
        assert self.scheduler.blocks.num_free == self.plan.num_blocks, "no block is leaked"
        self.check_tokens()
        return self.executor.steps

    def check_tokens(self) -> None:
        """Whatever happened on the way, the tokens are those that the sequence alone would have got."""
        for seq in self.sequences:
            prompt, wanted, _, _ = self.plan.arrivals[seq.seq_id]
            alone = list(prompt)
            while len(alone) < len(seq.token_ids):
                alone.append(self.next_token(alone, seq.seed))
            assert seq.token_ids == alone
            if seq.seq_id not in self.aborted:
                room = self.scheduler.max_tokens + 1 - len(prompt)
                assert seq.num_output_tokens == min(wanted, room)


@settings(max_examples=300, deadline=None)
@given(plans())
def test_whatever_happens_the_books_are_right_and_everything_finishes(plan: Plan) -> None:
    run = Run(plan)
    steps = run.play()
    told = [seq_id for step in steps for seq_id in step.finished]
    known = [new.seq_id for step in steps for new in step.new]
    preemptions = sum(seq.num_preemptions for seq in run.sequences)
    scheduled = {new.seq_id for step in steps for new in step.new}
    assert len(known) <= len(scheduled) + preemptions
    assert sorted([*told, *run.executor.sequences]) == sorted([*known]), "told to forget once for each time known"


@settings(max_examples=50, deadline=None)
@given(plans())
def test_the_same_events_give_the_same_batches(plan: Plan) -> None:
    first, second = Run(plan).play(), Run(plan).play()
    assert msgspec.msgpack.encode(first) == msgspec.msgpack.encode(second)


def test_the_fake_worker_notices_a_block_table_that_lies() -> None:
    """That is: the property tests can fail."""
    s = scheduler()
    s.add(sequence(0, range(1, 9)))
    batch = s.schedule()
    assert batch is not None
    batch.step_input.scheduled[0].new_block_ids.pop()
    with pytest.raises(AssertionError):
        FakeExecutor(scrambled(2)).execute_model(batch.step_input, non_block=True)


@pytest.mark.parametrize("told", [[SAMPLED_LAST], [6]])
def test_the_fake_worker_notices_a_token_that_is_named_wrongly(told: list[int]) -> None:
    s = scheduler()
    s.add(sequence(0, range(1, 8)))
    executor = FakeExecutor(lambda tokens, seed: 7)
    batch = ahead(s)
    assert executor.execute_model(batch.step_input, non_block=True).result(0).token_ids == [7]
    s.update(batch, [7])
    batch = ahead(s)
    assert batch.step_input.scheduled[0].new_token_ids == [7]
    batch.step_input.scheduled[0].new_token_ids[:] = told
    with pytest.raises(AssertionError):
        executor.execute_model(batch.step_input, non_block=True)

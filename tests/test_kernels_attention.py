"""paged_attention: against a float64 formula, and its independence of batch, chunking, block layout and threads."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from kernel_fixtures import DTYPES, assert_close, compiled, implementation, poisoned, random, threads  # noqa: F401

from lightvllm import kernels
from lightvllm.kernels import reference


@dataclass
class Sequence:
    """Keys and values of all its tokens, and the queries of the last ones: float64 holds what was rounded already."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def exact(self, scale: float) -> torch.Tensor:
        q, k, v = (t.double() for t in (self.query, self.key, self.value))
        out = torch.empty_like(q)
        length, count = k.shape[0], q.shape[0]
        for i in range(count):
            seen = length - count + i + 1
            for head in range(q.shape[1]):
                kv_head = head * k.shape[1] // q.shape[1]
                weights = torch.softmax(k[:seen, kv_head] @ q[i, head] * scale, dim=0)
                out[i, head] = weights @ v[:seen, kv_head]
        return out


def sequence(length: int, queries: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, seed: int) -> Sequence:
    return Sequence(
        2 * random(queries, heads[0], dim, dtype=dtype, seed=seed),
        random(length, heads[1], dim, dtype=dtype, seed=seed + 1),
        random(length, heads[1], dim, dtype=dtype, seed=seed + 2),
    )


def attend(
    sequences: list[Sequence], block_size: int = 16, seed: int = 0, index: torch.dtype = torch.int32, scale: float = 0.2
) -> torch.Tensor:
    """Scatter the sequences over a cache of shuffled blocks whose other slots hold NaN, and call the kernel."""
    blocks = [-(-s.key.shape[0] // block_size) for s in sequences]
    shuffled = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(seed))
    shape = (len(shuffled), block_size, *sequences[0].key.shape[1:])
    caches = [torch.full(shape, float("nan"), dtype=sequences[0].key.dtype) for _ in range(2)]
    tables = torch.zeros(len(sequences), max(blocks), dtype=index)
    used = 0
    for row, s, count in zip(tables, sequences, blocks, strict=True):
        row[:count] = shuffled[used : used + count]
        used += count
        for cache, given in zip(caches, (s.key, s.value), strict=True):
            cache[row[:count].long()] = (
                cache[row[:count].long()]
                .flatten(0, 1)
                .index_copy(0, torch.arange(len(given)), given)
                .view(count, *shape[1:])
            )
    starts = torch.tensor([0] + [s.query.shape[0] for s in sequences]).cumsum(0).to(index)
    lengths = torch.tensor([s.key.shape[0] for s in sequences], dtype=index)
    return kernels.paged_attention(torch.cat([s.query for s in sequences]), *caches, tables, lengths, starts, scale)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((1, 1), 16), ((9, 3), 64), ((4, 4), 32), ((8, 1), 80), ((30, 1), 128)])
def test_equals_the_float64_formula(dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    shapes = [(1, 1), (37, 1), (64, 1), (33, 33), (70, 21), (16, 2)]
    batch = [sequence(length, queries, heads, dim, dtype, 10 * i) for i, (length, queries) in enumerate(shapes)]
    exact = torch.cat([s.exact(dim**-0.5) for s in batch])
    got = attend(batch, scale=dim**-0.5)
    assert got.dtype == dtype
    # The reference rounds scores and weights to bfloat16 before it sums; the kernel only the result.
    assert_close(got, exact, absolute=5e-6 if dtype == torch.float32 else 0.06)


@pytest.mark.usefixtures("compiled")
def test_bfloat16_is_rounded_once() -> None:
    batch = [sequence(300, 40, (9, 3), 64, torch.bfloat16, 0), sequence(77, 1, (9, 3), 64, torch.bfloat16, 10)]
    assert_close(attend(batch), torch.cat([s.exact(0.2) for s in batch]), absolute=2e-6)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("block_size", [1, 4, 64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_block_sizes_and_index_types(block_size: int, index: torch.dtype) -> None:
    batch = [sequence(50, 3, (2, 1), 16, torch.float32, 0), sequence(9, 9, (2, 1), 16, torch.float32, 10)]
    exact = torch.cat([s.exact(0.2) for s in batch])
    assert_close(attend(batch, block_size, index=index), exact, absolute=2e-6)


@pytest.mark.usefixtures("compiled", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(9, 3), (5, 1), (4, 4)])
def test_a_row_depends_on_its_sequence_alone(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    length = 100
    whole = sequence(length, length, heads, 64, dtype, 0)
    other = sequence(45, 45, heads, 64, dtype, 10)
    expected = attend([whole])
    # Token by token, as decode does; in chunks, as chunked prefill does; beside another sequence; in other blocks.
    for cuts in (range(length + 1), [0, 1, 33, 64, 99, 100], [0, 50, 100]):
        for begin, end in pairwise(cuts):
            part = Sequence(whole.query[begin:end], whole.key[:end], whole.value[:end])
            assert torch.equal(attend([part]), expected[begin:end])
    last = Sequence(whole.query[-1:], whole.key, whole.value)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(attend([other, whole, last], block_size=8, seed=5)[45:-1], expected)
        assert torch.equal(attend([other, last, whole], seed=6)[45], expected[-1])


@pytest.mark.usefixtures("implementation")
def test_one_large_score_does_not_overflow() -> None:
    s = sequence(40, 2, (2, 1), 16, torch.float32, 0)
    s.key[17] *= 1000
    assert_close(attend([s]), s.exact(0.2), absolute=2e-5)


@pytest.mark.usefixtures("implementation")
def test_queries_with_gaps_between_the_rows() -> None:
    s = sequence(20, 4, (2, 1), 16, torch.float32, 0)
    wide = torch.cat((s.query, torch.full((4, 3, 16), float("nan"))), dim=1)
    caches = [t.view(1, 20, 1, 16) for t in (s.key, s.value)]
    tables, lengths, starts = torch.tensor([[0]]), torch.tensor([20]), torch.tensor([0, 4])
    got = kernels.paged_attention(wide[:, :2], *caches, tables, lengths, starts, 0.2)
    assert_close(got, s.exact(0.2), absolute=2e-6)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("tables", "lengths", "starts"),
    [
        pytest.param([[0, 9]], [20], [0, 4], id="block outside the cache"),
        pytest.param([[0, 1]], [33], [0, 4], id="more tokens than blocks"),
        pytest.param([[0, 1]], [3], [0, 4], id="more queries than tokens"),
        pytest.param([[0, 1]], [20], [0, 5], id="more rows than there are"),
    ],
)
def test_what_would_read_outside_is_refused(tables: list[list[int]], lengths: list[int], starts: list[int]) -> None:
    query, cache = torch.ones(4, 2, 16), torch.ones(9, 16, 1, 16)
    with pytest.raises(IndexError, match=r"outside the cache|does not fit"):
        kernels.paged_attention(
            query, cache, cache, torch.tensor(tables), torch.tensor(lengths), torch.tensor(starts), 0.2
        )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 16), (torch.float32, 10)])
def test_what_the_kernel_does_not_serve_goes_to_the_reference(dtype: torch.dtype, dim: int) -> None:
    query, cache = random(3, 4, dim, dtype=dtype), random(2, 16, 2, dim, dtype=dtype, seed=1)
    rest = (torch.tensor([[1, 0]]), torch.tensor([20]), torch.tensor([0, 3]), 0.2)
    got = kernels.paged_attention(query, cache, cache, *rest)
    assert torch.equal(got, reference.paged_attention(query, cache, cache, *rest))

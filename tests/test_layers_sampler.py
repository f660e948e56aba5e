"""The sampler against the formulas, written out again in numpy over the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvllm.errors import LightvllmError
from lightvllm.layers.sampler import SamplingState, bad_words_table, draw, sample, uniform
from lightvllm.sampling_params import SamplingParams

VOCAB = 1000


def state(params: SamplingParams, prompt: list[int], output: list[int] = [], **fields: object) -> SamplingState:  # noqa: B006
    values = {"seed": 0, "stop_token_ids": []} | fields
    return SamplingState(params=params, prompt_len=len(prompt), token_ids=prompt + output, **values)  # type: ignore[arg-type]


def logits(rows: int = 1, seed: int = 0, scale: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def distribution(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, min-p, top-k and top-p, each filter written in its own terms."""
    x = row.astype(np.float64) / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    order = sorted(range(len(p)), key=lambda i: (-x[i], i))
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    mass = 0.0
    for i in order:
        if mass >= params.top_p:
            p[i] = 0
        mass += p[i]
    return p / p.sum()


def inverse_cdf(row: np.ndarray, p: np.ndarray, u: float) -> tuple[int, float]:
    """The token at u, and how far u is from the nearest edge between two tokens."""
    order = sorted(range(len(p)), key=lambda i: (-row[i], i))
    edges = np.cumsum(p[order])
    kept = np.count_nonzero(p)
    place = min(int(np.searchsorted(edges, u, side="right")), kept - 1)
    return order[place], float(np.abs(edges - u).min())


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    x = torch.zeros(3, VOCAB)
    x[0, [700, 40, 41]] = 5.0
    x[1, 999] = 1.0
    greedy = SamplingParams(temperature=0.0)
    assert sample(x, [state(greedy, [1])] * 3) == ([40, 999, 0], [None] * 3)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, -1, 1, 2, 50, 300, 999, 1000, 5000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    u=st.floats(0, 1, exclude_max=True),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
)
def test_draw_is_the_inverse_cdf_of_the_filtered_distribution(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, u: float, scale: float
) -> None:
    """Flat distributions (a small scale) need the whole vocabulary sorted, steep ones only their head."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row = logits(seed=seed, scale=scale)[0].numpy()
    p = distribution(row, params)
    expected, distance = inverse_cdf(row, p, u)
    token = draw(row, params, u)
    assert p[token] > 0
    # On an edge between two tokens rounding decides.
    assert token == expected or distance < 1e-12


def reference_draw(row: np.ndarray, params: SamplingParams, u: float) -> int:
    """The same, by sorting the whole vocabulary by value and then by id."""
    scaled = (row.astype(np.float64) - float(row.max())) / params.temperature
    if params.min_p > 0.0:
        scaled[scaled < np.log(params.min_p)] = -np.inf
    ids = np.lexsort((np.arange(len(row)), -row))
    if params.top_k > 0:
        ids = ids[: params.top_k]
    cumulative = np.cumsum(np.exp(scaled[ids]))
    if params.top_p < 1.0:
        cumulative = cumulative[: int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1]
    place = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(ids[min(place, int(np.searchsorted(cumulative, cumulative[-1])))])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 0.8, 1.0, 4.0]),
        top_k=st.sampled_from([0, 3, 1000, 49151]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.2]),
        min_p=st.sampled_from([0.0, 0.01]),
    ),
    levels=st.sampled_from([3, 400, None]),
    wide=st.booleans(),
)
def test_the_quick_draw_takes_what_sorting_everything_takes(
    seed: int, params: SamplingParams, levels: int | None, wide: bool
) -> None:
    """A real vocabulary; few levels make thousands of equal logits, also across the edge of what is sorted."""
    row = logits(seed=seed, scale=2.0, vocab=49_152)[0].numpy()
    if levels is not None:
        row = np.round(row * levels / 20) * 20 / levels
    row = row.astype(np.float64 if wide else np.float32)
    for index in range(4):
        u = uniform(seed, index)
        assert draw(row, params, u) == reference_draw(row, params, u)


def test_equal_logits_are_drawn_in_the_order_of_their_ids() -> None:
    params = SamplingParams(temperature=1.0, top_k=10)
    row = np.zeros(VOCAB, np.float32)
    assert [draw(row, params, u) for u in (0.0, 0.05, 0.1001, 0.9999)] == [0, 0, 1, 9]
    assert draw(row, SamplingParams(temperature=1.0), 0.5001) == 500


def test_a_draw_near_one_never_gives_a_token_without_weight() -> None:
    row = np.full(VOCAB, -np.inf, np.float32)
    row[[3, 7]] = 0.0
    assert draw(row, SamplingParams(temperature=1.0), 1 - 2**-53) == 7
    assert draw(row, SamplingParams(temperature=1.0, top_k=500, top_p=0.999), 1 - 2**-53) == 7


def test_frequencies_follow_the_probabilities() -> None:
    """20,000 tokens of one request's stream, against the probabilities: chi-squared with 7 degrees of freedom."""
    row = np.log(np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05], np.float32))
    params, n = SamplingParams(temperature=1.0), 20_000
    counts = np.bincount([draw(row, params, uniform(42, i)) for i in range(n)], minlength=8)
    expected = n * np.exp(row)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 0.999 quantile


def test_uniform_numbers_do_not_repeat_and_fill_the_interval() -> None:
    numbers = [uniform(seed, index) for seed in (0, 1, 2**64 - 1, -5) for index in range(1000)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= u < 1 for u in numbers)
    assert abs(np.mean(numbers) - 0.5) < 4 * math.sqrt(1 / 12 / len(numbers))
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06


def test_uniform_is_splitmix64() -> None:
    """First outputs of the published generator for a state of 0: each is the mix of one more golden step."""
    from lightvllm.layers.sampler import _mix

    golden = 0x9E3779B97F4A7C15
    assert [_mix(golden * n) for n in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_row_is_sampled_alike_alone_and_in_any_batch() -> None:
    x = logits(rows=5)
    params = [
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.5, top_k=20),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(temperature=1.0, min_p=0.05, frequency_penalty=0.5),
    ]
    rows = [state(p, [1, 2, 3], [4, 5], seed=i) for i, p in enumerate(params)]
    together, _ = sample(x, rows)
    backwards, _ = sample(x.flip(0), rows[::-1])
    assert backwards[::-1] == together
    assert [sample(x[i : i + 1], [rows[i]])[0][0] for i in range(5)] == together


def test_the_place_in_the_output_and_the_seed_choose_the_token() -> None:
    """A recomputed sequence (its output now sent along with its prompt) goes on as it would have."""
    x, params = logits(scale=0.5), SamplingParams(temperature=1.0)
    first = [sample(x, [state(params, [1, 2], [7] * n, seed=9)])[0][0] for n in range(8)]
    again = [sample(x, [SamplingState(params, 9, 2, [], [1, 2] + [7] * n)])[0][0] for n in range(8)]
    other = [sample(x, [state(params, [1, 2], [7] * n, seed=10)])[0][0] for n in range(8)]
    assert first == again
    assert len(set(first)) > 4
    assert first != other


def test_repetition_penalty_is_ctrls_over_prompt_and_output() -> None:
    x = torch.tensor([[4.0, -1.0, 3.0, 2.0]])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sample(x, [state(params, [1], [])])[0] == [0]
    assert sample(x, [state(params, [0], [])])[0] == [2]  # 4 / 2 < 3
    assert sample(x, [state(params, [0], [2])])[0] == [0]  # 2 = 2 (token 3), and the lower id wins
    negative = torch.tensor([[-1.0, -1.5]])
    assert sample(negative, [state(params, [0], [])])[0] == [1]  # -1 × 2 < -1.5


def test_presence_and_frequency_penalties_are_openais_over_the_output() -> None:
    x = torch.tensor([[1.0, 0.0, 0.5]])
    presence = SamplingParams(temperature=0.0, presence_penalty=0.6)
    assert sample(x, [state(presence, [0, 0], [1])])[0] == [0]  # the prompt does not count
    assert sample(x, [state(presence, [1], [0])])[0] == [2]
    frequency = SamplingParams(temperature=0.0, frequency_penalty=0.3)
    assert sample(x, [state(frequency, [1], [0])])[0] == [0]  # 1 - 0.3 > 0.5
    assert sample(x, [state(frequency, [1], [0, 0])])[0] == [2]  # 1 - 0.6 < 0.5


def test_stop_tokens_are_masked_until_min_tokens_are_out() -> None:
    x = torch.tensor([[1.0, 9.0, 8.0, 7.0]])
    for params in (SamplingParams(temperature=0.0, min_tokens=2), SamplingParams(min_tokens=2, top_k=1)):
        assert sample(x, [state(params, [0], [], stop_token_ids=[1, 2])])[0] == [3]
        assert sample(x, [state(params, [0], [0], stop_token_ids=[1, 2])])[0] == [3]
        assert sample(x, [state(params, [0], [0, 0], stop_token_ids=[1, 2])])[0] == [1]


def test_a_bias_is_added_before_the_penalties() -> None:
    x = torch.tensor([[4.0, -1.0, 3.0, 2.0]])
    assert sample(x, [state(SamplingParams(temperature=0.0, logit_bias={1: 5.5}), [0])])[0] == [1]
    assert sample(x, [state(SamplingParams(temperature=0.0, logit_bias={0: -100, 2: -100}), [0])])[0] == [3]
    both = SamplingParams(temperature=0.0, logit_bias={1: 6.0}, repetition_penalty=2.0)
    assert sample(x, [state(both, [1])])[0] == [0]  # (-1 + 6) / 2 < 4
    drawn = SamplingParams(temperature=1.0, logit_bias={3: 100.0})
    assert sample(x, [state(drawn, [0], seed=seed) for seed in range(1)])[0] == [3]


def test_only_allowed_tokens_are_chosen() -> None:
    x = logits(rows=40)
    drawn = SamplingParams(temperature=2.0, allowed_token_ids=[900, 3, 3, 17])
    tokens, _ = sample(x, [state(drawn, [1], seed=seed) for seed in range(40)])
    assert set(tokens) == {3, 17, 900}
    greedy = SamplingParams(temperature=0.0, allowed_token_ids=[900, 3, 17])
    assert sample(x, [state(greedy, [1])] * 40)[0] == [
        [3, 17, 900][int(np.argmax(row[[3, 17, 900]]))] for row in x.numpy()
    ]
    # Of the allowed ones alone, the distribution is that of a vocabulary of three.
    for row, seed, token in zip(x.numpy(), range(40), tokens, strict=True):
        assert [3, 17, 900][draw(row[[3, 17, 900]], SamplingParams(temperature=2.0), uniform(seed, 0))] == token


def test_the_token_that_completes_a_bad_word_is_masked() -> None:
    x = torch.tensor([[1.0, 9.0, 8.0, 7.0]])
    greedy, table = SamplingParams(temperature=0.0), bad_words_table([[1], [2, 3, 2], [2, 0]])

    def token(output: list[int]) -> int:
        return sample(x, [state(greedy, [2, 3], output, bad_words=table)])[0][0]

    assert token([]) == 2  # the prompt does not begin a word
    assert token([2, 3]) == 3  # 1 and 2 are masked
    assert token([3, 2, 3]) == 3
    assert token([3, 3]) == 2
    x[0, 0] = 10.0
    assert token([2]) == 2
    assert token([3]) == 0


def test_masks_and_filters_give_the_same_alone_in_any_batch_and_again() -> None:
    x = logits(rows=6)
    kinds = [
        SamplingParams(temperature=0.9, logit_bias={5: 3.0, 9: -100.0}),
        SamplingParams(temperature=0.9, allowed_token_ids=list(range(0, VOCAB, 7)), top_p=0.9),
        SamplingParams(temperature=0.9, presence_penalty=1.0, logit_bias={4: 2.0}, logprobs=2),
        SamplingParams(temperature=0.0, allowed_token_ids=[4, 6], logit_bias={4: 100.0}),
        SamplingParams(temperature=0.9),
        SamplingParams(temperature=0.9, min_tokens=5, allowed_token_ids=[1, 2, 3]),
    ]
    table = bad_words_table([[5], [4, 4]])
    rows = [state(p, [1, 2], [4, 4], seed=i, stop_token_ids=[1, 2], bad_words=table) for i, p in enumerate(kinds)]
    together, _ = sample(x, rows)
    assert [sample(x[i : i + 1], [rows[i]])[0][0] for i in range(6)] == together
    assert sample(x.flip(0), rows[::-1])[0][::-1] == together
    assert not any(row.error for row in rows)
    assert together[5] == 3


def test_a_row_for_which_no_token_is_left_has_an_error_and_the_others_none() -> None:
    x = logits(rows=3)
    fine = SamplingParams(temperature=0.0)
    rows = [
        state(fine, [1]),
        state(SamplingParams(temperature=1.0, allowed_token_ids=[5]), [1], bad_words=bad_words_table([[5]])),
        state(fine, [1]),
    ]
    tokens, _ = sample(x, rows)
    assert [tokens[0], tokens[2]] == [int(x[0].argmax()), int(x[2].argmax())]
    assert [row.error is None for row in rows] == [True, False, True]
    assert "no token may be chosen" in str(rows[1].error)


def test_logprobs_are_of_the_raw_logits() -> None:
    x = logits()
    x[0, 17] = x[0, 500] = 20.0
    expected = torch.log_softmax(x[0].double(), -1)
    params = SamplingParams(temperature=0.0, repetition_penalty=50.0, logprobs=5)
    token_ids, logprobs = sample(x, [state(params, [17, 500])])
    best = sorted(range(VOCAB), key=lambda i: (-x[0, i].item(), i))[:5]
    assert best[:2] == [17, 500]
    assert token_ids == [best[2]]
    found = logprobs[0]
    assert found is not None
    assert found.top_ids == best
    np.testing.assert_allclose(found.top_logprobs, expected[best], atol=1e-12)
    assert found.logprob == pytest.approx(expected[best[2]].item(), abs=1e-12)
    assert found.rank == 3


def test_zero_logprobs_are_the_chosen_tokens_alone() -> None:
    found = sample(logits(), [state(SamplingParams(temperature=0.0, logprobs=0), [1])])[1][0]
    assert found is not None
    assert (found.rank, found.top_ids, found.top_logprobs) == (1, [], [])


def test_the_logits_are_left_as_they_were() -> None:
    x = logits()
    before = x.clone()
    params = SamplingParams(temperature=0.5, repetition_penalty=2.0, min_tokens=1, max_tokens=2, min_p=0.1, logprobs=2)
    sample(x, [state(params, [1, 2], stop_token_ids=[3])])
    assert torch.equal(x, before)


def test_logits_that_are_no_numbers_are_an_error_not_a_token() -> None:
    x = torch.full((1, VOCAB), float("nan"))
    with pytest.raises(LightvllmError, match="are not finite"):
        sample(x, [state(SamplingParams(temperature=1.0), [1])])
    with pytest.raises(LightvllmError, match="are not finite"):
        sample(x, [state(SamplingParams(temperature=0.0), [1])])

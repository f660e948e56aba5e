"""linear: against a float64 product, alone and in batches, on any number of threads."""

import pytest
import torch
from kernel_fixtures import DTYPES, compiled, implementation, poisoned, random, threads  # noqa: F401

from lightvllm import kernels
from lightvllm.kernels import reference


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (1, 1, 1),
        (1, 3, 31),
        (2, 5, 33),
        (3, 4, 64),
        (5, 7, 100),
        (6, 130, 96),
        (16, 48, 576),
        (65, 33, 47),
        (1200, 9, 130),
    ],
)
def test_equals_the_float64_product(dtype: torch.dtype, with_bias: bool, rows: int, n: int, k: int) -> None:
    x, weight = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    bias = random(n, dtype=dtype, seed=2) if with_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    got = kernels.linear(x, weight, bias)
    assert got.dtype == dtype
    assert got.shape == (rows, n)
    # One rounding to the output's type, and float32 sums.
    bound = torch.finfo(dtype).eps * exact.abs() + 2e-6 * (x.double().abs() @ weight.double().abs().T + 1)
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [100, 576])
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype, k: int) -> None:
    x, weight = random(700, k, dtype=dtype), random(50, k, dtype=dtype, seed=1)
    alone = torch.cat([kernels.linear(row, weight) for row in x.split(1)])
    for rows in (*range(2, 20), 64, 65, 700):
        assert torch.equal(kernels.linear(x[:rows], weight), alone[:rows])
        assert torch.equal(kernels.linear(x[-rows:], weight), alone[-rows:])


@pytest.mark.usefixtures("compiled", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 700])
def test_a_result_does_not_depend_on_the_threads(dtype: torch.dtype, rows: int) -> None:
    x, weight = random(rows, 576, dtype=dtype), random(333, 576, dtype=dtype, seed=1)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kernels.linear(x, weight))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("implementation")
def test_rows_with_gaps_between_them() -> None:
    wide, weight = random(4, 100, dtype=torch.float32), random(9, 60, dtype=torch.float32)
    assert torch.allclose(kernels.linear(wide[:, 20:80], weight), wide[:, 20:80] @ weight.T, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_not_a_number_and_infinity_pass_through() -> None:
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    weight = torch.ones(3, 64, dtype=torch.bfloat16)
    weight[1, 7], weight[2, 63] = float("nan"), float("inf")
    got = kernels.linear(x, weight)[0]
    assert got[0] == 64
    assert got[1].isnan()
    assert got[2].isinf()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        pytest.param(torch.ones(2, 8, dtype=torch.float64), torch.ones(3, 8, dtype=torch.float64), id="float64"),
        pytest.param(torch.ones(2, 8, dtype=torch.int64), torch.ones(3, 8, dtype=torch.int64), id="int64"),
        pytest.param(torch.ones(2, 8), torch.arange(24.0).view(8, 3).T, id="columns"),
        pytest.param(torch.ones(8, 2).T, torch.ones(3, 8), id="x transposed"),
        pytest.param(torch.ones(2, 5, 8), torch.ones(3, 8), id="three dimensions"),
        pytest.param(torch.ones(0, 8), torch.ones(3, 8), id="no rows"),
    ],
)
def test_what_the_kernel_does_not_serve_goes_to_the_reference(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert torch.equal(kernels.linear(x, weight), reference.linear(x, weight))


@pytest.mark.usefixtures("compiled")
def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        kernels.linear(torch.ones(2, 8), torch.ones(3, 9))

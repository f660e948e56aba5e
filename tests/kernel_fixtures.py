"""What the tests of the kernels share; imported by name (pytest finds fixtures in a test module's namespace)."""

from collections.abc import Iterator

import pytest
import torch

from lightvllm import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "compiled"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each."""
    kernels.use(request.param)
    yield request.param
    kernels.use("auto")


@pytest.fixture
def compiled() -> Iterator[None]:
    kernels.use("compiled")
    yield
    kernels.use("auto")


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: torch.Tensor, exact: torch.Tensor, roundings: int = 1, absolute: float = 1e-6) -> None:
    """``got`` is the float64 tensor ``exact`` but for some roundings to its own type, and a float32 sum's error."""
    assert got.shape == exact.shape
    bound = roundings * torch.finfo(got.dtype).eps * exact.abs() + absolute
    worst = ((got.double() - exact).abs() - bound).max()
    assert worst <= 0, f"off by {worst} more than {roundings} roundings"

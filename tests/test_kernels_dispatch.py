"""The seam: what ``use`` chooses, that it says why, and that the operators are whole for torch."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_fixtures import random

from lightvllm import kernels
from lightvllm.errors import ConfigError
from lightvllm.kernels import operators, reference

NAMES = ("linear", "rms_norm", "fused_add_rms_norm", "rotary_embedding", "silu_and_mul", "reshape_and_cache")


@pytest.fixture(autouse=True)
def _restored():  # type: ignore[no-untyped-def]
    yield
    kernels.use("auto")


def test_reference_is_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.use("reference").compiled is False
    assert not kernels.compiled()
    assert "asked for" in kernels.info().reason
    x = random(3, 8, dtype=torch.float32)
    assert torch.equal(kernels.silu_and_mul(x), reference.silu_and_mul(x))


def test_compiled_names_its_library() -> None:
    info = kernels.use("compiled")
    assert info.compiled
    assert kernels.compiled()
    assert info.library is not None
    assert info.library.is_file()
    assert kernels.info() == info


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="use 'auto', 'compiled' or 'reference'"):
        kernels.use("fast")  # type: ignore[arg-type]


def test_functions_imported_by_name_follow_the_choice() -> None:
    from lightvllm.kernels import linear

    x = random(2, 576, dtype=torch.float32)
    weight = random(64, 576, dtype=torch.float32, seed=1)
    kernels.use("compiled")
    alone = linear(x[:1], weight)
    assert torch.equal(linear(x, weight)[:1], alone)
    kernels.use("reference")
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


_FIRST_CALL = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from lightvllm import kernels
x = torch.ones(1, 4)
assert kernels.silu_and_mul(x).shape == (1, 2)   # decides by itself
assert kernels.silu_and_mul(x).shape == (1, 2)
print("compiled" if kernels.compiled() else "reference")
if not kernels.compiled():
    try:
        kernels.use("compiled")
    except kernels.ConfigError as error:
        print(error)
"""


def _first_call(**env: str) -> tuple[list[str], list[str]]:
    """What a fresh process prints, and what it logs, around its first call."""
    done = subprocess.run(
        [sys.executable, "-c", _FIRST_CALL], env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_the_first_call_decides() -> None:
    assert kernels.use("auto").compiled  # so that the cache has it
    assert _first_call() == (["compiled"], [])


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_no_working_compiler_is_one_warning_and_the_references(tmp_path: Path, cxx: str) -> None:
    printed, logged = _first_call(CXX=cxx, LIGHTVLLM_CACHE=str(tmp_path))
    assert printed[0] == "reference"
    assert cxx in printed[1]
    assert "set CXX" in printed[1]
    assert len(logged) == 1
    assert logged[0].startswith("WARNING slow: ")
    assert cxx in logged[0]


def test_a_library_that_cannot_be_loaded_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"not a library")
    code = f"from pathlib import Path; from lightvllm.kernels import operators; operators.load(Path({str(library)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "lightvllm.errors.ConfigError" in done.stderr
    assert "delete its folder" in done.stderr


def test_one_openmp_runtime() -> None:
    kernels.use("compiled")
    kernels.silu_and_mul(torch.ones(1, 4))
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_are_whole_for_torch(dtype: torch.dtype) -> None:
    """Schemas tell the truth about what is written in place, and shapes can be traced; served dtypes and others."""
    kernels.use("compiled")
    x, weight = random(3, 32, dtype=dtype), random(32, dtype=dtype, seed=1)
    heads, cache = random(3, 2, 16, dtype=dtype), torch.zeros(2, 4, 2, 16, dtype=dtype)
    arguments = {
        "linear": (x, random(5, 32, dtype=dtype)),
        "rms_norm": (x, weight, 1e-5),
        "fused_add_rms_norm": (x, x.clone(), weight, 1e-5),
        "rotary_embedding": (torch.arange(3), heads, heads.clone(), random(8, 16, dtype=torch.float32)),
        "silu_and_mul": (x,),
        "reshape_and_cache": (heads, heads.clone(), cache, cache.clone(), torch.tensor([0, 5, 7])),
        "paged_attention": (
            heads,
            cache,
            cache.clone(),
            torch.tensor([[1, 0]], dtype=torch.int32),
            torch.tensor([6], dtype=torch.int32),
            torch.tensor([0, 3], dtype=torch.int32),
            0.25,
        ),
    }
    for name, given in arguments.items():
        operator = getattr(torch.ops.lightvllm, name).default
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def test_a_function_of_kernels_can_be_traced_whole() -> None:
    kernels.use("compiled")
    x, weight = random(3, 32, dtype=torch.float32), random(16, 32, dtype=torch.float32, seed=1)

    def block(x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(kernels.silu_and_mul(torch.cat((x, x), dim=1)), weight)

    traced = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(traced(x), block(x))


def test_loading_twice_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    library = kernels.use("compiled").library
    assert library is not None
    with caplog.at_level(logging.DEBUG):
        operators.load(library)
        kernels.use("compiled")
    assert not caplog.records

"""Norms, rotary embedding, activation, cache write: against float64 formulas, and bit for bit against the references
in bfloat16 and float16, whose rounding points the compiled kernels share."""

import pytest
import torch
from kernel_fixtures import DTYPES, assert_close, compiled, implementation, poisoned, random, threads  # noqa: F401

from lightvllm import kernels
from lightvllm.kernels import reference

SIZES = [(1, 1), (1, 16), (3, 33), (7, 576), (130, 576)]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_rms_norm(dtype: torch.dtype, rows: int, n: int) -> None:
    x, weight = random(rows, n, dtype=dtype), random(n, dtype=dtype, seed=1)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(kernels.rms_norm(x, weight, 1e-5), exact, roundings=2)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_fused_add_rms_norm(dtype: torch.dtype, rows: int, n: int) -> None:
    x, residual, weight = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(rows, n), (rows, n), (n,)]))
    total = x.double() + residual.double()
    kept = residual
    normed, returned = kernels.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert returned.data_ptr() == kept.data_ptr()
    assert_close(kept, total)
    exact = kept.double() / (kept.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(normed, exact, roundings=2)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_silu_and_mul(dtype: torch.dtype, rows: int, n: int) -> None:
    x = 8 * random(rows, 2 * n, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(kernels.silu_and_mul(x), gate / (1 + (-gate).exp()) * up, roundings=2)


@pytest.mark.usefixtures("implementation")
def test_silu_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("inf"), float("nan")]])
    got = kernels.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1))[0]
    assert got[:2].abs().max() == 0
    assert got[2] == pytest.approx(0, abs=1e-30)
    assert got[3] == 0
    assert torch.equal(got[4:8], gate[0, 4:8])
    assert got[8].isnan()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 2), (3, 1, 10), (9, 3, 64), (4, 4, 80)])
def test_rotary_embedding(dtype: torch.dtype, index: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    qkv = random(5, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = random(50, dim // 2, dtype=torch.float32, seed=1)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.tensor([0, 49, 7, 7, 20], dtype=index)
    cos, sin = (t.double().unsqueeze(1) for t in table.to(dtype)[positions.long()].chunk(2, dim=-1))
    left, right = qkv.double().chunk(2, dim=-1)
    exact = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    value = qkv[:, heads + kv_heads :].clone()
    query, key, untouched = qkv.split([heads, kv_heads, kv_heads], dim=1)
    kernels.rotary_embedding(positions, query, key, table)
    # Cancellation: the roundings of the products are relative to the products.
    bound = 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert_close(qkv[:, : heads + kv_heads], exact[:, : heads + kv_heads], absolute=bound)
    assert torch.equal(untouched, value)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 1), (3, 64), (2, 10)])
def test_reshape_and_cache(dtype: torch.dtype, kv_heads: int, dim: int) -> None:
    kv = random(6, 2 * kv_heads, dim, dtype=dtype)
    key, value = kv.split(kv_heads, dim=1)
    caches = [torch.full((4, 8, kv_heads, dim), 7.0, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([31, 0, 9, 8, 16, 30])
    kernels.reshape_and_cache(key, value, *caches, slots)
    for given, cache in zip((key, value), caches, strict=True):
        rows = cache.view(32, kv_heads, dim)
        assert torch.equal(rows[slots], given)
        others = [slot for slot in range(32) if slot not in slots.tolist()]
        assert (rows[others] == 7).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("slot", [-33, 32])
def test_a_slot_outside_the_cache_is_refused(slot: int) -> None:
    key = torch.ones(1, 1, 16)
    cache = torch.zeros(4, 8, 1, 16)
    with pytest.raises((IndexError, RuntimeError), match=r"outside|out of bounds"):
        kernels.reshape_and_cache(key, key, cache, cache.clone(), torch.tensor([slot]))
    assert not cache.any()


@pytest.mark.usefixtures("implementation")
def test_a_position_outside_the_table_is_refused() -> None:
    query = torch.ones(1, 1, 16)
    with pytest.raises((IndexError, RuntimeError), match=r"outside|out of bounds"):
        kernels.rotary_embedding(torch.tensor([8]), query, query.clone(), torch.ones(8, 16))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_where_the_references_round(dtype: torch.dtype) -> None:
    x, weight = random(40, 576, dtype=dtype), random(576, dtype=dtype, seed=1)
    # The sums of squares differ in order, so a rounding may fall to the other side here and there.
    assert (kernels.rms_norm(x, weight, 1e-5) != reference.rms_norm(x, weight, 1e-5)).float().mean() < 0.01
    sums = [random(40, 576, dtype=dtype, seed=2) for _ in range(2)]
    kernels.fused_add_rms_norm(x, sums[0], weight, 1e-5)
    reference.fused_add_rms_norm(x, sums[1], weight, 1e-5)
    assert torch.equal(*sums)
    assert (kernels.silu_and_mul(x) != reference.silu_and_mul(x)).float().mean() < 0.01
    table = random(64, 64, dtype=torch.float32, seed=3)
    pairs = [random(40, 9, 64, dtype=dtype, seed=4) for _ in range(4)]
    kernels.rotary_embedding(torch.arange(40), *pairs[:2], table)
    reference.rotary_embedding(torch.arange(40), *pairs[2:], table)
    assert torch.equal(pairs[0], pairs[2])


@pytest.mark.usefixtures("compiled", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_the_batch_nor_the_threads_matter(dtype: torch.dtype) -> None:
    x, weight = random(500, 576, dtype=dtype), random(576, dtype=dtype, seed=1)
    alone = [torch.cat([f(row) for row in x.split(1)]) for f in (_norm(weight), kernels.silu_and_mul)]
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(_norm(weight)(x), alone[0])
        assert torch.equal(kernels.silu_and_mul(x), alone[1])


def _norm(weight: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda x: kernels.rms_norm(x, weight, 1e-5)


@pytest.mark.usefixtures("compiled")
def test_other_dtypes_go_to_the_references() -> None:
    dtype = torch.float64
    x, weight = random(3, 32, dtype=dtype), random(32, dtype=dtype, seed=1)
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(kernels.silu_and_mul(x), reference.silu_and_mul(x))
    sums = [random(3, 32, dtype=dtype, seed=2) for _ in range(2)]
    normed, _ = kernels.fused_add_rms_norm(x, sums[0], weight, 1e-5)
    assert torch.equal(normed, reference.fused_add_rms_norm(x, sums[1], weight, 1e-5)[0])
    assert torch.equal(*sums)
    caches = [torch.zeros(2, 4, 2, 16, dtype=dtype) for _ in range(2)]
    key = x.view(3, 2, 16)
    kernels.reshape_and_cache(key, key, *caches, torch.tensor([1, 7, 4]))
    assert torch.equal(caches[1].view(8, 2, 16)[[1, 7, 4]], key)
    pairs = [random(3, 2, 16, dtype=dtype) for _ in range(4)]
    table = random(8, 16, dtype=torch.float32)
    kernels.rotary_embedding(torch.arange(3), *pairs[:2], table)
    reference.rotary_embedding(torch.arange(3), *pairs[2:], table)
    assert torch.equal(pairs[0], pairs[2])


@pytest.mark.usefixtures("compiled")
def test_layouts_with_gaps_go_to_the_references() -> None:
    x = random(32, 6, dtype=torch.float32).T
    weight = random(64, dtype=torch.float32, seed=1)[::2]
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(kernels.silu_and_mul(x), reference.silu_and_mul(x))

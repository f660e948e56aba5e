"""Our CPU kernels against torch's own operations, at the shapes of a model.

    python benchmarks/kernels_cpu.py [--threads 2] [--dtypes bfloat16,float32] [--rows 1,16,2048] [--context 256]
                                     [--rounds 21] [--hidden 576 --intermediate 1536 --heads 9 --kv-heads 3
                                      --head-dim 64 --vocab 49152 --layers 30]

Each operation has as many copies of its weights (or caches) as the model has layers, but at least 256 MiB, and every
call takes the next copy: so they come from memory, as they do in a step of the model, and not from the caches. The
contenders are called in turn. Printed are medians, the speed-up, GB/s of weights or cache read by our kernel as a share
of what this machine's memory gave in a plain read just before, and GFLOP/s. The last lines add up one decode step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightvllm import kernels
from lightvllm.kernels import reference

COLD = 256 << 20
BURST = 0.01
SETTLE = 0.01
"""Seconds between contenders: torch's threads go on spinning for milliseconds, on the cores that are measured next."""


@dataclass
class Case:
    """One operation: how often a step of the model has it, and its call on copy ``i`` of what it reads."""

    name: str
    per_step: int
    bytes_read: int
    flops: int
    copies: int
    ours: Callable[[int], object]
    torchs: Callable[[int], object]


def read_bandwidth(threads: int) -> float:
    """Bytes per second of summing 512 MiB, the best of ten."""
    torch.set_num_threads(threads)
    numbers = torch.ones(64 << 20, dtype=torch.int64)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began))
    return best


def cases(args: argparse.Namespace, dtype: torch.dtype, rows: int) -> list[Case]:
    hidden, width, dim = args.hidden, args.intermediate, args.head_dim
    heads, kv_heads, layers = args.heads, args.kv_heads, args.layers
    made = []

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    for name, per_step, n, k in (
        ("qkv", layers, (heads + 2 * kv_heads) * dim, hidden),
        ("o", layers, hidden, heads * dim),
        ("gate_up", layers, 2 * width, hidden),
        ("down", layers, hidden, width),
        ("head", 1, args.vocab, hidden),
    ):
        if name == "head" and rows > 256:
            continue  # logits are wanted for the last token of a prompt only
        one = n * k * dtype.itemsize
        copies = max(1, min(-(-COLD // one), 4 * layers))
        weights = [random(n, k) for _ in range(copies)]
        x = random(rows, k)
        made.append(
            Case(
                f"linear {name} {n}x{k}",
                per_step,
                one,
                2 * rows * n * k,
                copies,
                lambda i, x=x, w=weights: kernels.linear(x, w[i]),
                lambda i, x=x, w=weights: reference.linear(x, w[i]),
            )
        )
    x, weight, residual = random(rows, hidden), random(hidden), random(rows, hidden)
    gate_up = random(rows, 2 * width)
    qkv = random(rows, heads + 2 * kv_heads, dim)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    positions, table = torch.arange(rows), torch.randn(max(rows, args.context), dim)
    small = rows * dtype.itemsize
    made += [
        Case(
            "fused_add_rms_norm",
            2 * layers + 1,
            2 * small * hidden,
            0,
            1,
            lambda _: kernels.fused_add_rms_norm(x, residual, weight, 1e-5),
            lambda _: reference.fused_add_rms_norm(x, residual, weight, 1e-5),
        ),
        Case(
            "silu_and_mul",
            layers,
            2 * small * width,
            0,
            1,
            lambda _: kernels.silu_and_mul(gate_up),
            lambda _: reference.silu_and_mul(gate_up),
        ),
        Case(
            "rotary_embedding",
            layers,
            small * (heads + kv_heads) * dim,
            0,
            1,
            lambda _: kernels.rotary_embedding(positions, query, key, table),
            lambda _: reference.rotary_embedding(positions, query, key, table),
        ),
    ]
    # Decode: every row a sequence of `context` tokens. Prefill: prompts of up to `context` tokens.
    prefill = rows > 256
    sequences, length = (rows // args.context or 1, min(rows, args.context)) if prefill else (rows, args.context)
    blocks = -(-length // 16)
    caches = [tuple(random(sequences * blocks, 16, kv_heads, dim) for _ in range(2)) for _ in range(layers)]
    tables = torch.randperm(sequences * blocks).view(sequences, blocks).int()
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    per = length if prefill else 1
    starts = torch.arange(sequences + 1, dtype=torch.int32) * per
    slots = torch.randperm(sequences * blocks * 16)[: rows if not prefill else sequences * length]
    rest = (tables, lengths, starts, dim**-0.5)
    q, k, v = (t[: len(slots)] for t in (query, key, value))
    pairs = length * (length + 1) // 2 if prefill else length
    made += [
        Case(
            "reshape_and_cache",
            layers,
            2 * small * kv_heads * dim,
            0,
            layers,
            lambda i: kernels.reshape_and_cache(k, v, *caches[i], slots),
            lambda i: reference.reshape_and_cache(k, v, *caches[i], slots),
        ),
        Case(
            f"attention {sequences}x{per} of {length}",
            layers,
            2 * sequences * length * kv_heads * dim * dtype.itemsize,
            4 * sequences * heads * dim * pairs,
            layers,
            lambda i: kernels.paged_attention(q, *caches[i], *rest),
            lambda i: reference.paged_attention(q, *caches[i], *rest),
        ),
    ]
    return made


def measure(case: Case, rounds: int) -> tuple[float, float]:
    """Median seconds of one call of ours and of torch's. A round calls one contender for some ``BURST`` seconds on
    one copy after another, after a call that wakes the threads and is not counted."""
    contenders = (case.ours, case.torchs)
    times: tuple[list[float], list[float]] = ([], [])
    at = 0

    def timed(call: Callable[[int], object], count: int) -> float:
        nonlocal at
        began = time.perf_counter()
        for _ in range(count):
            call(at % case.copies)
            at += 1
        return (time.perf_counter() - began) / count

    counts = [max(1, min(64, int(BURST / min(timed(call, 1) for _ in range(3))))) for call in contenders]
    for _ in range(rounds):
        for call, count, into in zip(contenders, counts, times, strict=True):
            time.sleep(SETTLE)
            timed(call, 1)
            into.append(timed(call, count))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rows", default="1,16,2048")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=21)
    for name, default in (
        ("hidden", 576),
        ("intermediate", 1536),
        ("heads", 9),
        ("kv-heads", 3),
        ("head-dim", 64),
        ("vocab", 49152),
        ("layers", 30),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    info = kernels.use("compiled")
    bandwidth = read_bandwidth(args.threads)
    time.sleep(SETTLE)
    print(f"{args.threads} threads, memory read {bandwidth / 1e9:.1f} GB/s, kernels {info.library}")
    with torch.inference_mode():
        for dtype in args.dtypes.split(","):
            for rows in map(int, args.rows.split(",")):
                report(args, getattr(torch, dtype), rows, bandwidth)


def report(args: argparse.Namespace, dtype: torch.dtype, rows: int, bandwidth: float) -> None:
    print(f"\n{str(dtype).removeprefix('torch.')}, {rows} rows")
    print(f"{'operation':<28}{'ours µs':>10}{'torch µs':>10}{'ratio':>7}{'GB/s':>7}{'of read':>9}{'GFLOP/s':>9}")
    ours_step = torchs_step = 0.0
    for case in cases(args, dtype, rows):
        ours, torchs = measure(case, args.rounds)
        ours_step += case.per_step * ours
        torchs_step += case.per_step * torchs
        rate = case.bytes_read / ours
        print(
            f"{case.name:<28}{ours * 1e6:>10.1f}{torchs * 1e6:>10.1f}{torchs / ours:>7.2f}{rate / 1e9:>7.1f}"
            f"{rate / bandwidth:>9.0%}{case.flops / ours / 1e9:>9.0f}"
        )
    print(f"{'all of a step, ms':<28}{ours_step * 1e3:>10.1f}{torchs_step * 1e3:>10.1f}{torchs_step / ours_step:>7.2f}")


if __name__ == "__main__":
    main()

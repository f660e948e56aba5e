"""Tokens per second of two pipeline stages, under each transport, against one process and against Ray.

    python benchmarks/pipeline.py MODEL [--contenders uniproc,k8s:torch,k8s:grpc,k8s:shared,ray:torch]
                                  [--dtype float32] [--concurrency 1,8] [--prompt-tokens 64] [--new-tokens 64]
                                  [--rounds 5] [--threads N] [--hand-over] [--json FILE]

A contender is ``uniproc`` (1x1, ``--threads`` of them, by default as many as there are cores) or
``EXECUTOR:TRANSPORT`` (1x2, the same number of threads in all). All are started first and stay; every round asks each
in turn for the same work, so that a slow moment of the machine hits all of them, with prompts of random tokens that are
new in each round. Figures are medians over the rounds; ratios are medians of the rounds' ratios. Where the tokens
differ it is said, and the exit status is 1. (bfloat16 rounds differently in batches of different sizes: compare tokens
in float32.)

``--hand-over`` measures the hand-over alone, between two processes, for one token and for a chunk of 512 of the model's
hidden size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightvllm.transfer.shared import default_directory

NAMES = "uniproc,k8s:torch,k8s:grpc,k8s:shared,ray:torch"


def start(name: str, args: argparse.Namespace) -> Any:
    from lightvllm import LLM

    executor, _, transport = name.partition(":")
    layout: dict[str, Any] = {"threads": args.threads}
    if transport:
        layout = {"pipeline_parallel_size": 2, "pp_transport": transport, "threads": max(1, args.threads // 2)}
    print(f"starting {name}", file=sys.stderr, flush=True)
    return LLM(
        args.model,
        executor=executor,
        dtype=args.dtype,
        max_model_len=args.prompt_tokens + args.new_tokens + 16,
        max_num_seqs=max(args.concurrency),
        enable_prefix_caching=False,
        **layout,
    )


def ask(llm: Any, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the tokens."""
    from lightvllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(map(len, tokens)) / seconds, tokens


def compare(args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """A row for each number of requests and contender; whether all gave the same tokens."""
    names: list[str] = args.contenders.split(",")
    draw = random.Random(0)
    same = True
    rows = []
    with contextlib.ExitStack() as stack:
        llms = {name: stack.enter_context(start(name, args)) for name in names}
        vocabulary = next(iter(llms.values())).config.model.vocab_size
        for concurrency in args.concurrency:
            speeds: dict[str, list[float]] = {name: [] for name in names}
            for number in range(args.rounds + 1):
                prompts = [[draw.randrange(vocabulary) for _ in range(args.prompt_tokens)] for _ in range(concurrency)]
                answers = {}
                turn = names[number % len(names) :] + names[: number % len(names)]
                for name in turn:
                    speed, answers[name] = ask(llms[name], prompts, args.new_tokens)
                    if number:  # the first round warms up
                        speeds[name].append(speed)
                same &= all(tokens == answers[names[0]] for tokens in answers.values())
            for name in names:
                row: dict[str, Any] = {"requests": concurrency, "contender": name}
                row["tokens_per_second"] = statistics.median(speeds[name])
                row["ratio"] = {
                    other: statistics.median(a / b for a, b in zip(speeds[name], speeds[other], strict=True))
                    for other in names
                    if other in ("uniproc", "ray:torch")
                }
                rows.append(row)
    return rows, same


# ----------------------------------------------------------------------------------------- the hand-over itself


def both_ways(name: str, rank: int, pipe: Any, folder: str) -> Any:
    """This process's transport to and from the process at the other end of ``pipe``; ``rank`` is 0 or 1."""
    import torch

    from lightvllm.layers.parallel import ParallelContext, join_store, open_store
    from lightvllm.messages import StageCredentials
    from lightvllm.transfer.stage import Inlet, Outlet, StageTransport

    cpu, peer, limit, capacity = torch.device("cpu"), 1 - rank, 64 << 20, 2
    inlet: Inlet
    outlet: Outlet
    if name == "torch":
        from lightvllm.transfer.group import GroupInlet, GroupOutlet

        if rank == 0:
            store, address = open_store("127.0.0.1", 2)
            pipe.send(address)
        else:
            store = join_store(pipe.recv(), 2)
        groups = ParallelContext.connect(cpu, rank, 1, 2, store, 60.0, local=True).stage_groups
        assert groups is not None
        inlet, outlet = GroupInlet(*groups, peer, capacity, limit, cpu, 60.0), GroupOutlet(*groups, peer, capacity)
    elif name == "grpc":
        from lightvllm.transfer.push import PushInlet, PushOutlet

        credentials = StageCredentials(group="benchmark", token="benchmark")
        inlet = PushInlet("127.0.0.1", credentials, f"to-{rank}", peer, capacity, limit)
        pipe.send(inlet.address)
        outlet = PushOutlet(pipe.recv(), credentials, f"to-{peer}", peer, capacity, 60.0)
    else:
        from lightvllm.transfer.shared import SharedInlet, SharedOutlet

        inlet = SharedInlet(Path(folder), "benchmark", rank, limit)
        pipe.send(inlet.address)
        outlet = SharedOutlet(pipe.recv(), capacity)
    return StageTransport(name, cpu, 60.0, inlet=inlet, previous_rank=peer, outlet=outlet, next_rank=peer)


def echo(pipe: Any, folder: str, works: list[tuple[str, list[int], str, int]]) -> None:
    """The other process: sends back what comes."""
    import torch

    torch.set_num_threads(1)
    for name, shape, dtype, times in works:
        stage = both_ways(name, 1, pipe, folder)
        for tag in range(times):
            stage.send(stage.receive(shape, getattr(torch, dtype), tag), tag)
        pipe.recv()
        stage.close()


def hand_over(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds from ``send`` until another process's ``receive`` returns, half a round trip: median and p99."""
    import torch

    from lightvllm.config import PIPELINE_TRANSPORTS, ModelConfig
    from lightvllm.hub import resolve

    torch.set_num_threads(1)
    model = ModelConfig.from_dir(resolve(args.model), dtype=args.dtype)
    works = [
        (name, [tokens, model.hidden_size], model.dtype, 500) for tokens in (1, 512) for name in PIPELINE_TRANSPORTS
    ]
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory(dir=default_directory()) as folder:
        pipe, theirs = context.Pipe()
        process = context.Process(target=echo, args=(theirs, folder, works), daemon=True)
        process.start()
        for name, shape, dtype, times in works:
            stage = both_ways(name, 0, pipe, folder)
            x = torch.zeros(shape, dtype=getattr(torch, dtype))
            halves = []
            for tag in range(times):
                began = time.perf_counter()
                stage.send(x, tag)
                stage.receive(shape, x.dtype, tag)
                halves.append(1e6 * (time.perf_counter() - began) / 2)
            pipe.send("done")
            stage.close()
            halves = sorted(halves[50:])
            rows.append({"tokens": shape[0], "bytes": x.nbytes, "transport": name})
            rows[-1] |= {"us_p50": statistics.median(halves), "us_p99": halves[int(0.99 * len(halves))]}
        process.join(30)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--contenders", default=NAMES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--hand-over", action="store_true", help="only the time of the hand-over itself")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    same = True
    if args.hand_over:
        rows = hand_over(args)
        for row in rows:
            print(
                f"{row['tokens']:4} tokens, {row['bytes']:8} bytes  {row['transport']:8} "
                f"{row['us_p50']:8.0f} µs p50 {row['us_p99']:8.0f} µs p99"
            )
    else:
        rows, same = compare(args)
        for row in rows:
            ratios = "  ".join(f"× {other} {ratio:.2f}" for other, ratio in row["ratio"].items())
            speed = f"{row['tokens_per_second']:7.1f} tokens/s"
            print(f"{row['requests']:2} at a time  {row['contender']:12} {speed}  {ratios}")
        print("the same tokens everywhere" if same else "the tokens differ")
    if args.json:
        args.json.write_text(json.dumps({"arguments": {**vars(args), "json": None}, "rows": rows}, indent=1))
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Servers under load: ours, vLLM's, and our engine without a server; and whether a long load leaves anything behind.

    python benchmarks/serve.py compare MODEL [--vllm-python .venv-vllm/bin/python] [--concurrency 32] [--rounds 3]
    python benchmarks/serve.py load-test MODEL [--concurrency 200] [--seconds 300] [--vanishing 0.1]

``compare`` starts all contenders, and in each round gives the same requests to each in turn, in an order drawn anew.
Figures are medians over the rounds, ratios medians of the rounds' ratios. Before the rounds each server's streams are
verified once. ``load-test`` keeps our server busy for a time, with clients that vanish, and checks every stream, and
the server's memory, descriptors, threads and blocks before and after. Both end with status 1 if a stream was lost,
mixed up or failed; ``load-test`` also for what leaked. What is sent and how it is checked: ``serve_load.py``.

The load comes from this process, on the same cores; its share of CPU time is part of the report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_contenders import ContenderFailed, LightvllmServer, Offline, Server, Setting, VllmServer
from serve_load import Stream, Verdict, Work, draw, judge, load
from serve_report import PERCENTILES, Sample, Watch, figures, read_gauges, sample, slope, table

QUIET_SECONDS = 30.0  # until a server must have nothing left to do
SHOWN = 10  # reasons of each kind


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_load(server: Server, works: Sequence[Work], **options: Any) -> tuple[list[Stream], float]:
    """The streams, and the share of one core that the load itself has used."""
    cpu, started = time.process_time(), time.perf_counter()
    streams = asyncio.run(load(server.url, server.model, works, **options))
    return streams, (time.process_time() - cpu) / (time.perf_counter() - started)


def settings_of(args: argparse.Namespace) -> tuple[Setting, list[Work]]:
    from lightvllm.hub import resolve

    model = Path(resolve(args.model))
    config = json.loads((model / "config.json").read_text())
    bounds = [tuple(map(int, given.split(":"))) for given in (args.prompt_tokens, args.new_tokens)]
    (_, longest), (_, most) = bounds
    setting = Setting(
        model=str(model),
        dtype=args.dtype,
        threads=args.threads,
        # The engine without a server is given all requests at once: it must not run more of them than the servers get.
        max_num_seqs=min(args.max_num_seqs, args.concurrency),
        max_model_len=min(longest + most + 8, config["max_position_embeddings"]),
        prefix_caching=args.command == "load-test",
        start_timeout=args.start_timeout,
        kv_cache_memory=getattr(args, "kv_cache_memory", None),
    )
    vocab = config["vocab_size"]
    first = min(100, vocab // 4)  # beyond what is special
    works = draw(
        args.pool,
        vocab=vocab,
        prompt_tokens=bounds[0],
        new_tokens=bounds[1],
        seed=args.seed,
        first_token=first,
        greedy=getattr(args, "greedy", False),
    )
    return setting, works


def show_verdict(name: str, verdict: Verdict) -> None:
    print(
        f"{name}: {verdict.done} streams ended, {verdict.vanished} clients vanished, {len(verdict.failed)} failed, "
        f"{len(verdict.lost)} lost, {len(verdict.mixed)} mixed up; of {verdict.compared} compared with their reference "
        f"{verdict.compared - len(verdict.unlike)} are equal"
        + (
            f", the others up to {statistics.median(verdict.unlike):.0%} of their length (median)"
            if verdict.unlike
            else ""
        )
    )
    for reason in [*verdict.failed[:SHOWN], *verdict.lost[:SHOWN], *verdict.mixed[:SHOWN]]:
        print(f"  {reason}")


def show_figures(rows: dict[str, dict[str, float]]) -> None:
    """Milliseconds; a row for each contender."""
    for measure, meaning in (
        ("ttft", "time to first token"),
        ("tpot", "time per output token, by stream"),
        ("itl", "between two events of a stream"),
        ("e2e", "request"),
    ):
        heading: list[Any] = [f"{meaning} (ms)", *(f"p{p}" for p in PERCENTILES)]
        cells = [
            [name, *(row[f"{measure}_p{p}"] * 1000 for p in PERCENTILES)]
            for name, row in rows.items()
            if f"{measure}_p50" in row
        ]
        print("\n" + table([heading, *cells]))


# ------------------------------------------------------------------------------------------------------- compare


def compare(args: argparse.Namespace) -> int:
    setting, works = settings_of(args)
    rounds: dict[str, list[dict[str, float]]] = {}
    good = True
    with contextlib.ExitStack() as stack:
        offline = stack.enter_context(Offline(setting, args.debug)) if "offline" in args.contenders else None
        servers: list[Server] = []
        if "lightvllm" in args.contenders:
            servers.append(stack.enter_context(LightvllmServer(setting, args.serve_option)))
        if "vllm" in args.contenders and args.vllm_python:
            servers.append(stack.enter_context(VllmServer(setting, args.vllm_python)))
        say(f"started: {', '.join([*(s.name for s in servers), *(['offline'] if offline else [])])}")
        references = offline.run(works)[1] if offline else {}
        bounds = {"concurrency": args.concurrency, "requests": len(works), "timeout": args.timeout}
        for server in servers:
            streams, _ = run_load(server, works, **bounds)
            verdict = judge(streams, references if server.name == "lightvllm" else {})
            show_verdict(server.name, verdict)
            if not verdict.done:
                raise ContenderFailed(
                    f"{server.name} has answered none of {len(works)} requests; its output: {server.log}"
                )
            good &= verdict.good
        order: list[Server | Offline] = [*servers, *([offline] if offline else [])]
        for number in range(args.rounds):
            fresh = draw_again(args, setting, works, number)
            random.Random(args.seed + number).shuffle(order)
            for contender in order:
                if isinstance(contender, Offline):
                    seconds, tokens = contender.run(fresh)
                    count = sum(map(len, tokens.values()))
                    row = {"seconds": seconds, "tokens": count, "tokens_per_second": count / seconds}
                else:
                    streams, cpu = run_load(contender, fresh, verified=False, **bounds)
                    verdict = judge(streams, {})
                    if not verdict.good:
                        show_verdict(contender.name, verdict)
                        good = False
                    row = figures(streams) | {"load_cpu": cpu}
                rounds.setdefault(contender.name, []).append(row)
                say(f"round {number + 1}: {contender.name} {row['tokens_per_second']:.1f} tokens/s")
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in rounds.items()
    }
    if medians:
        show_comparison(args, rounds, medians)
    if args.json:
        args.json.write_text(json.dumps({"settings": plain(args), "rounds": rounds, "good": good}, indent=1))
    return 0 if good else 1


def draw_again(args: argparse.Namespace, setting: Setting, works: list[Work], number: int) -> list[Work]:
    """The same lengths and kinds with prompts that no prefix cache has seen."""
    generator = random.Random(args.seed + 1000 * (number + 1))
    tokens = sorted({token for work in works for token in work.prompt})
    return [
        Work(
            number=work.number,
            prompt=[generator.choice(tokens) for _ in work.prompt],
            max_tokens=work.max_tokens,
            temperature=work.temperature,
            seed=work.seed + number,
            own=work.own,
        )
        for work in works
    ]


def show_comparison(
    args: argparse.Namespace, rounds: dict[str, list[dict[str, float]]], medians: dict[str, dict[str, float]]
) -> None:
    print(
        f"\n{args.dtype}, {args.threads} threads, {args.concurrency} streams, {args.pool} requests per round, "
        f"prompts of {args.prompt_tokens} and outputs of {args.new_tokens} tokens, medians of {args.rounds} rounds\n"
    )
    ours = rounds.get("lightvllm")
    heading: list[Any] = ["", "tokens/s", "ours / it", "rounds", "load's CPU"]
    rows = []
    for name, row in medians.items():
        ratios = [
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours or [], rounds[name], strict=bool(ours))
        ]
        rows.append(
            [
                name,
                row["tokens_per_second"],
                f"{statistics.median(ratios):.2f}" if ratios else "",
                f"{min(ratios):.2f}–{max(ratios):.2f}" if ratios else "",
                f"{row['load_cpu']:.0%}" if "load_cpu" in row else "",
            ]
        )
    print(table([heading, *rows]))
    show_figures(medians)


# ----------------------------------------------------------------------------------------------------- load test


def load_test(args: argparse.Namespace) -> int:
    setting, works = settings_of(args)
    leaks: list[str] = []
    with LightvllmServer(setting, args.serve_option) as server:
        say(f"started: {server.url}")
        run_load(server, works, concurrency=args.concurrency, requests=min(len(works), 2 * args.concurrency))
        at_start = settle(server)
        say(f"load: {args.concurrency} streams for {args.seconds:g} s")
        with Watch(server.pid, args.interval) as watch:
            streams, cpu = run_load(
                server,
                works,
                concurrency=args.concurrency,
                seconds=args.seconds,
                vanishing=args.vanishing,
                seed=args.seed,
                timeout=args.timeout,
            )
        at_end = settle(server)
    middle = watch.samples[len(watch.samples) // 2]
    leaks += compare_ends(at_start, at_end, middle, args.max_growth_mib)
    asked = {stream.work.number for stream in streams}
    say("the same requests without a server, for reference")
    with Offline(setting, args.debug) as offline:
        seconds, references = offline.run([work for work in works if work.number in asked])
    verdict = judge(streams, references)
    row = figures(streams)
    show_verdict("load-test", verdict)
    count = sum(map(len, references.values()))
    growth = slope(watch.samples)
    print(
        f"{row['seconds']:.0f} s, {row['requests']:.0f} requests, {row['tokens_per_second']:.1f} tokens/s (those of "
        f"vanished clients as far as they came); the engine alone on the same pool: {count / seconds:.1f} tokens/s; "
        f"the load used {cpu:.0%} of a core"
    )
    most = max(s.memory_mib for s in watch.samples)
    print(
        f"server: {at_start[0].memory_mib:.0f} MiB before, {middle.memory_mib:.0f} at half-time, "
        f"{at_end[0].memory_mib:.0f} after, {most:.0f} at most, {growth:+.1f} MiB a minute in the later half; "
        f"{at_start[0].fds} descriptors before, {at_end[0].fds} after; {at_start[0].threads} threads before, "
        f"{at_end[0].threads} after; KV cache held: {at_start[1]['kv']:.2%} before, {at_end[1]['kv']:.2%} after"
    )
    for leak in leaks:
        print(f"  {leak}")
    show_figures({"": row})
    if args.json:
        samples = [s.__dict__ for s in watch.samples]
        report = {"settings": plain(args), "figures": row, "verdict": verdict.__dict__, "leaks": leaks}
        args.json.write_text(json.dumps(report | {"samples": samples, "growth_mib_per_minute": growth}, indent=1))
    return 0 if verdict.good and not leaks else 1


def settle(server: Server) -> tuple[Sample, dict[str, float]]:
    """The server's state once nothing runs and no cache is held; or as it is after ``QUIET_SECONDS``."""
    until = time.monotonic() + QUIET_SECONDS
    while True:
        gauges = read_gauges(server.url)
        if not any(gauges.values()) or time.monotonic() > until:
            time.sleep(0.5)  # connections' ends
            return sample(server.pid), gauges
        time.sleep(0.2)


def compare_ends(
    at_start: tuple[Sample, dict[str, float]],
    at_end: tuple[Sample, dict[str, float]],
    middle: Sample,
    max_growth_mib: float,
) -> list[str]:
    """What there is more of than before; of memory, than at half-time, when all of the KV cache has been written to."""
    (before, _), (after, gauges) = at_start, at_end
    leaks = [f"leak: {name} is {value:g} after the load" for name, value in gauges.items() if value != 0]
    for name, more in (("fds", 2), ("threads", 2), ("processes", 0)):
        was, now = getattr(before, name), getattr(after, name)
        if now > was + more:
            leaks.append(f"leak: {now} {name} after the load, {was} before")
    if after.memory_mib > middle.memory_mib + max_growth_mib:
        leaks.append(f"leak: {after.memory_mib:.0f} MiB after the load, {middle.memory_mib:.0f} at half-time")
    return leaks


def plain(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "run"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", help="a folder, or a name that `lightvllm models get` knows")
    common.add_argument("--prompt-tokens", default="8:256", help="shortest:longest (default %(default)s)")
    common.add_argument("--new-tokens", default="8:128", help="shortest:longest (default %(default)s)")
    common.add_argument("--max-num-seqs", type=int, default=64)
    common.add_argument("--threads", type=int, default=2)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--timeout", type=float, default=600.0, help="seconds that one stream may take")
    common.add_argument("--start-timeout", type=float, default=600.0, help="seconds that a contender may take to start")
    common.add_argument("--serve-option", action="append", default=[], help="one more for lightvllm serve, with =")
    common.add_argument("--json", type=Path)
    common.add_argument("--debug", action="store_true", help="show what the offline engine prints")

    one = commands.add_parser("compare", parents=[common])
    one.add_argument("--contenders", default="lightvllm,offline,vllm")
    one.add_argument("--vllm-python", help="an interpreter that has vllm; without it vLLM does not take part")
    one.add_argument("--dtype", default="bfloat16")
    one.add_argument("--concurrency", type=int, default=32)
    one.add_argument("--pool", type=int, default=128, help="requests of a round (default %(default)s)")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument(
        "--greedy",
        action="store_true",
        help="no sampling, no biases: vLLM 0.32 on a CPU ends at the first request that is sampled with a seed",
    )
    one.set_defaults(run=compare)

    two = commands.add_parser("load-test", parents=[common])
    two.add_argument("--dtype", default="float32", help="default %(default)s: texts hardly depend on the batch")
    two.add_argument("--concurrency", type=int, default=200)
    two.add_argument("--seconds", type=float, default=300.0)
    two.add_argument("--pool", type=int, default=400, help="different requests (default %(default)s)")
    two.add_argument("--vanishing", type=float, default=0.1, help="share of clients that leave in the middle")
    two.add_argument("--interval", type=float, default=1.0, help="seconds between two samples of memory")
    two.add_argument("--max-growth-mib", type=float, default=32.0, help="more memory after half-time is a leak")
    two.add_argument("--kv-cache-memory", default="512MiB", help="small, so that all of it is soon in use")
    two.set_defaults(run=load_test)

    args = parser.parse_args()
    if args.command == "compare":
        args.contenders = args.contenders.split(",")
    try:
        return int(args.run(args))
    except (ContenderFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

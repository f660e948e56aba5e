"""Tokens per second of our engine, transformers' ``generate`` and vLLM's CPU build, on the same weights.

    python benchmarks/engine.py MODEL [--vllm-python .venv-vllm/bin/python] [--dtypes float32,bfloat16]
                                [--concurrency 1,16] [--rounds 3] [--threads 2] [--json FILE]
    python benchmarks/engine.py MODEL --contenders lightvllm,lightvllm-sync [--rounds 7]    # asynchronous scheduling
    python benchmarks/engine.py MODEL --contenders lightvllm,lightvllm-async --concurrency 64,200        # AsyncLLM

Each contender is a process of its own that loads the model once and then waits on its standard input. Every round asks
each contender in turn for the same work (so that a slow moment of the machine hits all of them), with prompts of random
tokens that are new in each round (so that no prefix cache helps). Figures are medians over the rounds; ratios are
medians of the rounds' ratios, the first contender's to each. MODEL is a folder or a name that ``lightvllm models get``
knows.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[list[list[int]], int], int]  # (prompts, tokens to generate for each) -> tokens generated in all


# ------------------------------------------------------------------------------------------- contenders


def lightvllm_contender(
    model: str, dtype: str, threads: int, length: int, **options: Any
) -> tuple[Run, Callable[[], dict[str, Any]]]:
    from lightvllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, threads=threads, max_model_len=length, enable_prefix_caching=False, **options)

    def run(prompts: list[list[int]], new: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    def details() -> dict[str, Any]:
        info = llm.engine.executor.worker_infos[0]
        return {"attention": info.attention_backend, "kernels": info.kernels, "threads": info.threads}

    return run, details


def async_contender(
    model: str, dtype: str, threads: int, length: int, **options: Any
) -> tuple[Run, Callable[[], dict[str, Any]]]:
    """A stream of its own for each prompt, read as the tokens come; ``details`` has the reading process's CPU time."""
    from lightvllm import AsyncLLM, SamplingParams

    loop = asyncio.new_event_loop()
    llm = loop.run_until_complete(
        AsyncLLM.create(
            model,
            dtype=dtype,
            threads=threads,
            max_model_len=length,
            max_num_seqs=64,
            enable_prefix_caching=False,
            **options,
        )
    )
    atexit.register(lambda: loop.run_until_complete(llm.shutdown()))
    cost = {"outputs": 0, "cpu_seconds": 0.0}

    async def read(prompt: list[int], params: Any) -> int:
        tokens = 0
        async for output in llm.generate(prompt, params, output_kind="delta"):
            cost["outputs"] += 1
            tokens += len(output.outputs[0].token_ids)
        return tokens

    async def read_all(prompts: list[list[int]], new: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        return sum(await asyncio.gather(*(read(prompt, params) for prompt in prompts)))

    def run(prompts: list[list[int]], new: int) -> int:
        before = time.process_time()
        cost.update(outputs=0)
        tokens = loop.run_until_complete(read_all(prompts, new))
        cost["cpu_seconds"] = time.process_time() - before
        return tokens

    def details() -> dict[str, Any]:
        return {"front_us_per_output": round(1e6 * cost["cpu_seconds"] / cost["outputs"], 1)}

    return run, details


def transformers_contender(
    model: str, dtype: str, threads: int, length: int
) -> tuple[Run, Callable[[], dict[str, Any]]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def run(prompts: list[list[int]], new: int) -> int:
        ids = torch.tensor(prompts)
        out = loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return int((out.shape[1] - ids.shape[1]) * ids.shape[0])

    return run, dict


def vllm_contender(model: str, dtype: str, threads: int, length: int) -> tuple[Run, Callable[[], dict[str, Any]]]:
    import vllm

    llm = vllm.LLM(
        model,
        dtype=dtype,
        max_model_len=length,
        max_num_seqs=64,
        enable_prefix_caching=False,
        enforce_eager=os.environ.get("VLLM_EAGER") == "1",
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )

    def run(prompts: list[list[int]], new: int) -> int:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return run, lambda: {"vllm": vllm.__version__}


CONTENDERS: dict[str, Callable[..., tuple[Run, Callable[[], dict[str, Any]]]]] = {
    "lightvllm": lightvllm_contender,
    "lightvllm-sync": functools.partial(lightvllm_contender, async_scheduling=False),
    "lightvllm-async": async_contender,
    "lightvllm-async-thread": functools.partial(async_contender, engine_process=False),
    "lightvllm-k8s": functools.partial(lightvllm_contender, executor="k8s"),
    "lightvllm-k8s-sync": functools.partial(lightvllm_contender, executor="k8s", async_scheduling=False),
    "transformers": transformers_contender,
    "vllm": vllm_contender,
}

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def peak_memory_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def contend(name: str, model: str, dtype: str, threads: int, length: int) -> None:
    """Serve rounds over standard input and output; whatever the contender prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    run, details = CONTENDERS[name](model, dtype, threads, length)
    print(json.dumps({"start_seconds": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        begun = time.perf_counter()
        tokens = run(work["prompts"], work["new"])
        seconds = time.perf_counter() - begun
        answer = {"seconds": seconds, "tokens": tokens, "peak_mib": peak_memory_mib(), "details": details()}
        print(json.dumps(answer), file=answers, flush=True)


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, python: str, args: argparse.Namespace, model: str, dtype: str) -> None:
        self.name = name
        length = str(args.prompt_tokens + args.new_tokens + 16)
        environment = dict(
            os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(args.threads), TOKENIZERS_PARALLELISM="0"
        )
        if name == "vllm":
            environment |= VLLM_ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}"}
            environment |= {key: value for key, value in os.environ.items() if key.startswith("VLLM_")}
        self.process = subprocess.Popen(
            [python, __file__, model, "--contend", name, dtype, str(args.threads), length],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.debug else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.start_seconds = self._read()["start_seconds"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}; run again with --debug to see why")
        return dict(json.loads(line))

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "new": new}), file=self.process.stdin, flush=True)
        answer = self._read()
        assert answer["tokens"] == len(prompts) * new, f"{self.name} generated {answer['tokens']} tokens"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--vllm-python", help="an interpreter that has vllm; without it vLLM does not take part")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--concurrency", default="1,16")
    parser.add_argument("--contenders", default="lightvllm,transformers,vllm")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--debug", action="store_true", help="show what the contenders print")
    parser.add_argument("--contend", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend:
        name, dtype, threads, length = args.contend
        contend(name, args.model, dtype, int(threads), int(length))
        return

    from lightvllm.hub import resolve

    model = str(resolve(args.model))
    vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    pythons = dict.fromkeys(CONTENDERS, sys.executable) | {"vllm": args.vllm_python}
    names = [name for name in args.contenders.split(",") if pythons[name]]
    generator = random.Random(0)
    rows = []
    for dtype in args.dtypes.split(","):
        contenders: list[Contender] = []
        try:
            for name in names:
                contenders.append(Contender(name, pythons[name], args, model, dtype))  # noqa: PERF401  closed below
            for concurrency in map(int, args.concurrency.split(",")):
                speeds: dict[str, list[float]] = {name: [] for name in names}
                answers: dict[str, dict[str, Any]] = {}
                for number in range(args.rounds + 1):  # the first one warms up
                    prompts = [
                        [generator.randrange(100, vocab) for _ in range(args.prompt_tokens)] for _ in range(concurrency)
                    ]
                    for contender in contenders:
                        new = args.new_tokens if number else 8
                        answers[contender.name] = contender.run(prompts, new)
                        if number:
                            speeds[contender.name].append(concurrency * new / answers[contender.name]["seconds"])
                for contender in contenders:
                    name = contender.name
                    ratios = [a / b for a, b in zip(speeds[names[0]], speeds[name], strict=True)]
                    rows.append(
                        {
                            "dtype": dtype,
                            "concurrency": concurrency,
                            "contender": name,
                            "tokens_per_second": round(statistics.median(speeds[name]), 1),
                            "first_ratio": round(statistics.median(ratios), 2),
                            "start_seconds": round(contender.start_seconds, 1),
                            "peak_mib": round(answers[name]["peak_mib"]),
                            "details": answers[name]["details"],
                        }
                    )
        finally:
            for contender in contenders:
                contender.close()
    print(
        f"{'dtype':<10}{'concurrent':>11}  {'contender':<20}{'tokens/s':>10}{'first / it':>11}"
        f"{'peak MiB':>10}{'start s':>9}"
    )
    for row in rows:
        print(
            f"{row['dtype']:<10}{row['concurrency']:>11}  {row['contender']:<20}{row['tokens_per_second']:>10}"
            f"{row['first_ratio']:>11}{row['peak_mib']:>10}{row['start_seconds']:>9}"
        )
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": str(args.json)}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""What a step costs the driver: scheduling, text, stop rules and outputs, over an executor that answers at once.

    python benchmarks/driver.py MODEL [--streams 200] [--new-tokens 400] [--rounds 3] [--profile]

Only MODEL's tokenizer and configuration are used, no weights. Each row is one way to ask for outputs; a figure is the
median over the rounds of the mean driver time of one decode step in which every stream gets a token, in the first and
in the last quarter of the streams' length (what grows with the length shows in the difference).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from concurrent.futures import Future

from lightvllm.config import EngineConfig, ModelConfig, SchedulerConfig
from lightvllm.engine.engine import LLMEngine
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.hub import resolve
from lightvllm.messages import StepInput, StepOutput, TokenLogprobs
from lightvllm.sampling_params import SamplingParams

CASES: dict[str, dict[str, object]] = {
    "final": {"stream": False},
    "delta": {"stream": "delta"},
    "cumulative": {"stream": True},
    "delta, 2 stop strings": {"stream": "delta", "params": {"stop": ["\n\nUser:", "<|end|>"]}},
    "delta, 2 logprobs": {"stream": "delta", "params": {"logprobs": 2}},
    "cumulative, 2 logprobs": {"stream": True, "params": {"logprobs": 2}},
    "delta, async": {"stream": "delta", "async": True},
}


class Answering:
    """An executor whose workers take no time: every sampled sequence gets a token of a fixed random text."""

    max_concurrent_batches = 1
    step_timeout = 10.0

    def __init__(self, num_kv_blocks: int, token_ids: list[int]) -> None:
        self.num_kv_blocks = num_kv_blocks
        self._tokens = token_ids
        self._lengths: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        self.seconds = 0.0

    def execute_model(self, scheduler_output: StepInput, non_block: bool = False) -> Future[StepOutput]:
        began = time.perf_counter()
        for new in scheduler_output.new:
            self._lengths[new.seq_id] = len(new.token_ids)
            if new.sampling.logprobs is not None:
                self._wanted[new.seq_id] = new.sampling.logprobs
        seq_ids, token_ids, logprobs = [], [], {}
        for row in scheduler_output.scheduled:
            self._lengths[row.seq_id] += len(row.new_token_ids)
            end = row.start + row.count
            if end == self._lengths[row.seq_id]:
                seq_ids.append(row.seq_id)
                token_ids.append(self._tokens[(row.seq_id * 7919 + end) % len(self._tokens)])
                count = self._wanted.get(row.seq_id)
                if count is not None:
                    top = list(range(1000, 1000 + count))
                    logprobs[row.seq_id] = TokenLogprobs(-0.5, 1, top, [-1.0] * count)
        future: Future[StepOutput] = Future()
        future.set_result(
            StepOutput(
                step=scheduler_output.step, seq_ids=seq_ids, token_ids=token_ids, logprobs=logprobs, model_seconds=0.0
            )
        )
        self.seconds += time.perf_counter() - began
        return future

    def shutdown(self) -> None: ...


def run(model: str, streams: int, new: int, case: dict[str, object], profile: cProfile.Profile | None) -> list[float]:
    """Driver seconds of each step in which every stream gets a token."""
    tokenizer = Tokenizer.from_dir(model)
    generator = random.Random(0)
    text = " ".join(generator.choice(["the", "quick", "Grüße", "東京", "fox,", "jumps\n", "42"]) for _ in range(9000))
    config = EngineConfig(
        model=ModelConfig.from_dir(model, load_format="dummy"),
        scheduler=SchedulerConfig(
            max_num_seqs=streams, max_num_batched_tokens=max(8192, streams), async_scheduling=bool(case.get("async"))
        ),
    )
    executor = Answering(streams * (-(-(new + 64) // config.cache.block_size) + 1), tokenizer.encode(text))
    engine = LLMEngine(config, executor, tokenizer=tokenizer)
    params = SamplingParams(max_tokens=new, ignore_eos=True, **case.get("params", {}))  # type: ignore[arg-type]
    for i in range(streams):
        prompt = [generator.randrange(100, 40_000) for _ in range(32)]
        engine.add_request(str(i), prompt, params, stream=case["stream"])  # type: ignore[arg-type]
    seconds = []
    while engine.has_unfinished_requests():
        executor.seconds = 0.0
        before = engine.stats().total_generation_tokens
        began = time.perf_counter()
        if profile is not None:
            profile.enable()
        engine.step()
        if profile is not None:
            profile.disable()
        spent = time.perf_counter() - began - executor.seconds
        if engine.stats().total_generation_tokens - before == streams:
            seconds.append(spent)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES).replace(", ", ";"), help="';' stands for ', ' in a name")
    parser.add_argument("--profile", action="store_true", help="show where the time of the first case goes")
    args = parser.parse_args()
    model = str(resolve(args.model))
    names = [name.replace(";", ", ") for name in args.cases.split(",")]
    if args.profile:
        profile = cProfile.Profile()
        run(model, args.streams, args.new_tokens, CASES[names[0]], profile)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            seconds = run(model, args.streams, args.new_tokens, CASES[name], None)
            quarter = len(seconds) // 4
            found[name].append((statistics.mean(seconds[:quarter]), statistics.mean(seconds[-quarter:])))
    print(f"{'outputs':<26}{'first quarter':>16}{'last quarter':>16}   microseconds a step, {args.streams} streams")
    for name in names:
        first, last = (statistics.median(part) * 1e6 for part in zip(*found[name], strict=True))
        print(f"{name:<26}{first:>16.0f}{last:>16.0f}")


if __name__ == "__main__":
    main()

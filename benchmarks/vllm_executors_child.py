"""The process of one contender of ``vllm_executors.py``: vLLM's ``AsyncLLM``, which runs the streams it is told to.

    python vllm_executors_child.py '{"backend": "mp", "model": "...", "layout": [1, 2], ...}'

Lines of JSON on standard input and output, as in ``rpc_child.py``: for each list of requests, when the tokens of each
came. ``worker_servers`` of ours run in this process's group of processes and end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rpc_child import run_child

_END_SECONDS = 20.0


def serve(spec: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """
    spec: ``backend``: as for ``--distributed-executor-backend``; ``model``: a folder; ``layout``: tensor and pipeline
        ranks; ``dtype``, ``max_model_len``, ``max_num_seqs``; ``compilation``: vLLM's compilation configuration;
        ``certificates``: None, or a folder of ``lightvllm certs`` for worker servers at 127.0.0.1.
    """
    with contextlib.ExitStack() as stack:
        if spec["certificates"] is not None:
            tensor, pipeline = spec["layout"]
            os.environ.update(stack.enter_context(_worker_servers(tensor * pipeline, Path(spec["certificates"]))))
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        begun = time.perf_counter()
        engine = _make_engine(spec)
        stack.callback(engine.shutdown, timeout=_END_SECONDS)
        seconds = time.perf_counter() - begun
        gc.collect()
        gc.freeze()  # what has been imported is not gone through again
        say({"ready": True, "start_seconds": seconds, "about": _about()})
        numbers = itertools.count()
        for line in sys.stdin:
            order = json.loads(line)
            say({"streams": loop.run_until_complete(_run(engine, order["works"], order["concurrency"], numbers))})


@contextlib.contextmanager
def _worker_servers(count: int, certificates: Path) -> Iterator[dict[str, str]]:
    """``lightvllm worker`` with mutual TLS, and the variables that lead a driver to them."""
    from rpc_lightvllm import start_servers

    own, drivers = certificates / "workers" / "127.0.0.1", certificates / "drivers" / "driver"
    files = {"token-file": "token", "tls-cert": "cert.pem", "tls-key": "key.pem", "tls-ca": "ca.pem"}
    options = [text for option, name in files.items() for text in (f"--{option}", str(own / name))]
    with contextlib.ExitStack() as stack:
        addresses = start_servers(stack, count, options)
        settings = {option.replace("-", "_").upper(): str(drivers / name) for option, name in files.items()}
        yield {f"LIGHTVLLM_K8S_{name}": value for name, value in (settings | {"WORKERS": ",".join(addresses)}).items()}


def _make_engine(spec: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    tensor, pipeline = spec["layout"]
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=spec["model"],
            dtype=spec["dtype"],
            max_model_len=spec["max_model_len"],
            max_num_seqs=spec["max_num_seqs"],
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            distributed_executor_backend=spec["backend"],
            compilation_config=spec["compilation"],
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
    )


def _about() -> str:
    from vllm.version import __version__

    return f"vllm {__version__}"


async def _run(
    engine: Any, works: Sequence[dict[str, Any]], concurrency: int, numbers: Iterator[int]
) -> list[dict[str, Any]]:
    """All of ``works``, in order, so many at a time; in that order, when each began, and when how many tokens came."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    streams: list[dict[str, Any]] = []
    left = iter(works)

    async def client() -> None:
        for work in left:
            params = SamplingParams(
                temperature=0.0,
                max_tokens=work["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            tokens: list[int] = []
            stream = {"number": work["number"], "begun": time.perf_counter(), "arrivals": [], "tokens": tokens}
            streams.append(stream)
            prompt = {"prompt_token_ids": work["prompt"]}
            async for output in engine.generate(prompt, params, f"request-{next(numbers)}"):
                stream["arrivals"].append(time.perf_counter())
                tokens += output.outputs[0].token_ids
            stream["ended"] = time.perf_counter()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return streams


if __name__ == "__main__":
    run_child(serve)

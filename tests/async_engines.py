"""AsyncLLMs over the fake executor, for tests of either mode; and what to compare them with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fake_core
import pytest
import tiny_tokenizers

from lightvllm import LLM, SamplingParams
from lightvllm.engine import core_process
from lightvllm.engine.async_llm import AsyncLLM
from lightvllm.engine.outputs import RequestOutput
from lightvllm.executors import factory

LIMIT = 60.0  # seconds that any one wait may take


def write_model(folder: Path) -> Path:
    """A folder with a configuration and a tokenizer; the fake needs no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": fake_core.VOCAB_SIZE,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tiny_tokenizers.byte_level(folder)


def use_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and in engine processes that it starts."""
    monkeypatch.setattr(factory, "make_executor", fake_core.make_executor)
    monkeypatch.setattr(core_process, "EXECUTOR_FACTORY", "fake_core:make_executor")


Make = Callable[..., Awaitable[AsyncLLM]]
SMALL: dict[str, Any] = {
    "load_format": "dummy",
    "block_size": 4,
    "num_kv_blocks": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


def llm_answers(folder: Path, prompts: list[Any], params: list[SamplingParams]) -> list[RequestOutput]:
    """What LLM says."""
    with LLM(folder, **SMALL) as llm:
        return llm.generate(prompts, params)


def plain(output: RequestOutput) -> Any:
    """What must be the same wherever a request was run."""
    return [(o.index, o.text, o.token_ids, o.logprobs, o.finish_reason, o.stop_reason) for o in output.outputs]


async def when(engine: AsyncLLM, condition: Callable[[], Any], what: str) -> None:
    """Wait until something is true of the engine, which is looked at when the engine says that it has changed."""
    changed = asyncio.Event()
    end = engine.on_change(changed.set)
    try:
        async with asyncio.timeout(LIMIT):
            while not condition():
                await changed.wait()
                changed.clear()
    except TimeoutError:
        raise AssertionError(f"not within {LIMIT:g} s: {what}; {engine.stats}") from None
    finally:
        end()


async def idle(engine: AsyncLLM) -> None:
    """Wait until nothing runs; then every block is free."""
    await when(engine, lambda: not (engine.stats.num_running or engine.stats.num_waiting), "the engine is idle")
    assert engine.stats.num_free_kv_blocks == engine.stats.num_kv_blocks


async def collect(stream: Any) -> list[RequestOutput]:
    async with asyncio.timeout(LIMIT):
        return [output async for output in stream]

"""An engine over the fake executor, for tests of what the engine does."""

from __future__ import annotations

from typing import Any

from fake_executor import FakeExecutor, NextToken

from lightvllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from lightvllm.engine.engine import LLMEngine
from lightvllm.engine.outputs import RequestOutput
from lightvllm.engine.tokenizer import Tokenizer

EOS, OTHER_EOS = 1, 2


def engine(
    next_token: NextToken,
    tokenizer: Tokenizer | None = None,
    *,
    max_model_len: int = 200,
    max_num_seqs: int = 8,
    budget: int = 32,
    caching: bool = True,
    num_kv_blocks: int = 64,
    depth: int = 1,
    seed: int = 0,
    async_scheduling: bool = False,
    **options: Any,
) -> tuple[LLMEngine, FakeExecutor]:
    vocab_size = 266
    model = ModelConfig(
        path="",
        architecture="LlamaForCausalLM",
        dtype="float32",
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=max_model_len,
        tie_word_embeddings=True,
        eos_token_ids=(EOS, OTHER_EOS),
    )
    config = EngineConfig(
        model=model,
        cache=CacheConfig(block_size=4, enable_prefix_caching=caching),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, async_scheduling=async_scheduling
        ),
        seed=seed,
    )
    executor = FakeExecutor(
        next_token,
        num_kv_blocks=num_kv_blocks,
        block_size=4,
        max_concurrent_batches=depth,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        vocab_size=vocab_size,
        lookahead=async_scheduling,
    )
    return LLMEngine(config, executor, tokenizer=tokenizer, **options), executor


def finish(e: LLMEngine, limit: int = 5000) -> dict[str, RequestOutput]:
    """Step until nothing is left; the last output of each request."""
    last: dict[str, RequestOutput] = {}
    for _ in range(limit):
        if not e.has_unfinished_requests():
            return last
        for output in e.step():
            before = last.get(output.request_id)
            assert before is None or not before.finished, "nothing follows a finished output"
            last[output.request_id] = output
    raise AssertionError(f"unfinished after {limit} steps")

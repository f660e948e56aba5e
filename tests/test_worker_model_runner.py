"""Steps on one rank: the tokens are transformers', whatever the batch, the chunks and the preemptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
import torch
from worker_group import Driver, LocalWorker

from lightvllm.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig
from lightvllm.errors import LightvllmError
from lightvllm.messages import SAMPLED_LAST, NewSequence, ScheduledSequence
from lightvllm.sampling_params import SamplingParams

PROMPTS = [[5, 60, 7, 300, 9], [11], list(range(40, 63)), [330, 0, 329, 328]]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """transformers' greedy continuation of each prompt, 12 tokens."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def driver(folder: Path, attention: Any = "sdpa", kernels: Any = "reference", **fields: Any) -> Driver:
    config = EngineConfig(
        model=ModelConfig.from_dir(folder),
        cache=CacheConfig(block_size=4),
        device=DeviceConfig(device="cpu", threads=1, attention_backend=attention, kernels=kernels),
        **fields,
    )
    return Driver(LocalWorker(), config)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("attention", ["naive", "sdpa", "paged"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 8])
def test_greedy_tokens_are_transformers(
    folder: Path, expected: list[list[int]], attention: str, kernels: str, chunk: int | None
) -> None:
    assert driver(folder, attention, kernels).generate(PROMPTS, 12, chunk=chunk) == expected


def test_each_sequence_alone_gives_the_same(folder: Path, expected: list[list[int]]) -> None:
    alone = driver(folder)
    assert [alone.generate([prompt], 12)[0] for prompt in PROMPTS] == expected


def test_a_seed_gives_the_same_text_in_any_batch(folder: Path) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.95)
    group = driver(folder)
    together = group.generate(PROMPTS, 10, sampling, seeds=[3, 4, 5, 6])
    for prompt, seed, tokens in zip(PROMPTS, (3, 4, 5, 6), together, strict=True):
        assert group.generate([prompt], 10, sampling, seeds=[seed]) == [tokens]
    assert group.generate(PROMPTS, 10, sampling, seeds=[3, 4, 5, 6], chunk=2) == together
    assert group.generate(PROMPTS, 10, sampling, seeds=[7, 8, 9, 10]) != together


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, repetition_penalty=1.2)])
def test_a_recomputed_sequence_goes_on_as_it_would_have(folder: Path, sampling: SamplingParams) -> None:
    whole = driver(folder).generate([PROMPTS[0]], 10, sampling, seeds=[1])[0]
    group, prompt = driver(folder), PROMPTS[0]
    again = NewSequence(0, prompt + whole[:6], len(prompt), 1, sampling, [])
    output = group.step(new=[again], scheduled=[ScheduledSequence(0, 0, len(prompt) + 6, [], [9, 8, 7, 6])])
    tokens = [*output.token_ids]
    for n in range(3):
        output = group.step(scheduled=[ScheduledSequence(0, len(prompt) + 6 + n, 1, [tokens[-1]], [])])
        tokens += output.token_ids
    assert tokens == whole[6:]


def test_a_shared_prefix_is_read_from_its_blocks(folder: Path) -> None:
    """The second sequence computes only what follows the first one's full blocks."""
    group = driver(folder, return_logits=True)
    first = PROMPTS[2]
    second = [*first[:20], 7, 8, 9]
    new = NewSequence(2, second, len(second), 0, GREEDY, [])
    whole = driver(folder, return_logits=True).step(
        new=[new], scheduled=[ScheduledSequence(2, 0, len(second), [], [0, 1, 2, 3, 4, 5])]
    )
    group.step(
        new=[NewSequence(1, first, len(first), 0, GREEDY, [])],
        scheduled=[ScheduledSequence(1, 0, len(first), [], [10, 11, 12, 13, 14, 15])],
    )
    shared = group.step(new=[new], scheduled=[ScheduledSequence(2, 20, 3, [], [10, 11, 12, 13, 14, 20])])
    assert shared.logits is not None
    assert whole.logits is not None
    np.testing.assert_allclose(shared.logits.numpy(), whole.logits.numpy(), atol=1e-5)


def test_logits_and_logprobs_come_for_the_sampled_rows_alone(folder: Path) -> None:
    group = driver(folder, return_logits=True)
    sampling = SamplingParams(temperature=0.0, logprobs=2)
    new = [
        NewSequence(1, PROMPTS[0], len(PROMPTS[0]), 0, GREEDY, []),
        NewSequence(2, PROMPTS[2], len(PROMPTS[2]), 0, GREEDY, []),
        NewSequence(3, PROMPTS[3], len(PROMPTS[3]), 0, sampling, []),
    ]
    output = group.step(
        new=new,
        scheduled=[
            ScheduledSequence(1, 0, 5, [], [0, 1]),
            ScheduledSequence(2, 0, 8, [], [2, 3]),
            ScheduledSequence(3, 0, 4, [], [4]),
        ],
    )
    assert output.seq_ids == [1, 3]
    assert output.logits is not None
    logits = output.logits.numpy()
    assert logits.shape == (2, tiny_llama.VOCAB_SIZE)
    assert logits.dtype == np.float32
    assert output.token_ids == logits.argmax(1).tolist()
    assert list(output.logprobs) == [3]
    assert output.logprobs[3].top_ids[0] == output.token_ids[1]
    assert output.model_seconds > 0


def test_the_driver_may_plan_ahead_of_the_token_sampled_last_and_no_other(
    folder: Path, expected: list[list[int]]
) -> None:
    group, prompt = driver(folder), PROMPTS[0]
    tokens = group.step(
        new=[NewSequence(1, prompt, 5, 0, GREEDY, []), NewSequence(2, prompt, 5, 0, GREEDY, [])],
        scheduled=[ScheduledSequence(1, 0, 5, [], [0, 1, 2]), ScheduledSequence(2, 0, 4, [], [3, 4])],
    ).token_ids
    for position in (5, 6, 7):
        tokens += group.step(scheduled=[ScheduledSequence(1, position, 1, [SAMPLED_LAST], [])]).token_ids
    assert tokens == expected[0][:4]
    with pytest.raises(LightvllmError, match="the driver counts on a token that was not sampled here"):
        group.step(scheduled=[ScheduledSequence(2, 4, 1, [SAMPLED_LAST], [])])


def test_a_step_without_samples_or_without_work_has_an_empty_result(folder: Path) -> None:
    group = driver(folder)
    output = group.step(
        new=[NewSequence(1, PROMPTS[2], len(PROMPTS[2]), 0, GREEDY, [])],
        scheduled=[ScheduledSequence(1, 0, 8, [], [0, 1])],
    )
    assert (output.seq_ids, output.token_ids, output.logits) == ([], [], None)
    assert group.step(finished=[1]).token_ids == []

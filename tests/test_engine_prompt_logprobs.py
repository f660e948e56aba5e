"""Log-probabilities of prompts with real models: transformers' own, however the prompt is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch

from lightvllm import LLM, SamplingParams
from lightvllm.engine.outputs import RequestOutput

PROMPTS = [list(range(40, 70)), [5], [7, 300, 9, 12], list(range(40, 60))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[torch.Tensor]:
    """For each prompt, the log-probabilities [length - 1, vocab_size] behind each of its tokens but the last."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([p])).logits[0, :-1], dim=-1) for p in PROMPTS]


def ask(folder: Path, **options: Any) -> list[RequestOutput]:
    params = SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True, prompt_logprobs=2, n=2)
    with LLM(folder, threads=1, block_size=4, max_model_len=64, **options) as llm:
        llm.generate({"prompt_token_ids": PROMPTS[0]}, SamplingParams(max_tokens=1), use_tqdm=False)  # now it is cached
        return llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 8, "max_num_seqs": 8, "num_kv_blocks": 16},  # in chunks, with preemptions
        {"executor": "k8s", "tensor_parallel_size": 2, "max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"executor": "k8s", "pipeline_parallel_size": 2},
    ],
)
def test_they_are_transformers(folder: Path, expected: list[torch.Tensor], options: dict[str, Any]) -> None:
    outputs = ask(folder, **options)
    if "num_kv_blocks" in options:
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for prompt, output, rows in zip(PROMPTS, outputs, expected, strict=True):
        assert output.prompt_logprobs is not None
        assert (len(output.prompt_logprobs), output.prompt_logprobs[0], output.num_cached_tokens) == (
            len(prompt),
            None,
            0,
        )
        for token_id, row, found in zip(prompt[1:], rows, output.prompt_logprobs[1:], strict=True):
            assert found is not None
            assert next(iter(found)) == token_id
            best = torch.topk(row, 2).indices.tolist()
            assert set(found) == {token_id, *best}
            for one, said in found.items():
                assert said.logprob == pytest.approx(float(row[one]), abs=1e-4)
                assert said.rank == 1 + int((row > row[one]).sum())


def test_few_logits_are_held_at_a_time(
    folder: Path, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightvllm.worker import model_runner

    whole = [output.prompt_logprobs for output in ask(folder)]
    most: list[int] = []
    scored = model_runner.token_logprobs

    def watched(logits: torch.Tensor, *args: Any) -> Any:
        most.append(len(logits))
        return scored(logits, *args)

    monkeypatch.setattr(model_runner, "token_logprobs", watched)
    monkeypatch.setattr(model_runner, "PROMPT_LOGITS", 7 * tiny_llama.VOCAB_SIZE)
    parts = [output.prompt_logprobs for output in ask(folder)]
    assert max(most) == 7
    assert [[list(f or ()) for f in p or ()] for p in parts] == [[list(f or ()) for f in p or ()] for p in whole]

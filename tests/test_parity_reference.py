"""transformers' answer to a tiny LLaMA, and the distance from it."""

import sys

import numpy as np
import pytest
import tiny_llama

from lightvllm.errors import ConfigError, LightvllmError, MissingExtra
from lightvllm.parity.compare import PromptRun, Run
from lightvllm.parity.reference import Reference, ask_transformers, largest_difference


def test_greedy_tokens_and_their_logits(tmp_path):
    folder = tiny_llama.build(tmp_path)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]
    found = ask_transformers(folder, "float32", prompts, 6, lambda ids: str(list(ids)), lambda what: None)
    for prompt, answer, rows in zip(prompts, found.run.prompts, found.logits, strict=True):
        assert 1 <= len(answer.token_ids) <= 6
        assert rows.shape == (len(answer.token_ids), tiny_llama.VOCAB_SIZE)
        assert rows.dtype == np.float32
        # Each token is the most probable one of its own row, so the rows are aligned.
        assert rows.argmax(-1).tolist() == answer.token_ids
        assert [top[0].id for top in answer.step_tops] == answer.token_ids
        assert answer.text == str(answer.token_ids)
        assert prompt


def reference(tokens, rows):
    run = Run(executor="transformers", layout="", prompts=[PromptRun(text="", token_ids=tokens)])
    return Reference(run, "5", [np.array(rows, dtype=np.float32)])


def test_largest_difference():
    theirs = reference([1, 0], [[0.0, 1.0], [2.0, 1.0]])
    ours = np.array([[0.0, 1.5], [2.0, 0.25]], dtype=np.float32)
    assert largest_difference(theirs, 0, [1, 0], ours) == 0.75
    assert largest_difference(theirs, 0, [1], ours[:1]) == 0.5


def test_beyond_the_first_other_token_nothing_is_compared():
    theirs = reference([1, 0], [[0.0, 1.0], [2.0, 1.0]])
    ours = np.array([[3.0, 1.0], [90.0, 90.0]], dtype=np.float32)
    assert largest_difference(theirs, 0, [0, 0], ours) == 3.0


def test_missing_rows_are_noticed():
    with pytest.raises(LightvllmError, match="1 rows of logits came back for 2 tokens"):
        largest_difference(reference([1, 0], [[0.0, 1.0]] * 2), 0, [1, 0], np.zeros((1, 2), np.float32))


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"lightvllm\[parity\]"):
        ask_transformers(tmp_path, "float32", [[1]], 1, str, lambda what: None)


def test_a_model_that_transformers_cannot_load(tmp_path):
    with pytest.raises(ConfigError, match=r"transformers cannot load .*; or use --reference none"):
        ask_transformers(tmp_path, "float32", [[1]], 1, str, lambda what: None)

"""The models, layouts and questions of the tests with vLLM, and what vLLM's own executor answers to them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import tiny_llama
from vllm_process import EAGER, STAGES, Engine, engine

from lightvllm.hub.locate import resolve

PROMPTS = [
    "The capital of France is",
    "One token after another, the model",
    "A quick brown fox",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,",
]
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
CITIES = ["Paris", "Rome", "Berlin"]
GREEDY = {"temperature": 0.0, "max_tokens": 24, "logprobs": 3, "ignore_eos": True}
CHAT = {"temperature": 0.0, "max_tokens": 16, "logprobs": 2}


class Layout(NamedTuple):
    """A model, split."""

    model: str
    tp: int = 1
    pp: int = 1

    def __str__(self) -> str:
        return f"{self.model}-tp{self.tp}-pp{self.pp}"

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's."""
        layout = {"tensor_parallel_size": self.tp, "pipeline_parallel_size": self.pp}
        return (STAGES if self.pp > 1 else EAGER) | layout


SMOLLM2 = [Layout("smollm2"), Layout("smollm2", pp=2), Layout("smollm2", tp=3)]
TINY = [Layout("tiny", tp=2), Layout("tiny", tp=2, pp=2)]


@functools.cache
def folder(model: str) -> Path:
    """Where the model lies; the tiny one is made for this run of the tests."""
    if model == "tiny":
        made = Path(tempfile.mkdtemp(prefix="lightvllm-tests-model-"))
        atexit.register(shutil.rmtree, made)
        # vLLM's attention on CPUs wants heads of 32 numbers.
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 512}
        return tiny_llama.build(made, **sizes)
    return resolve("smollm2-135m")


def answers(started: Engine, grammar: bool = True) -> dict[str, Any]:
    """What an engine says to the questions here: tokens and their log-probabilities, as exact numbers.

    Without ``grammar`` the one with a choice of answers is left out.
    """
    told = {
        "together": started.ask("generate", prompts=PROMPTS, **GREEDY),
        "chat": started.ask("chat", messages=MESSAGES, **CHAT),
    }
    if grammar:
        told["choice"] = started.ask("generate", prompts=PROMPTS[:1], choice=CITIES, temperature=0.0, max_tokens=8)
    return told


@functools.cache
def reference(layout: Layout) -> dict[str, Any]:
    """`answers` of vLLM's own multiprocessing executor."""
    with engine() as started:
        told = answers(started.start(folder(layout.model), "mp", **layout.arguments))
        assert started.stop() == 0
        return told

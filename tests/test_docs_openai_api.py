"""docs/openai-api.md lists every field of every request, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from lightvllm.server.chat_protocol import ChatCompletionRequest
from lightvllm.server.protocol import CompletionRequest, EmbeddingRequest, GenerationRequest
from lightvllm.server.tool_parsers import PARSERS

PAGE = (Path(__file__).parent.parent / "docs/openai-api.md").read_text(encoding="utf-8")


def fields_of(section: str) -> set[str]:
    """What stands in the first column of the tables of a section (up to the next of its level)."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0].split("\n### ")[0]
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("Sampling: completions and chat", GenerationRequest),
        ("`/v1/completions`", CompletionRequest),
        ("`/v1/chat/completions`", ChatCompletionRequest),
        ("`/v1/embeddings`", EmbeddingRequest),
    ],
)
def test_every_field_has_its_row(section: str, model: type[BaseModel]) -> None:
    inherited = set(GenerationRequest.model_fields) if model not in (GenerationRequest, EmbeddingRequest) else set()
    assert fields_of(section) == set(model.model_fields) - inherited


def test_every_format_of_tool_calls_has_its_row() -> None:
    table = PAGE.split("### Tools")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(PARSERS)

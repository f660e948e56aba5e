"""``UsageCounter``: the tokens of one request of the API, counted as its outputs come."""

from __future__ import annotations

from typing import Any

from lightvllm.engine.outputs import RequestOutput


class UsageCounter:
    """A prompt counts once, however many sequences continue it."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._num_generated = 0

    def prompt(self, number: int, output: RequestOutput) -> None:
        """``output`` is of that prompt; told again, it changes nothing."""
        if number not in self._prompts:
            self._prompts[number] = len(output.prompt_token_ids), output.num_cached_tokens or 0

    def generated(self, count: int) -> None:
        self._num_generated += count

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``; cached tokens are those found in the prefix cache."""
        prompt = sum(length for length, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._num_generated,
            "total_tokens": prompt + self._num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }

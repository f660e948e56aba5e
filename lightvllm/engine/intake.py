"""What a request may be: its prompt, its parameters, its priority and its time-out, checked before it is queued.

Knows the model's configuration and tokenizer; no scheduler and no executor. Raises ConfigError for what cannot be run.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from lightvllm.config import EngineConfig
from lightvllm.engine.structured import check_structured
from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.errors import ConfigError
from lightvllm.sampling_params import SamplingParams

MAX_PRIORITY = 2**31 - 1
MAX_BAD_WORDS = 1024
MAX_BAD_WORDS_CHARS = 32 * 1024
"""Of all of them together; they are tokenized between two steps, for which everybody waits."""


class TokensPrompt(TypedDict):
    """A prompt given as tokens; ``prompt`` is its text, for the output alone."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]


Prompt = str | Sequence[int] | TokensPrompt


class Intake:
    """The checks of one engine, whose KV cache has ``num_kv_blocks`` blocks.

    ``structured_checked``: structured outputs come from another Intake; to look at them again could take seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        num_kv_blocks: int,
        *,
        structured_checked: bool = False,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._num_kv_blocks = num_kv_blocks
        self._structured_checked = structured_checked

    def prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Its text, if it was given, and its tokens; they fit the model and the cache."""
        text, token_ids = self._tokenize(prompt)
        model, size = self._config.model, self._config.cache.block_size
        longest = self._num_kv_blocks * size
        if not token_ids:
            raise ConfigError("the prompt is empty; give at least one token")
        wrong = next((i for i in (min(token_ids), max(token_ids)) if not 0 <= i < model.vocab_size), None)
        if wrong is not None:
            raise ConfigError(f"token id {wrong} is not in the vocabulary; use 0 to {model.vocab_size - 1}")
        if model.pooling is not None and len(token_ids) > model.max_model_len:
            raise ConfigError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len={model.max_model_len}; shorten it"
            )
        if model.pooling is None and len(token_ids) >= model.max_model_len:
            raise ConfigError(
                f"the prompt has {len(token_ids)} tokens, but max_model_len={model.max_model_len} must hold it and at "
                f"least one more; shorten it to {model.max_model_len - 1} or raise max_model_len"
            )
        if len(token_ids) > longest:
            raise ConfigError(
                f"the prompt has {len(token_ids)} tokens, but the whole KV cache holds {longest} "
                f"(num_kv_blocks={self._num_kv_blocks} × block_size={size}); shorten it or raise num_kv_blocks"
            )
        return text, token_ids

    def params(self, params: Any) -> SamplingParams:
        """The parameters, which fit the model; vLLM's defaults for None. For a model that generates."""
        if self._config.model.pooling is not None:
            raise ConfigError("this model makes embeddings and generates no text; use embed, or /v1/embeddings")
        if params is None:
            return SamplingParams()
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"sampling_params is {params!r:.80}; expected SamplingParams")
        vocab_size = self._config.model.vocab_size
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if wrong := [i for i in getattr(params, name) or () if not 0 <= i < vocab_size]:
                raise ConfigError(f"{name}={wrong[:8]} are not in the vocabulary; use 0 to {vocab_size - 1}")
        if params.structured_outputs is not None and not self._structured_checked:
            check_structured(params.structured_outputs, self._config.model)
        if params.stop and self._tokenizer is None:
            raise ConfigError(f"stop={params.stop!r} needs text, but there is no tokenizer; use stop_token_ids")
        return params

    def check_embeds(self) -> None:
        """Raise ConfigError unless the model makes embeddings."""
        if self._config.model.pooling is None:
            raise ConfigError(
                "this model generates text and makes no embeddings; use generate, or a model whose folder has "
                "sentence-transformers' modules.json"
            )

    def bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Each of ``params.bad_words`` as tokens, without and with a space before it (vLLM's rule)."""
        words = params.bad_words or ()
        if len(words) > MAX_BAD_WORDS:
            raise ConfigError(f"bad_words has {len(words)} words; use at most {MAX_BAD_WORDS}")
        chars = sum(map(len, words))
        if chars > MAX_BAD_WORDS_CHARS:
            raise ConfigError(f"bad_words have {chars} characters; use at most {MAX_BAD_WORDS_CHARS}")
        if words and self._tokenizer is None:
            raise ConfigError(f"bad_words={words!r:.80} need text, but there is no tokenizer; use logit_bias")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip() or word
            for text in (bare, f" {bare}"):
                token_ids = self._tokenizer.encode(text, add_special_tokens=False) if self._tokenizer else []
                if not token_ids:
                    raise ConfigError(f"bad_words: {word!r} has no tokens; leave it out")
                found[tuple(token_ids)] = None
        return [list(token_ids) for token_ids in found]

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: str | None = None
        ids: Any = prompt
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ConfigError("the prompt is text, but there is no tokenizer; give prompt_token_ids")
            return prompt, self._tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" not in prompt:
                raise ConfigError(f"the prompt has the keys {sorted(prompt)}; expected prompt_token_ids")
            text, ids = prompt.get("prompt"), prompt["prompt_token_ids"]
        try:
            return text, [operator.index(i) for i in ids]
        except TypeError:
            raise ConfigError(f"the prompt is {ids!r:.80}; expected text or a list of token ids") from None


def check_priority(priority: Any) -> None:
    if type(priority) is not int or abs(priority) > MAX_PRIORITY:
        raise ConfigError(
            f"priority={priority!r:.80}; use an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}, lower goes first"
        )


def check_timeout(timeout: Any) -> None:
    if timeout is None:
        return
    if type(timeout) not in (int, float) or not (math.isfinite(timeout) and timeout > 0):
        raise ConfigError(f"timeout={timeout!r:.80}; use a positive number of seconds, or None for no limit")


def check_stream(stream: Any) -> None:
    if stream is not True and stream is not False and stream != "delta":
        raise ConfigError(f"stream={stream!r:.80}; use True, False or 'delta'")

"""Log-probabilities as OpenAI writes them: for chat with each token's bytes, for completions as four parallel lists.

The text of a token is made from its bytes, so that the bytes of all tokens joined are the bytes of the text; a token
that is no whole character reads as U+FFFD. JSON has no minus infinity: ``MIN_LOGPROB`` stands for it.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from lightvllm.engine.outputs import Logprob
from lightvllm.engine.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0

Described = Mapping[int, Logprob]
"""One position: by token id, the chosen token first."""


def token_text(tokenizer: Tokenizer, token_id: int, as_id: bool = False) -> str:
    """``as_id``: ``"token_id:5"``, which is unique."""
    return f"token_id:{token_id}" if as_id else tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(
    tokenizer: Tokenizer, positions: Sequence[Described], count: int, as_ids: bool = False
) -> dict[str, Any]:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}``; ``count`` top ones each."""

    def entry(token_id: int, found: Logprob) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id, as_ids),
            "logprob": _finite(found.logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for position in positions:
        chosen = next(iter(position))
        top = [entry(token_id, found) for token_id, found in _most_probable(position, count)]
        content.append({**entry(chosen, position[chosen]), "top_logprobs": top})
    return {"content": content, "refusal": None}


class CompletionLogprobWriter:
    """The lists of one choice, which may come in several parts: offsets go on from part to part.

    Args:
        count: top log-probabilities besides the chosen token's.
        skipped: tokens that are not in the text.
    """

    def __init__(self, tokenizer: Tokenizer, count: int, *, as_ids: bool, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._as_ids = as_ids
        self._skipped = skipped
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._at_beginning = False

    def write(
        self,
        token_ids: Sequence[int],
        positions: Sequence[Described | None],
        begins_at: int | None = None,
        text: str = "",
    ) -> dict[str, list[Any]]:
        """``{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`` of the next tokens.

        Args:
            begins_at: they begin a text, which stands at this offset; None: they continue the one before.
            text: of an echoed prompt, in which special tokens may have been written out.
        """
        if begins_at is not None:
            self._characters.reset()
            self._offset, self._at_beginning = begins_at, True
        tokens: list[str] = []
        chosen: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, position in zip(token_ids, positions, strict=True):
            tokens.append(token_text(self._tokenizer, token_id, self._as_ids))
            raw = self._tokenizer.token_bytes(token_id)
            if raw[:1] < b"\x80" or raw[:1] >= b"\xc0":  # a character begins: bytes before it that are none are done
                self._offset += len(self._characters.decode(b"", final=True))
            offsets.append(self._offset)
            if token_id not in self._skipped or (text and self._is_at(text, token_id)):
                if self._at_beginning:
                    self._at_beginning = False
                    raw = self._first(token_id, raw)
                self._offset += len(self._characters.decode(raw))
            if position is None:
                chosen.append(None)
                tops.append(None)
                continue
            chosen.append(_finite(position[token_id].logprob))
            top: dict[str, float] = {}
            for i, found in [(token_id, position[token_id]), *_most_probable(position, self._count)]:
                # Two tokens may read alike; the chosen one, and then the more probable one, is told.
                top.setdefault(token_text(self._tokenizer, i, self._as_ids), _finite(found.logprob))
            tops.append(top)
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}

    def _is_at(self, text: str, token_id: int) -> bool:
        return text.startswith(token_text(self._tokenizer, token_id), self._offset)

    def _first(self, token_id: int, raw: bytes) -> bytes:
        """What is left of a text's first token: some decoders drop the space before it."""
        if not raw.startswith(b" "):
            return raw
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def join_logprobs(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Their lists, one behind the other."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part[name]] for name in names}


def prompt_logprobs(positions: Sequence[Described | None], count: int) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: the prompt's token and the ``count`` most probable ones, by token id,
    ``{"logprob", "rank", "decoded_token"}``."""
    return [
        None
        if position is None
        else {
            str(i): {"logprob": _finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}
            for number, (i, found) in enumerate(position.items())
            if not number or found.rank <= count
        }
        for position in positions
    ]


def _most_probable(position: Described, count: int) -> list[tuple[int, Logprob]]:
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return [(token_id, found) for token_id, found in ranked if found.rank <= count][:count]


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)

"""Tokens to text as they come, for one sequence: whole characters only, and cut at the first stop string.

After the last token the text is exactly ``Tokenizer.decode`` of the tokens (up to a stop string). Until then, what is
``visible`` is a prefix of that final text: bytes that are not yet a character are held back, and so is the beginning
of what may become a stop string.
"""

from __future__ import annotations

from lightvllm.engine.tokenizer import Tokenizer
from lightvllm.sampling_params import SamplingParams

_BROKEN = "\ufffd"  # what the decoder makes of bytes that are not, or not yet, a character
_WINDOW = 8


class Detokenizer:
    """Feed it with ``append`` and end it with ``flush``; both return the stop string that was met, or None.

    Decoding depends on neighbours (bytes of one character, spaces between words), so tokens are decoded together with
    a few before them: the window. Its first token is one behind which decoding can start afresh.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if sampling.skip_special_tokens else frozenset()
        self._stops = tuple(sampling.stop or ())
        self._starts = [0] * len(self._stops)  # before there, no stop string begins that is not complete
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._window: list[int] = []
        self._window_done = 0  # characters of the window's text that are in self.text
        self._searched = 0  # no stop string ends within self.text[:_searched]
        self._ended = False
        self.text = ""

    @property
    def visible(self) -> str:
        """As much of ``text`` as will certainly be in the final text; it only ever grows."""
        if self._ended or self._include_stop or not self._stops:
            return self.text
        held_from = self._held_from()
        return self.text if held_from == len(self.text) else self.text[:held_from]

    def _held_from(self) -> int:
        """Where what may become a stop string begins; the text's end if nothing may. Each place fails once."""
        text, end = self.text, len(self.text)
        for index, stop in enumerate(self._stops):
            at = max(self._starts[index], end - len(stop) + 1)
            while at < end and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
                if at < 0:
                    at = end
            self._starts[index] = min(at, end)
        return min(self._starts)

    def append(self, token_id: int) -> str | None:
        """Take the next token."""
        self._num_tokens += 1
        if token_id in self._skipped or token_id not in self._tokenizer.token_ids:
            return None
        self._window.append(token_id)
        # Byte-fallback decoders judge a run of byte tokens as a whole: it has no text until it ends.
        if token_id in self._tokenizer.byte_token_ids:
            return None
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if text.endswith(_BROKEN):
            return self._extend(text[:-1])
        stop = self._extend(text)
        if len(self._window) > _WINDOW:
            anchor = self._tokenizer.token_text(token_id)
            if anchor:  # without text it might be a space that is dropped at the beginning but not inside
                self._window, self._window_done = [token_id], len(anchor)
        return stop

    def flush(self) -> str | None:
        """No token follows: what was held back is text now."""
        stop = None
        if not self._ended:
            stop = self._extend(self._tokenizer.decode(self._window, skip_special_tokens=False))
            self._ended = True
        return stop

    def _extend(self, window_text: str) -> str | None:
        """Move what is new in the window's text to ``self.text`` and look for stop strings that end in it."""
        if len(window_text) > self._window_done:
            self.text += window_text[self._window_done :]
            self._window_done = len(window_text)
        if not self._stops:
            return None
        if self._num_tokens <= self._min_tokens:
            self._searched = len(self.text)
            return None
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = self.text.find(stop, max(0, self._searched - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = at, stop
        self._searched = len(self.text)
        if found is None:
            return None
        at, stop = found
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        self._ended = True
        return stop

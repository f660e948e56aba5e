"""Structured outputs on the worker that samples: which tokens may come next.

No mask crosses the wire, and no step waits for the driver: a constraint follows the worker's own tokens, and after a
preemption catches up with those that come with the sequence. Grammars are compiled by a thread of their own while the
prompt is computed, and kept. What a grammar may cost is bounded (``lightvllm.grammar.limits``).
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from lightvllm.config import ModelConfig
from lightvllm.errors import LightvllmError
from lightvllm.grammar import grammar_text, limits, load_tokenizer, one_line
from lightvllm.sampling_params import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Ids = np.ndarray[Any, np.dtype[np.intp]]

MAX_COMPILED = 64
"""Compiled grammars that are kept, the latest used ones."""
_COMPILE_SECONDS = 60.0
"""What a compilation may take; llguidance's limits end it far sooner."""


class Grammars:
    """A model's tokenizer and its compiled grammars, each made when it is first needed. One thread calls it."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._compiled: OrderedDict[StructuredOutputs, Future[LLMatcher]] = OrderedDict()
        self._compiler: ThreadPoolExecutor | None = None

    def warm_up(self) -> None:
        """Begin to load the tokenizer, if the model can have structured outputs at all; does not wait for it.

        An error is raised when a grammar is compiled."""
        if self._model.eos_token_ids:
            # Not in the thread: Python code that is run there while the interpreter ends after Ctrl-C makes it
            # forget that it was interrupted, and its exit status.
            importlib.import_module("llguidance")
            self._thread().submit(_load_tokenizer, self._model)

    def constraint(self, structured: StructuredOutputs) -> Constraint:
        """A new sequence's. Returns at once; the grammar is compiled meanwhile."""
        if structured not in self._compiled:
            self._compiled[structured] = self._thread().submit(_compile, self._model, structured)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(structured)
        return Constraint(self._compiled[structured])

    def _thread(self) -> ThreadPoolExecutor:
        if self._compiler is None:
            self._compiler = ThreadPoolExecutor(1, thread_name_prefix="lightvllm-grammar")
        return self._compiler


class Constraint:
    """One sequence's place in its grammar."""

    def __init__(self, compiled: Future[LLMatcher]) -> None:
        self._compiled = compiled
        self._matcher: LLMatcher | None = None
        self._num_consumed = 0

    def allowed(self, output: Sequence[int], vocab_size: int) -> Ids:
        """Tokens below ``vocab_size`` that may follow the ``output`` so far, ascending.

        The end-of-sequence token is one where the grammar may end, and the only one where it must. An output that was
        seen before may only have grown. Raises LightvllmError if the output is not of the grammar, or if the grammar
        exceeds a limit: then nothing can be said any more.
        """
        if self._matcher is None:
            try:
                self._matcher = self._compiled.result(_COMPILE_SECONDS).deep_copy()
            except TimeoutError:
                raise LightvllmError(f"structured_outputs: not compiled after {_COMPILE_SECONDS:g} s") from None
        matcher = self._matcher
        for token_id in output[self._num_consumed :]:
            if matcher.is_stopped():
                break  # an end-of-sequence token, or one sampled before the driver knew of that
            matcher.consume_token(token_id)
        self._num_consumed = len(output)
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise LightvllmError(f"structured_outputs: {one_line(matcher.get_error())}; use a simpler grammar")
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little")
        return np.flatnonzero(bits.view(np.bool_))


def _load_tokenizer(model: ModelConfig) -> LLTokenizer:
    return load_tokenizer(model.path, model.vocab_size, model.eos_token_ids)


def _compile(model: ModelConfig, structured: StructuredOutputs) -> LLMatcher:
    from llguidance import LLMatcher

    matcher = LLMatcher(_load_tokenizer(model), grammar_text(structured), log_level=0, limits=limits())
    if matcher.is_error():
        raise LightvllmError(f"structured_outputs: {one_line(matcher.get_error())}")
    return matcher

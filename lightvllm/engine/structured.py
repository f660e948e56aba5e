"""Whether a structured output can be had, found out before its request is queued.

Nearly every grammar is checked here, in about a millisecond. llguidance's limits do not cover all that it does while
it compiles, though: some twenty patterns that must all hold take it minutes, a large ``multipleOf`` many seconds. So
what could be of that kind, and what is long, is compiled by a process of its own first, which has ``CPU_SECONDS`` for
it; as long, at worst, will a worker wait for it later. One at a time::

    python -m lightvllm.engine.structured < GRAMMAR_AND_TOKENIZER_AS_JSON
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError
from lightvllm.grammar import grammar_text, limits, load_tokenizer, one_line
from lightvllm.sampling_params import StructuredOutputs

CPU_SECONDS = 0.5
"""Of the processor, so that a busy machine refuses no more than an idle one; the start does not count."""
WALL_SECONDS = 20.0
"""After which it is given up, wherever it stands; asked again, it is tried again."""
_CHECK_BYTES = 2**30
_ONE_AT_A_TIME = threading.Lock()
_LONG = 16 * 1024
_FEW_PATTERNS = 4
_NO_TOKENIZER = "no tokenizer"  # llguidance's warning about what names tokens


def check_structured(structured: StructuredOutputs, model: ModelConfig) -> None:
    """Raise ConfigError, in one line, unless the model can be held to it.

    Any thread may call it. What was found is kept, so that a server that calls it from a thread of its own first
    keeps its engine from waiting.
    """
    if not model.eos_token_ids:
        raise ConfigError(
            "structured_outputs need an end-of-sequence token, and the model names none; set eos_token_id in its "
            "config.json or generation_config.json"
        )
    if not (Path(model.path) / "tokenizer.json").is_file():
        raise ConfigError("structured_outputs need the model's tokenizer, and its folder has no tokenizer.json")
    problem = _problem(structured, model.path, model.vocab_size, model.eos_token_ids)
    if problem:
        raise ConfigError(problem)


@functools.lru_cache(maxsize=256)
def _problem(structured: StructuredOutputs, path: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> str:
    from llguidance import LLMatcher

    question = _Question(structured, path, vocab_size, eos_token_ids)
    if _may_be_slow(structured):
        return _compiled_apart(question)
    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar_text(structured), limits=limits())
    except ConfigError as error:
        return str(error)
    if failed:
        return _refusal(structured, messages[0])
    if any(message.startswith(_NO_TOKENIZER) for message in messages):
        return _compiled(question)
    return ""


class _Question(msgspec.Struct, frozen=True):
    structured: StructuredOutputs
    path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def _compiled(question: _Question) -> str:
    """What is found wrong by compiling it as the workers will, or ``""``."""
    from llguidance import LLMatcher

    try:
        tokenizer = load_tokenizer(question.path, question.vocab_size, question.eos_token_ids)
        matcher = LLMatcher(tokenizer, grammar_text(question.structured), log_level=0, limits=limits())
    except ConfigError as error:
        return str(error)
    return _refusal(question.structured, matcher.get_error()) if matcher.is_error() else ""


def _refusal(structured: StructuredOutputs, message: str) -> str:
    return f"structured_outputs: the {structured.kind} is refused: {one_line(message)}"


def _may_be_slow(structured: StructuredOutputs) -> bool:
    """Whether it is long, has a divisor, or may have patterns of which several must hold for one string."""
    if structured.json is not None:
        try:
            text = json.dumps(json.loads(str(structured.json)))
        except (ValueError, RecursionError):
            return False  # refused at once
        return len(text) > _LONG or '"multipleOf"' in text or text.count('"pattern') > _FEW_PATTERNS
    if structured.grammar is not None:
        return len(structured.grammar) > _LONG or not set("&~%").isdisjoint(structured.grammar)
    return len(structured.regex or "") > _LONG


def _compiled_apart(question: _Question) -> str:
    structured = question.structured
    if not _ONE_AT_A_TIME.acquire(timeout=WALL_SECONDS):
        raise ConfigError("structured_outputs: too many intricate ones are being compiled; ask again later")
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=msgspec.json.encode(question),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # it finds what this one does
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(_refusal(structured, f"it was not compiled within {WALL_SECONDS:g} s")) from None
    finally:
        _ONE_AT_A_TIME.release()
    if done.returncode == 0:
        return done.stdout.decode()
    if done.returncode == -signal.SIGPROF:
        return _refusal(structured, f"it takes more than {CPU_SECONDS:g} s to compile; use a simpler one")
    reason = one_line(done.stderr.decode(errors="replace")) if done.returncode > 0 else "too much memory or depth"
    return _refusal(structured, f"it cannot be compiled ({reason}); use a simpler one")


def main() -> None:
    """Read a question from standard input, and write what is wrong."""
    os.nice(10)  # the steps of the engine go first
    with contextlib.suppress(ValueError, OSError):  # a hard limit below; the time-out holds all the same
        resource.setrlimit(resource.RLIMIT_AS, (_CHECK_BYTES, _CHECK_BYTES))
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=_Question)
    with contextlib.suppress(ConfigError):  # ``_compiled`` says it
        load_tokenizer(question.path, question.vocab_size, question.eos_token_ids)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
    sys.stdout.write(_compiled(question))


if __name__ == "__main__":
    main()

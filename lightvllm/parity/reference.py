"""What transformers says: its greedy tokens, and its logits for them in one forward pass per prompt.

The model is loaded once, asked, and dropped before the first engine starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lightvllm.errors import ConfigError, LightvllmError, MissingExtra
from lightvllm.parity.compare import PromptRun, Run
from lightvllm.parity.record import Decode, top_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "transformers"


class Reference(msgspec.Struct, frozen=True):
    """transformers' run, its version, and for each prompt its logits, float32 [generated tokens, vocab_size]."""

    run: Run
    version: str
    logits: list[Any]


def ask_transformers(
    folder: Path,
    dtype: str,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    decode: Decode,
    progress: Callable[[str], None],
) -> Reference:
    """Greedy answers to prompts given as token ids, on the CPU. Raises MissingExtra, or ConfigError for a model that
    transformers cannot load."""
    try:
        import torch
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "parity", "the reference (--reference none does without)") from None
    progress("loading the reference (transformers)")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        ).eval()
    except (OSError, ValueError, RuntimeError) as failed:
        reason = (str(failed).strip().splitlines() or [type(failed).__name__])[0]
        raise ConfigError(f"transformers cannot load {folder}: {reason}; or use --reference none") from None
    answers: list[PromptRun] = []
    logits: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for number, prompt in enumerate(prompts, 1):
            progress(f"asking the reference: prompt {number} of {len(prompts)}")
            ids = torch.tensor([list(prompt)])
            whole = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
            )
            tokens: list[int] = whole[0, len(prompt) :].tolist()
            # The row before the first token to the row before the last one; the very last row predicts beyond.
            output = model(input_ids=whole, use_cache=False, logits_to_keep=len(tokens) + 1)
            rows = output.logits[0, :-1].float().numpy()
            logits.append(rows)
            answers.append(
                PromptRun(text=decode(tokens), token_ids=tokens, step_tops=[top_tokens(row, decode) for row in rows])
            )
    return Reference(Run(executor=NAME, layout="", prompts=answers), transformers.__version__, logits)


def largest_difference(reference: Reference, prompt: int, token_ids: Sequence[int], rows: Sequence[Any]) -> float:
    """Largest |Δlogit| of one prompt's rows from the reference's, up to and with the step at which tokens part.

    Beyond that step the two have read different texts.
    """
    theirs = reference.run.prompts[prompt].token_ids
    steps = next(
        (i + 1 for i, (a, b) in enumerate(zip(token_ids, theirs, strict=False)) if a != b),
        min(len(token_ids), len(theirs)),
    )
    if not steps:
        return 0.0
    if len(rows) < steps:
        raise LightvllmError(f"{len(rows)} rows of logits came back for {len(token_ids)} tokens; expected one each")
    differences = [np.abs(rows[i] - reference.logits[prompt][i]).max() for i in range(steps)]
    return float(max(differences))

"""Contenders of ``carriers.py`` for encodings: a step's input and output, typed or pickled.

Which of the two it is ``messages.py`` decides by the name of the method; all else is the same. Over the direct carrier
the driver encodes a ``StepInput`` once and sends it to all workers, which decode it, encode a ``StepOutput`` each, and
the driver decodes all of these. Without workers the driver's process does one worker's part as well, and nothing is
sent.

As a script it is one worker: ``rpc_encoding.py SPEC FD``, as in ``rpc_frames.py``.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rpc_frames import LIMIT, Driver, serve, start_workers

from lightvllm.messages import (
    Buffer,
    NewSequence,
    ScheduledSequence,
    StepInput,
    StepOutput,
    decode_reply,
    encode_call,
    invoke,
)
from lightvllm.sampling_params import SamplingParams
from lightvllm.transfer.frames import SPIN_SECONDS, FrameSocket

METHODS = {"typed": "execute_model", "pickled": "execute_untyped"}
_BLOCK_TOKENS = 16
_VOCABULARY = 32_000


class StepWorker:
    """Answers a step with a token for each of its sequences."""

    def execute_model(self, step: StepInput) -> StepOutput:
        ids = [sequence.seq_id for sequence in step.scheduled]
        return StepOutput(step=step.step, seq_ids=ids, token_ids=[_token(i) for i in ids], model_seconds=0.005)

    execute_untyped = execute_model


def _token(position: int) -> int:
    return 7919 * (position + 1) % _VOCABULARY


def make_step(sequences: int, prompt_tokens: int) -> StepInput:
    """``sequences`` that decode a token each, every sixteenth in a new block of cache; or, with ``prompt_tokens``, that
    begin with a prompt of so many."""
    if not prompt_tokens:
        scheduled = [
            ScheduledSequence(i, 1000 + i, 1, [_token(i)], [i] if i % _BLOCK_TOKENS == 0 else [])
            for i in range(sequences)
        ]
        return StepInput(step=1, scheduled=scheduled)
    blocks = -(-prompt_tokens // _BLOCK_TOKENS)
    sampling = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=128)
    return StepInput(
        step=1,
        new=[
            NewSequence(i, [_token(i + at) for at in range(prompt_tokens)], prompt_tokens, i, sampling, [2])
            for i in range(sequences)  # lists of their own: pickle would write a shared one once
        ],
        scheduled=[
            ScheduledSequence(i, 0, prompt_tokens, [], list(range(i * blocks, (i + 1) * blocks)))
            for i in range(sequences)
        ],
    )


@contextlib.contextmanager
def open_contender(spec: dict[str, Any]) -> Iterator[Any]:
    """``encoding``: typed or pickled; ``sequences``, ``prompt_tokens``; ``world_size``, which may be 0."""
    from rpc_child import Contender

    method, count = METHODS[spec["encoding"]], spec["world_size"]
    step = make_step(spec["sequences"], spec["prompt_tokens"])
    if not count:
        worker = StepWorker()
        yield Contender(_preparing(lambda name, payload: [invoke(worker, name, payload)], method, step, 0))
        return
    with contextlib.ExitStack() as stack:
        sockets, pids = start_workers(stack, __file__, spec | {"carrier": "unix"})
        driver = Driver([FrameSocket(sock, LIMIT) for sock in sockets])
        stack.callback(driver.close)
        yield Contender(
            _preparing(lambda name, payload: driver.call(name.encode(), payload), method, step, count), pids
        )


def _preparing(
    send: Callable[[str, bytes], list[Buffer]], method: str, step: StepInput, workers: int
) -> Callable[[bytes], Callable[[], list[None]]]:
    nothing = [None] * workers

    def outputs() -> list[Any]:
        name, encoded = encode_call(method, (step,), None)
        return [decode_reply(name, reply) for reply in send(name, encoded)]

    def call() -> list[None]:
        outputs()
        return nothing

    expected = [StepWorker().execute_model(step)] * max(1, workers)
    if outputs() != expected:
        raise RuntimeError(f"{method} did not return the step's output")
    return lambda _: call  # the step is the payload


if __name__ == "__main__":
    link = FrameSocket(socket.socket(fileno=int(sys.argv[2])), LIMIT, SPIN_SECONDS)
    worker = StepWorker()
    serve(link, lambda name, payload: invoke(worker, name.decode(), payload))

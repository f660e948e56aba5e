"""What engine and front say to each other: errors keep their types, and deltas add up."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lightvllm import SamplingParams, errors
from lightvllm.engine.core_messages import (
    Add,
    Delta,
    Ended,
    Failure,
    Outputs,
    decode_command,
    decode_event,
    encode,
)
from lightvllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics
from lightvllm.engine.stats import EngineStats
from lightvllm.errors import InvalidOutput, LightvllmError, MissingExtra, QueueFull, WorkerDied, WorkerError
from lightvllm.sampling_params import StructuredOutputs

KINDS = [value for value in vars(errors).values() if inspect.isclass(value)]
SPECIAL: dict[type, LightvllmError] = {
    MissingExtra: MissingExtra("ray", "ray", "the Ray backend"),
    WorkerError: WorkerError(1, "load_model", "ValueError", "no", "Traceback …"),
    WorkerDied: WorkerDied("w-1", "killed by SIGKILL", 3),
    InvalidOutput: InvalidOutput("no JSON", "text"),
    QueueFull: QueueFull("full", 2.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_comes_across_as_it_is(kind: type[LightvllmError]) -> None:
    error = SPECIAL.get(kind) or kind("what was got")
    event = decode_event(encode(Ended(Failure.of(error))))
    assert isinstance(event, Ended)
    one, two = event.failure.error(), event.failure.error()
    assert one is not two
    assert (type(one), str(one), vars(one)) == (kind, str(error), vars(error))


def test_what_is_no_error_of_ours_is_called_a_defect() -> None:
    assert type(Failure.of(KeyError("x")).error()) is LightvllmError
    assert Failure.of(KeyError("x")).message == "internal error in the engine: KeyError: 'x'"
    assert Failure.of(KeyboardInterrupt()).kind == "Shutdown"


def test_a_request_comes_across_as_it_is() -> None:
    params = SamplingParams(
        n=2, seed=4, stop=["a"], logit_bias={3: 1.5}, structured_outputs=StructuredOutputs(regex="a+")
    )
    command = Add(7, [1, 2, 3], params, True, 12.5, -3, 0.25)
    assert decode_command(encode(command)) == command


def test_outputs_add_up() -> None:
    def delta(number: int, index: int, text: str, finished: bool = False, **given: Any) -> Delta:
        outputs = [CompletionOutput(index, text, [len(text)], logprobs=[{1: Logprob(-0.5, 1, text)}])]
        return Delta(number, outputs, finished, **given)

    begun, over = RequestMetrics(1.0), RequestMetrics(1.0, finished_time=2.0)
    total = Outputs([delta(1, 0, "a", num_cached_tokens=4, metrics=begun, prompt_logprobs=[None])], EngineStats())
    total.add(Outputs([delta(2, 0, "x"), delta(1, 1, "bb")], EngineStats(), {5: Failure("ConfigError", "no")}))
    total.add(Outputs([delta(1, 0, "ccc", finished=True, metrics=over)], EngineStats(total_steps=3)))
    first, second = total.deltas
    assert (first.number, second.number, total.stats.total_steps, list(total.refused)) == (1, 2, 3, [5])
    assert [(o.index, o.text, o.token_ids) for o in first.outputs] == [(0, "accc", [1, 3]), (1, "bb", [2])]
    assert len(first.outputs[0].logprobs or ()) == 2
    assert (first.finished, first.num_cached_tokens, first.metrics, first.prompt_logprobs) == (True, 4, over, [None])
    assert decode_event(encode(total)) == total

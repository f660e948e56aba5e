"""Calls and replies as bytes: what is typed, what is pickled, and how an exception travels."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightvllm.errors import ConfigError, LightvllmError, WorkerError
from lightvllm.messages import (
    CALLABLE,
    TYPED_METHODS,
    Deferred,
    NewSequence,
    ScheduledSequence,
    StepInput,
    StepOutput,
    Tensor,
    TokenLogprobs,
    begin,
    decode_reply,
    decode_value,
    encode_call,
    encode_failure,
    encode_value,
    invoke,
)
from lightvllm.sampling_params import SamplingParams
from lightvllm.worker.worker import Worker

STEP = StepInput(
    step=3,
    finished=[1],
    new=[NewSequence(7, [5, 6], 2, 9, SamplingParams(temperature=0.5, stop=["x"]), [2])],
    scheduled=[ScheduledSequence(7, 0, 2, [], [0, 1])],
)
OUTPUT = StepOutput(
    step=3,
    seq_ids=[7],
    token_ids=[11],
    logprobs={7: TokenLogprobs(-0.5, 1, [11, 2], [-0.5, -1.5])},
    logits=Tensor("float32", [1, 2], b"\0" * 8),
)


class Echo:
    """Answers a step with the output above, if the step arrived as it was sent."""

    def execute_model(self, step: StepInput) -> StepOutput:
        assert step == STEP
        return OUTPUT

    def check_health(self) -> None:
        raise ConfigError("mend it")

    def anything(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def odd(self) -> Any:
        return lambda: 1  # cloudpickle can, pickle cannot

    def unsendable(self) -> Any:
        return iter([1]), (n for n in ())


class Late:
    """Its methods return before their results are there."""

    def __init__(self) -> None:
        self.finished: list[str] = []

    def _later(self, name: str, result: Any) -> Deferred:
        def finish() -> Any:
            self.finished.append(name)
            if isinstance(result, Exception):
                raise result
            return result

        return Deferred(finish)

    def execute_model(self, step: StepInput) -> Deferred:
        return self._later("execute_model", OUTPUT)

    def anything(self, result: Any) -> Deferred:
        return self._later("anything", result)

    def inside(self) -> list[Deferred]:
        return [self._later("inside", 1)]


def call(method: Any, *args: Any, **kwargs: Any) -> Any:
    name, payload = encode_call(method, args, kwargs)
    return decode_reply(name, invoke(Echo(), name, payload), rank=4)


def test_a_step_is_typed_and_arrives_as_it_was_sent() -> None:
    name, payload = encode_call("execute_model", (STEP,), None)
    assert (name, payload[:1]) == ("execute_model", b"t")
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(payload[1:])
    back = call("execute_model", STEP)
    assert back == OUTPUT
    assert back.logits.numpy().tolist() == [[0.0, 0.0]]


def test_everything_else_is_pickled() -> None:
    assert call("anything", 1, b="c") == ((1,), {"b": "c"})
    assert call(lambda worker, x: (type(worker).__name__, x), 2) == ("Echo", 2)
    assert encode_call(lambda worker: 0, (), None)[0] == CALLABLE
    assert call("odd")() == 1


SPAWNING = """
import multiprocessing, sys

class OfTheScript:
    answer = 42

def child(pipe):
    from lightvllm.messages import encode_value
    pipe.send(encode_value(OfTheScript))

if __name__ == "__main__":
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(there,))
    process.start()
    sys.stdout.buffer.write(here.recv())
    process.join()
"""


def test_what_a_users_script_defines_reaches_workers_from_its_spawned_children(tmp_path: Path) -> None:
    """Multiprocessing calls the script __mp_main__ there; vLLM's engine core is such a child."""
    script = tmp_path / "script.py"
    script.write_text(SPAWNING)
    sent = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, timeout=60, check=True).stdout
    assert decode_value(sent).answer == 42


def test_the_users_mistakes_come_back_as_such_and_others_with_their_traceback() -> None:
    with pytest.raises(ConfigError, match="mend it"):
        call("check_health")
    with pytest.raises(WorkerError, match="rank 4 failed in missing: AttributeError") as caught:
        call("missing")
    assert "Traceback" in caught.value.remote_traceback
    with pytest.raises(WorkerError, match="rank 4 failed in unsendable"):
        call("unsendable")


def test_what_is_not_of_the_declared_type_is_refused() -> None:
    _, payload = encode_call("execute_model", ("not a step",), None)
    with pytest.raises(WorkerError, match="ValidationError"):
        decode_reply("execute_model", invoke(Echo(), "execute_model", payload))
    reply = invoke(Echo(), "execute_model", b"?" + payload[1:])
    with pytest.raises(ConfigError, match="unknown payload tag"):
        decode_reply("execute_model", reply)
    with pytest.raises(LightvllmError, match="unknown reply tag"):
        decode_reply("execute_model", b"?")


@pytest.mark.parametrize(
    ("method", "args", "expected"),
    [("execute_model", (STEP,), OUTPUT), ("anything", (7,), 7), (lambda worker, x: worker.anything(x), (7,), 7)],
)
def test_what_was_only_begun_is_finished_later_and_encoded_as_ever(method: Any, args: Any, expected: Any) -> None:
    name, payload = encode_call(method, args, None)
    worker = Late()
    finish = begin(worker, name, payload)
    assert callable(finish)
    assert worker.finished == []
    assert decode_reply(name, finish()) == expected
    assert len(worker.finished) == 1
    assert decode_reply(name, invoke(worker, name, payload)) == expected  # which finishes it at once


def test_what_is_done_at_once_is_encoded_at_once() -> None:
    name, payload = encode_call("anything", (1,), None)
    reply = begin(Echo(), name, payload)
    assert isinstance(reply, bytes)
    assert decode_reply(name, reply) == ((1,), {})


def test_an_error_of_what_was_only_begun_is_the_replys() -> None:
    name, payload = encode_call("anything", (KeyError("k"),), None)
    finish = begin(Late(), name, payload)
    assert callable(finish)
    for reply in (finish(), invoke(Late(), name, payload)):
        with pytest.raises(WorkerError, match="KeyError: 'k'") as caught:
            decode_reply(name, reply)
        assert "in finish" in caught.value.remote_traceback


def test_a_deferred_is_no_part_of_a_result() -> None:
    with pytest.raises(WorkerError, match="cannot be sent, nor be a part"):
        decode_reply("inside", invoke(Late(), *encode_call("inside", (), None)))


def test_a_failure_keeps_its_class_and_message() -> None:
    with pytest.raises(WorkerError) as caught:
        decode_reply("m", encode_failure(KeyError("k")), 1)
    assert (caught.value.rank, caught.value.kind, caught.value.remote_message) == (1, "KeyError", "'k'")


def test_the_worker_has_every_typed_method_and_no_other() -> None:
    public = {name for name in vars(Worker) if not name.startswith("_")}
    assert public == set(TYPED_METHODS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 6)])
def test_pickled_tensors_keep_their_bits(dtype: str, shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel() * torch.empty(0, dtype=kind).element_size()
    tensor = (torch.arange(count) % (2 if dtype == "bool" else 251)).to(torch.uint8).view(kind).reshape(shape)
    for sent in (tensor, tensor.t().contiguous().t() if tensor.dim() == 2 else tensor):
        got = decode_value(encode_value({"x": [sent]}))["x"][0]
        assert (got.dtype, got.shape) == (kind, sent.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), sent.reshape(-1).view(torch.uint8))
        if count:
            got.reshape(-1).view(torch.uint8).fill_(255)  # it is the receiver's own, and can be written to
            assert sent.reshape(-1).view(torch.uint8)[0] == 0


def test_a_tensor_that_is_more_than_its_bits_is_left_to_torch() -> None:
    torch = pytest.importorskip("torch")
    tagged = torch.ones(2)
    tagged.tag = "kept"
    values = [torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True), tagged]
    parameter, leaf, noted = decode_value(encode_value(values))
    assert isinstance(parameter, torch.nn.Parameter)
    assert leaf.requires_grad
    assert noted.tag == "kept"


def test_a_step_s_output_of_some_of_its_sequences() -> None:
    def rows(*values: float) -> Tensor:
        return Tensor("float32", [len(values), 1], struct.pack(f"<{len(values)}f", *values))

    found = {seq_id: TokenLogprobs(-1.0, 1, [], []) for seq_id in (7, 8, 9)}
    output = StepOutput(
        step=3,
        seq_ids=[7, 8, 9],
        token_ids=[70, 80, 90],
        logprobs=found,
        errors={7: "a", 8: "b"},
        logits=rows(1, 2, 3),
        embeddings=rows(4, 5, 6),
    )
    some = output.only([True, False, True])
    assert (some.step, some.seq_ids, some.token_ids) == (3, [7, 9], [70, 90])
    assert (some.logprobs, some.errors) == ({7: found[7], 9: found[9]}, {7: "a"})
    assert (some.logits, some.embeddings) == (rows(1, 3), rows(4, 6))
    assert output.only([False] * 3).logits == rows()

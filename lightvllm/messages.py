"""What driver and workers say to each other, and how it becomes bytes.

Two encodings, told apart by a payload's first byte:

* **typed** (msgspec, MessagePack): the methods of ``TYPED_METHODS``, which are all that the lightvllm engine calls.
  Decoding can only ever produce the types declared here.
* **pickled** (cloudpickle): everything else, such as a callable given to ``collective_rpc`` or another engine's
  objects. Unpickling runs code, so a payload may be decoded only on a connection that has proved who it is;
  the backends see to that before a payload reaches ``decode_call``.

A backend moves these bytes and knows none of the types.
"""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import cloudpickle
import msgspec

from lightvllm.config import EngineConfig
from lightvllm.errors import ConfigError, LightvllmError, WorkerError
from lightvllm.sampling_params import SamplingParams

Buffer = bytes | bytearray | memoryview

# ---------------------------------------------------------------------------------------------- start-up


class StageCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker shows to the pipeline stages beside its own. No ``repr`` shows it.

    Attributes:
        group: a random name for this group of workers; no secret.
        token: a secret that all workers of the group have.
        cert, key, ca: PEM, for mutual TLS between hosts: the worker's certificate and key, and the group's CA.
    """

    group: str
    token: str
    cert: bytes = b""
    key: bytes = b""
    ca: bytes = b""

    def __repr__(self) -> str:
        return f"StageCredentials(group={self.group!r}, hidden)"

    def __rich_repr__(self) -> Any:
        yield "group", self.group


class WorkerInit(msgspec.Struct, frozen=True, kw_only=True):
    """Who a worker is. ``local_rank`` counts the workers on its node; ``device_index`` is its GPU, of those it sees.

    ``stage_credentials`` are there if there are several pipeline stages.
    """

    rank: int
    local_rank: int
    local_world_size: int
    device_index: int
    world_size: int
    config: EngineConfig
    stage_credentials: StageCredentials | None = None


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one block of KV cache costs this worker, bytes (its layers, its heads, K and V)."""

    bytes_per_block: int


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself after ``load_model``. ``pp_transport`` is ``""`` where there is one stage only."""

    rank: int
    device: str
    threads: int
    attention_backend: str
    kernels: str
    parameter_bytes: int
    pp_transport: str = ""


# ------------------------------------------------------------------------------------------------- a step


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the workers do not know: a new one, or one that was preempted and comes again.

    ``token_ids`` are the prompt and, after a preemption, what had been generated; ``prompt_len`` tells them apart
    (penalties count the generated ones). ``seed`` is always set: the driver draws one where the user gave none.
    """

    seq_id: int
    token_ids: list[int]
    prompt_len: int
    seed: int
    sampling: SamplingParams
    stop_token_ids: list[int]  # tokens that may not be sampled before min_tokens
    bad_words: list[list[int]] = []  # token sequences that may not be completed
    # With SamplingParams.prompt_logprobs: how many of the prompt's first tokens need none (any more); always the first.
    num_prompt_logprobs: int = 1


SAMPLED_LAST = -1
"""In ``ScheduledSequence.new_token_ids``: the token that the workers sampled last for this sequence."""


class ScheduledSequence(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's share of a step: compute positions ``start`` to ``start + count - 1``.

    ``new_token_ids`` are appended to the worker's copy of the sequence first: the token sampled last, or
    ``SAMPLED_LAST`` where the driver does not know it yet. ``new_block_ids`` go to its block table. A token is
    sampled exactly when ``start + count`` is the sequence's length.
    """

    seq_id: int
    start: int
    count: int
    new_token_ids: list[int]
    new_block_ids: list[int]


class StepInput(msgspec.Struct, frozen=True, kw_only=True):
    """All that the workers need for one step. The order of ``scheduled`` is the order of the rows of the batch."""

    step: int
    finished: list[int] = []  # sequences to forget, before anything else is done
    new: list[NewSequence] = []
    scheduled: list[ScheduledSequence] = []


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The chosen token's log-probability and rank (1 is the best), and the most probable tokens, best first."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Tensor(msgspec.Struct, frozen=True):
    """A dense tensor by value: row-major bytes, and torch's name of the dtype without ``torch.``.

    ``numpy()`` for the dtypes that numpy has; ``lightvllm.transfer.tensors`` knows them all.
    """

    dtype: str
    shape: list[int]
    data: bytes

    def numpy(self) -> Any:
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    def rows(self, wanted: Sequence[bool]) -> Tensor:
        """Some of its rows."""
        rows = self.numpy()[list(wanted)]
        return Tensor(self.dtype, list(rows.shape), rows.tobytes())


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A step's result, one entry per sequence that was sampled, in the order of ``StepInput.scheduled``.

    Attributes:
        prompt_logprobs: by seq_id, sampled or not, for the tokens of the prompt whose log-probabilities this step has
            found, following those of the steps before.
        errors: by seq_id, why no token could be chosen; the sequence's entry of ``token_ids`` means nothing then.
        model_seconds: time the output rank spent in this step, sampling included.
        logits: float32, [sampled, vocab_size], before penalties; only if ``EngineConfig.return_logits``.
        embeddings: float32, [sampled, hidden_size], of a model that makes them, of the prompts that this step has
            completed; ``token_ids`` mean nothing then.
    """

    step: int
    seq_ids: list[int]
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # by seq_id
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    errors: dict[int, str] = {}
    model_seconds: float = 0.0
    logits: Tensor | None = None
    embeddings: Tensor | None = None

    def only(self, wanted: Sequence[bool]) -> StepOutput:
        """The same, of these sequences alone."""
        seq_ids = list(itertools.compress(self.seq_ids, wanted))
        return msgspec.structs.replace(
            self,
            seq_ids=seq_ids,
            token_ids=list(itertools.compress(self.token_ids, wanted)),
            logprobs={seq_id: found for seq_id, found in self.logprobs.items() if seq_id in seq_ids},
            errors={seq_id: error for seq_id, error in self.errors.items() if seq_id in seq_ids},
            logits=self.logits.rows(wanted) if self.logits else None,
            embeddings=self.embeddings.rows(wanted) if self.embeddings else None,
        )


# ---------------------------------------------------------------------------------------------- encoding


class _Method(msgspec.Struct, frozen=True):
    args: Any  # a tuple type
    result: Any


TYPED_METHODS: dict[str, _Method] = {
    "init_worker": _Method(tuple[WorkerInit], None),
    "open_rendezvous": _Method(tuple[()], str),
    "open_stage_transport": _Method(tuple[()], str),
    "init_device": _Method(tuple[str], None),
    "connect_stage_transport": _Method(tuple[str], None),
    "load_model": _Method(tuple[()], WorkerInfo),
    "get_kv_cache_spec": _Method(tuple[()], CacheSpec),
    "determine_available_memory": _Method(tuple[()], int),
    "initialize_from_config": _Method(tuple[int], None),
    "compile_or_warm_up_model": _Method(tuple[()], None),
    "execute_model": _Method(tuple[StepInput], StepOutput | None),
    "execute_stage": _Method(tuple[StepInput, list[Tensor]], tuple[StepOutput | None, list[Tensor]]),
    "reset_sequences": _Method(tuple[()], None),
    "set_return_logits": _Method(tuple[bool], None),
    "check_health": _Method(tuple[()], None),
    "close_stage_transport": _Method(tuple[()], None),
}

CALLABLE = "<callable>"  # the method name under which a pickled callable travels
_TYPED, _PICKLED, _FAILED = b"t", b"p", b"f"


class RemoteFailure(msgspec.Struct, frozen=True):
    """An exception, as text: its class, its message, its traceback, and whether its text is meant for users.

    ``node``: in a compiled graph, the node that raised it (its position in ``Graph.nodes``).
    """

    kind: str
    message: str
    traceback: str
    is_config_error: bool = False
    node: int | None = None


@functools.cache
def _decoder(type_: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(type_)


_encoder = msgspec.msgpack.Encoder()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, with tensors as their bits: torch's own way is slow, and cannot bring fp8 back (torch 2.13)."""

    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(obj) is not torch.Tensor or not _is_plain(torch, obj):
            return super().reducer_override(obj)
        bits = obj.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (str(obj.dtype).removeprefix("torch."), tuple(obj.shape), pickle.PickleBuffer(bits))


def _is_plain(torch: Any, tensor: Any) -> bool:
    """Whether its bits, dtype and shape are all there is to know."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or vars(tensor))
    )


def _tensor(dtype: str, shape: tuple[int, ...], bits: bytearray) -> Any:
    torch = importlib.import_module("torch")
    if not bits:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.frombuffer(bits, dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)


_SCALARS = frozenset((type(None), bool, int, float, complex))
_SIMPLE_BYTES = 16 * 2**10  # longer ones are worth a way that copies them less often


def _is_simple(value: Any) -> bool:
    """Whether plain pickle does the same as ``_Pickler``, in a third of the time."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is bytes or kind is str:
        return len(value) <= _SIMPLE_BYTES
    return (kind is tuple and all(map(_is_simple, value))) or (kind is dict and not value)


def _pickled(value: Any, take: Callable[[pickle.PickleBuffer], object] | None = None) -> bytes:
    if _is_simple(value):
        return _PICKLED + pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    # What multiprocessing's spawned children call the user's script. Workers have it no more than they have __main__,
    # of which cloudpickle knows that.
    main = sys.modules.get("__mp_main__")
    if main is not None and main.__name__ == "__mp_main__":
        cloudpickle.register_pickle_by_value(main)
    with io.BytesIO() as file:
        file.write(_PICKLED)
        _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL, buffer_callback=take).dump(value)
        return file.getvalue()


def encode_call(
    method: str | Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None
) -> tuple[str, bytes]:
    """``(method name, payload)`` of a call. A callable receives the worker as its first argument, as in vLLM."""
    if callable(method):
        return CALLABLE, _pickled((method, tuple(args), kwargs or {}))
    if method in TYPED_METHODS and not kwargs:
        return method, _TYPED + _encoder.encode(tuple(args))
    return method, _pickled((tuple(args), kwargs or {}))


class Deferred:
    """What a method returns whose result has only been begun: ``finish()`` gives it, or raises.

    ``finish`` is called once, on another thread, while the worker runs its next calls, and after that of every Deferred
    that the worker has returned before. Where nothing can be put off (``invoke``) it is called at once, in the same
    thread.
    """

    __slots__ = ("finish",)

    def __init__(self, finish: Callable[[], Any]) -> None:
        self.finish = finish

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Deferred is what a method returns; it cannot be sent, nor be a part of what is sent")


def begin(worker: object, method: str, payload: Buffer) -> bytes | Callable[[], bytes]:
    """``invoke``, but where the method returned a Deferred, what finishes it and encodes what comes of it.

    Neither this nor what it returns raises an Exception.
    """
    encode: Callable[[Any], bytes]
    try:
        tag, body = bytes(payload[:1]), memoryview(payload)[1:]
        if tag == _TYPED:
            declared = TYPED_METHODS[method]
            result = getattr(worker, method)(*_decoder(declared.args).decode(body))
            encode = encode_result
        else:
            if tag != _PICKLED:
                raise ConfigError(f"unknown payload tag {tag!r}; expected {_TYPED!r} or {_PICKLED!r}")
            if method == CALLABLE:
                function, args, kwargs = pickle.loads(body)  # noqa: S301  authenticated, see the module's docstring
                result = function(worker, *args, **kwargs)
            else:
                args, kwargs = pickle.loads(body)  # noqa: S301
                result = getattr(worker, method)(*args, **kwargs)
            encode = _pickled
        if isinstance(result, Deferred):
            return functools.partial(_finished, result, encode)
        return encode(result)
    except Exception as error:  # noqa: BLE001  whatever it is, the caller gets it
        return encode_failure(error)


def _finished(deferred: Deferred, encode: Callable[[Any], bytes]) -> bytes:
    try:
        return encode(deferred.finish())
    except Exception as error:  # noqa: BLE001  as in begin
        return encode_failure(error)


def invoke(worker: object, method: str, payload: Buffer) -> bytes:
    """Decode a call, make it on ``worker``, and encode what comes of it; never raises an Exception.

    Only for payloads from an authenticated peer. An exception of the method becomes a failure that
    ``decode_reply`` raises at the caller. A Deferred is finished here.
    """
    reply = begin(worker, method, payload)
    return reply if isinstance(reply, bytes) else reply()


def decode_args(method: str, payload: Buffer) -> tuple[Any, ...]:
    """The arguments of an encoded call of one of TYPED_METHODS. Raises ConfigError for anything else."""
    if method not in TYPED_METHODS or bytes(payload[:1]) != _TYPED:
        raise ConfigError(f"the arguments of {method} must be typed (lightvllm.messages.encode_call)")
    try:
        args: tuple[Any, ...] = _decoder(TYPED_METHODS[method].args).decode(memoryview(payload)[1:])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the arguments of {method} cannot be read: {error}") from None
    return args


def encode_result(result: Any) -> bytes:
    """A result of one of TYPED_METHODS, for ``decode_reply``."""
    return _TYPED + _encoder.encode(result)


def encode_value(value: Any, take: Callable[[pickle.PickleBuffer], object] | None = None) -> bytes:
    """A value for a compiled graph, pickled; see the module's docstring for what that demands.

    ``take`` is shown the memory of each tensor and array in it. What it returns something false for is left out, and
    must be given to ``decode_value`` in the same order.
    """
    return _pickled(value, take)


def decode_value(
    payload: Buffer,
    origin: Callable[[int | None], tuple[int | None, str]] | None = None,
    buffers: Sequence[Buffer] | None = None,
) -> Any:
    """What ``encode_value`` encoded. Raises as ``decode_reply`` does for what ``encode_failure`` encoded; ``origin``
    tells the rank and the method of the node that failed. ``buffers``, writable, become the value's own memory."""
    if payload[:1] == _PICKLED:
        return pickle.loads(memoryview(payload)[1:], buffers=buffers)  # noqa: S301  authenticated, see there
    if is_failure(payload):
        _raise_failure(payload, *(origin(_failure(payload).node) if origin else (None, "a node of the graph")))
    return decode_reply("a node of the graph", payload)


def is_failure(payload: Buffer) -> bool:
    """Whether it is what ``encode_failure`` encoded."""
    return payload[:1] == _FAILED


def encode_failure(error: BaseException, node: int | None = None) -> bytes:
    text = "".join(traceback.format_exception(error))
    return _FAILED + _encoder.encode(
        RemoteFailure(type(error).__name__, str(error), text, isinstance(error, ConfigError), node)
    )


def _failure(payload: Buffer) -> RemoteFailure:
    failure: RemoteFailure = _decoder(RemoteFailure).decode(memoryview(payload)[1:])
    return failure


def _raise_failure(payload: Buffer, rank: int | None, method: str) -> NoReturn:
    failure = _failure(payload)
    if failure.is_config_error:
        raise ConfigError(failure.message)
    raise WorkerError(rank, method, failure.kind, failure.message, failure.traceback)


def decode_reply(method: str, reply: Buffer, rank: int | None = None) -> Any:
    """The result of a call, or its exception: ConfigError for one that is the user's to mend, else WorkerError."""
    tag, body = bytes(reply[:1]), memoryview(reply)[1:]
    if tag == _TYPED:
        return _decoder(TYPED_METHODS[method].result).decode(body)
    if tag == _PICKLED:
        return pickle.loads(body)  # noqa: S301  from a worker that this driver started or authenticated
    if tag == _FAILED:
        _raise_failure(reply, rank, method)
    raise LightvllmError(f"unknown reply tag {tag!r} from rank {rank}; do driver and worker run the same lightvllm?")

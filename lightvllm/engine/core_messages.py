"""What an engine's loop (``core.py``) and its front (``async_llm.py``) say to each other.

Commands go to the loop, events come back. Both are plain values, so that they cross a process border as MessagePack;
decoding can only produce the types declared here. Requests go by a number that the front gives each of them once, so
that nothing that is still under way for an old request can be taken for a new one's.
"""

from __future__ import annotations

import msgspec

from lightvllm import errors
from lightvllm.config import EngineConfig, ExecutorConfig
from lightvllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, merge
from lightvllm.engine.protocol import RankState
from lightvllm.engine.stats import EngineStats
from lightvllm.errors import LightvllmError
from lightvllm.sampling_params import SamplingParams

MAX_FRAME_BYTES = 2**32
"""Of one message between processes: more than all the text that may be under way."""

# ----------------------------------------------------------------------------------------------- errors


class Failure(msgspec.Struct, frozen=True):
    """An error of ``errors.py`` as a value: the class's name, the text, and the attributes (``WorkerDied.rank`` …)."""

    kind: str
    message: str
    attributes: dict[str, str | float | int | None] = {}

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """An interrupt becomes a Shutdown; anything else that is not lightvllm's own is a defect, and becomes a
        LightvllmError that says so."""
        if isinstance(error, KeyboardInterrupt):
            return cls("Shutdown", "the engine was ended while it was starting")
        if not isinstance(error, LightvllmError):
            return cls("LightvllmError", f"internal error in the engine: {type(error).__name__}: {error}")
        return cls(type(error).__name__, str(error), dict(vars(error)))

    def error(self) -> LightvllmError:
        """A new exception, equal to the one that this was made of."""
        kind = getattr(errors, self.kind)
        error: LightvllmError = kind.__new__(kind, self.message)
        Exception.__init__(error, self.message)
        vars(error).update(self.attributes)
        return error


# --------------------------------------------------------------------------------------------- commands


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to an engine process.

    Attributes:
        path: the model's folder, for its tokenizer.
        executor_factory: ``"module:function"`` that makes the executor, called like ``factory.make_executor``.
        sys_path: the parent's, so that what it can import can be imported here.
    """

    engine: EngineConfig
    executor: ExecutorConfig
    path: str
    skip_tokenizer_init: bool
    executor_factory: str
    sys_path: list[str]


class Add(msgspec.Struct, frozen=True, tag=True):
    """Run a request, which has been checked.

    Attributes:
        sampling_params: None asks for an embedding.
        stream: report what is new after each step; or else all of it at its end.
        arrival_time: by ``time.monotonic()``, one clock for all processes of a machine. ``timeout`` counts from then.
    """

    number: int
    prompt_token_ids: list[int]
    sampling_params: SamplingParams | None
    stream: bool
    arrival_time: float
    priority: int = 0
    timeout: float | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request; nothing more is said of it."""

    number: int


class CheckHealth(msgspec.Struct, frozen=True, tag=True):
    """Ask every worker; ``Health`` is the answer. One at a time."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the workers and the loop."""


Command = Start | Add | Abort | CheckHealth | Stop

# ----------------------------------------------------------------------------------------------- events


class Progress(msgspec.Struct, frozen=True, tag=True):
    """What the start is waiting for."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first step can be run."""

    ranks: list[RankState]
    stats: EngineStats
    start_seconds: float


class Delta(msgspec.Struct, array_like=True):
    """What is new of a request; all of it, if nothing was said of it before.

    Attributes:
        outputs: of the sequences that have changed.
        num_cached_tokens, prompt_logprobs: in the first one that knows them.
        metrics: in the first and the last one.
    """

    number: int
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    embedding: list[float] | None = None

    @classmethod
    def of(cls, number: int, output: RequestOutput, *, first: bool) -> Delta:
        """``output``: of a delta stream, or a finished one."""
        return cls(
            number,
            output.outputs,
            output.finished,
            output.num_cached_tokens if first else None,
            output.metrics if first or output.finished else None,
            output.prompt_logprobs,
            output.embedding,
        )

    def add(self, later: Delta) -> None:
        """Take in the request's next one."""
        merge(self.outputs, later.outputs)
        self.finished = later.finished
        self.metrics = later.metrics or self.metrics
        if self.num_cached_tokens is None:
            self.num_cached_tokens = later.num_cached_tokens
        if self.prompt_logprobs is None:
            self.prompt_logprobs = later.prompt_logprobs
        self.embedding = self.embedding or later.embedding


class Outputs(msgspec.Struct, tag=True):
    """All that there is to say after a step; or after commands that were taken while there was none to run."""

    deltas: list[Delta]
    stats: EngineStats
    refused: dict[int, Failure] = {}

    def add(self, later: Outputs) -> None:
        """Take in the next one, so that both become one."""
        known = {delta.number: delta for delta in self.deltas}
        for delta in later.deltas:
            if delta.number in known:
                known[delta.number].add(delta)
            else:
                self.deltas.append(delta)
        self.stats = later.stats
        self.refused |= later.refused


class Health(msgspec.Struct, frozen=True, tag=True):
    """Every worker answered, or why not."""

    failure: Failure | None = None


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The loop takes no more commands: a Shutdown that was asked for, a start that failed, or the engine's failure.

    Said at once, before the workers that are left are ended.
    """

    failure: Failure


Event = Progress | Ready | Outputs | Health | Ended

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    return _encoder.encode(message)


def decode_command(payload: bytes | bytearray) -> Command:
    return _commands.decode(payload)


def decode_event(payload: bytes | bytearray) -> Event:
    return _events.decode(payload)

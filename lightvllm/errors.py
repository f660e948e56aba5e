"""Every exception that a caller of lightvllm can see, and nothing else.

    LightvllmError
    ├── ConfigError          the request itself is wrong: an option, a model, a layout, bad input
    │   └── MissingExtra     an optional package is not installed; the message is the install command
    ├── PlacementError       not all workers could be placed; those that were are gone again
    ├── AuthError            a peer did not prove who it is, or refused us
    ├── WorkerError          a worker's method raised; carries rank, method and the remote traceback
    ├── WorkerDied           a worker's process, actor or connection is gone
    ├── RpcTimeout           a call was not answered in time (also a TimeoutError, as in vLLM)
    ├── GraphCapacityExceeded  a compiled graph holds as many executions or results as it may
    ├── ServerError          a model server could not be reached, answered with an error, or broke off
    ├── InvalidOutput        a model's text is not what structured_output asks for
    ├── QueueFull            an engine has as many requests waiting as it may; says when to come again
    └── Shutdown             the executor or backend has been shut down

Exceptions of ray, grpc, kubernetes or torch never cross a public border. Any module may import this one;
it imports nothing.
"""


class LightvllmError(Exception):
    """Base of the tree. Its text is one line a user can act on: what was got, what was expected, what to do."""


class ConfigError(LightvllmError, ValueError):
    """What was asked for cannot be done as asked; nothing has been started."""


class MissingExtra(ConfigError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed; run: pip install 'lightvllm[{extra}]'"
        )
        self.package = package
        self.extra = extra


class PlacementError(LightvllmError):
    """Placement is all or nothing: it failed and has been undone. The text says what was missing."""


class AuthError(LightvllmError):
    """A token or certificate was missing or wrong."""


class WorkerError(LightvllmError):
    """A method raised inside a worker. The worker itself is alive and can be called again.

    Attributes:
        rank: global rank of the worker, or None if the failure came before ranks were dealt.
        method: the name of the method.
        kind: the remote exception's class name, e.g. ``"ValueError"``.
        remote_message: ``str()`` of the remote exception.
        remote_traceback: the traceback as text, formatted where it happened.
    """

    def __init__(
        self, rank: int | None, method: str, kind: str, remote_message: str, remote_traceback: str = ""
    ) -> None:
        where = "a worker" if rank is None else f"rank {rank}"
        super().__init__(f"{where} failed in {method}: {kind}: {remote_message}")
        self.rank = rank
        self.method = method
        self.kind = kind
        self.remote_message = remote_message
        self.remote_traceback = remote_traceback


class WorkerDied(LightvllmError):
    """A worker is gone: its process ended, its actor died, or the connection to it broke.

    Attributes:
        worker: the backend's id of the worker.
        reason: how it ended, e.g. ``"killed by SIGKILL"``.
        rank: global rank, or None if ranks were not dealt yet.
    """

    def __init__(self, worker: str, reason: str, rank: int | None = None) -> None:
        who = f"worker {worker}" if rank is None else f"worker {worker} (rank {rank})"
        super().__init__(f"{who} died: {reason}")
        self.worker = worker
        self.reason = reason
        self.rank = rank


class RpcTimeout(LightvllmError, TimeoutError):
    """A call was not answered in time. The workers may still be executing it."""


class GraphCapacityExceeded(LightvllmError):
    """A compiled graph was executed, or its results were left, beyond the bounds that it was compiled with.

    Nothing has been done; get or drop refs, then try again.
    """


class ServerError(LightvllmError):
    """A model server could not be reached, answered with an error, or broke off. Keys that it refuses are AuthError.

    Attributes:
        status: the HTTP status; None where no answer came.
        kind, code, param: ``type``, ``code`` and ``param`` of OpenAI's error object, where the server sent one.
        request_id: the server's ``X-Request-Id``, to be looked for in its logs.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        kind: str | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.request_id = request_id


class InvalidOutput(LightvllmError):
    """A model's text is not what ``structured_output`` asks for.

    Attributes:
        text: what the model wrote.
        finish_reason: why it ended; ``"length"`` for one that was cut off.
    """

    def __init__(self, message: str, text: str, finish_reason: str | None = None) -> None:
        super().__init__(message)
        self.text = text
        self.finish_reason = finish_reason


class QueueFull(LightvllmError):
    """An engine has as many requests waiting as it may. Nothing has been queued.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Shutdown(LightvllmError):
    """The call came after ``shutdown``, or ``shutdown`` ended it."""

"""The worker server: the process in which a worker class lives, behind authenticated gRPC.

Started by ``process.WorkerProcess`` and by nothing else; see there for what its standard streams mean. It serves one
driver and then ends: politely when the driver closed its session, at once (``os._exit``, even if the worker is stuck in
a collective) when the driver has gone or stdin has ended.

Everything that touches the worker, its construction included, happens in the thread of the Session's handler: no
hand-over per call, and what is bound to a thread (a CUDA device, inference mode) stays true. torch is not imported
before InitWorker has set the environment.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import platform
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lightvllm.backends.base import load_worker_class
from lightvllm.backends.k8s import wire
from lightvllm.backends.k8s.devices import visible_gpus
from lightvllm.backends.k8s.process import Bootstrap, Status
from lightvllm.backends.k8s.security import Token
from lightvllm.errors import ConfigError
from lightvllm.messages import encode_failure, invoke
from lightvllm.proto import worker_pb2 as pb
from lightvllm.version import __version__

_THREADS = 8  # one is the session's; the others answer health checks and refuse
_EXIT_SECONDS = 2.0  # that a polite end may take
_binding = threading.Lock()  # no socket is made while, or after, it is being removed for good


def main() -> NoReturn:
    status_fd, hangup_fd = os.dup(1), os.dup(0)
    os.dup2(2, 1)  # what the worker prints goes to stderr, line by line
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hangup = open(hangup_fd, "rb")  # noqa: SIM115  until the process ends
    line = hangup.readline()
    if not line.endswith(b"\n"):  # the parent has gone already
        sys.exit(0)
    bootstrap = msgspec.json.decode(line, type=Bootstrap)
    threading.Thread(target=_exit_at_end_of, args=(hangup, bootstrap.listen), daemon=True).start()
    sys.path.extend(entry for entry in bootstrap.sys_path if entry not in sys.path)
    try:
        host = _serve(bootstrap, status_fd)
        host.ended.wait()
        limit = threading.Timer(_EXIT_SECONDS, os._exit, [0])
        limit.daemon = True
        limit.start()
        host.close()
        atexit._run_exitfuncs()  # what the worker has registered; tearing the interpreter down takes torch seconds
    finally:
        _forget_socket(bootstrap.listen)
    sys.stderr.flush()
    os._exit(0)


def _exit_at_end_of(hangup: Any, listen: str) -> None:
    while hangup.read(1):
        pass
    with _binding:
        _forget_socket(listen)
        os._exit(0)


def _forget_socket(listen: str) -> None:
    """Remove the socket and, as the last of its siblings, its directory; the driver may have done so before."""
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()


def _serve(bootstrap: Bootstrap, status_fd: int) -> Host:
    """The server, listening; the parent is told where, or why not."""
    try:
        with _binding:
            host = Host(bootstrap)
        status = Status(address=host.address)
    except RuntimeError:  # all that grpc says of any failure to bind
        status = Status(error=f"cannot listen on {bootstrap.listen}: is the address in use?")
    except ConfigError as error:
        status = Status(error=str(error))
    with contextlib.suppress(BrokenPipeError):  # the parent has gone, and with it our stdin
        os.write(status_fd, msgspec.json.encode(status) + b"\n")
    os.close(status_fd)
    if status.error:
        sys.exit(1)
    return host


class _RequireToken:
    """Interceptor: lets nothing but health checks through without the token, before any message is read.

    A ``grpc.ServerInterceptor`` in all but name, which has no types.
    """

    def __init__(self, token: Token) -> None:
        self._token = token
        # A stream handler for every method: a unary one would have read the request first.
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        allowed = details.method.startswith(f"/{health.SERVICE_NAME}/")
        if allowed or self._token.matches(details.invocation_metadata):
            return continuation(details)
        return self._refusal

    @staticmethod
    def _refuse(_: object, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")


class Host:
    """The gRPC server and the one driver that it serves.

    Attributes:
        address: where it listens.
        ended: set when the driver has closed its session.
    """

    def __init__(self, bootstrap: Bootstrap) -> None:
        """Listens when it returns. Raises RuntimeError if it cannot, ConfigError for an unreadable TLS file."""
        self._listen = bootstrap.listen
        self._limit = bootstrap.max_message_bytes
        self._lock = threading.Lock()
        self._driver: str | None = None
        self._closed_by_driver = False
        self._asked: Future[pb.InitWorkerRequest] = Future()
        self._answered: Future[pb.InitWorkerReply] = Future()
        self.ended = threading.Event()
        interceptors: Any = [_RequireToken(Token(bootstrap.token))]
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="lightvllm-grpc"),
            interceptors=interceptors,
            options=wire.server_options(bootstrap.listen, self._limit),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers((wire.handlers(self._init_worker, self._session),))
        port = wire.bind(self._server, bootstrap.listen, bootstrap.tls)
        unix = bootstrap.listen.startswith("unix:")
        self.address = bootstrap.listen if unix else f"{bootstrap.listen.rpartition(':')[0]}:{port}"
        self._server.start()
        for service in ("", wire.SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._server.stop(0.2).wait()

    # ------------------------------------------------------------------------------------------ the two RPCs

    def _session(self, calls: Iterator[Any], context: Any) -> Iterator[Any]:
        """Take the worker, construct it, then run its calls one by one, in the order in which they arrive."""
        driver = _driver_of(context, wire.DRIVER_KEY)
        if not driver:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the metadata lacks {wire.DRIVER_KEY}")
        with self._lock:
            free = self._driver is None
            self._driver = self._driver or driver
        if not free:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "it is serving another driver; a worker serves one at a time"
            )
        if not context.add_callback(self._session_over):
            self._session_over()
        context.send_initial_metadata((wire.ACCEPTED,))
        worker, failure = self._construct()
        for call in calls:
            try:
                reply = failure or _invoke(worker, call.method, call.payload, self._limit)
            except BaseException as error:  # noqa: BLE001  SystemExit and the like: the end of the process
                _exit_with(error)
            yield pb.Reply(sequence_number=call.sequence_number, payload=reply)
        self._closed_by_driver = True

    def _session_over(self) -> None:
        for service in ("", wire.SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        if not self._closed_by_driver:
            _forget_socket(self._listen)
            os._exit(0)
        self.ended.set()

    def _init_worker(self, request: Any, context: Any) -> Any:
        driver = _driver_of(context, wire.DRIVER_KEY)
        with self._lock:
            expected = driver is not None and driver == self._driver and not self._asked.done()
            if expected:
                self._asked.set_result(request)
        if not expected:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "InitWorker is called once, by the driver that has a session"
            )
        return self._answered.result()

    # ---------------------------------------------------------------------------------------------------------

    def _construct(self) -> tuple[object, bytes]:
        """The worker and nothing, or None and an encoded failure; InitWorker is answered either way."""
        worker, failure = None, b""
        request = self._asked.result()
        for name, value in request.env.items():
            os.environ.setdefault(name, value)
        try:
            worker = load_worker_class(request.worker_class)()
        except Exception as error:  # noqa: BLE001  whatever it is, the driver gets it
            failure = encode_failure(error)
        except BaseException as error:  # noqa: BLE001
            _exit_with(error)
        self._answered.set_result(
            pb.InitWorkerReply(
                failure=failure,
                python_version=platform.python_version(),
                lightvllm_version=__version__,
                pid=os.getpid(),
                node=socket.gethostname(),
                device_ids=visible_gpus(),
                max_message_bytes=self._limit,
            )
        )
        return worker, failure


def _invoke(worker: object, method: str, payload: bytes, limit: int) -> bytes:
    reply = invoke(worker, method, payload)
    if len(reply) > limit:
        return encode_failure(
            ConfigError(f"the reply of {method} is {len(reply)} bytes, more than max_message_bytes={limit}")
        )
    return reply


def _driver_of(context: Any, key: str) -> str | None:
    return next((value for name, value in context.invocation_metadata() if name == key), None)


def _exit_with(error: BaseException) -> NoReturn:
    """End the process as ``error`` would have ended it in the main thread."""
    code = error.code if isinstance(error, SystemExit) else 1
    if isinstance(error, SystemExit) and not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()

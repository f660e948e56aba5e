"""The worker server: the process in which a worker class lives, behind authenticated gRPC.

Started by ``process.WorkerProcess`` and by nothing else; see there for what its standard streams mean. It serves one
driver and then ends: politely when the driver closed its session, at once (``os._exit``, even if the worker is stuck in
a collective) when the driver has gone or stdin has ended.

Everything that touches the worker, its construction included, happens in the thread of the Session's handler, by
whichever carrier the calls come: no hand-over per call, and what is bound to a thread (a CUDA device, inference mode)
stays true. The exception is what a method has left to be finished later (``messages.Deferred``): one other thread
finishes that and sends the replies, while the worker runs its next calls. By plain calls (UNARY) and in compiled
graphs it is finished at once.

torch is not imported before InitWorker has set the environment.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import platform
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lightvllm import logs
from lightvllm.backends.base import exit_with, load_worker_class, set_environment
from lightvllm.backends.k8s import reflection, wire
from lightvllm.backends.k8s.devices import visible_gpus
from lightvllm.backends.k8s.process import Bootstrap, Status
from lightvllm.backends.k8s.programs import PREFIX, Programs
from lightvllm.backends.k8s.security import Token, split_address
from lightvllm.backends.late import LateThread
from lightvllm.errors import ConfigError
from lightvllm.messages import (
    Buffer,
    begin,
    decode_args,
    decode_reply,
    encode_call,
    encode_failure,
    encode_result,
    is_failure,
)
from lightvllm.proto import worker_pb2 as pb
from lightvllm.transfer import frames
from lightvllm.transfer.frames import FrameSocket
from lightvllm.transfer.link import TicketListener
from lightvllm.version import __version__

T = TypeVar("T")

_DIRECT_SUFFIX = ".direct"  # of the socket beside the server's
_THREADS = 8  # one is the session's; the others answer health checks and refuse
_DIRECT_SECONDS = 10.0  # for the driver to make its direct connection
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
    logs.inherit(process="worker")
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
        _forget_sockets(bootstrap.listen)
    sys.stderr.flush()
    os._exit(0)


def _exit_at_end_of(hangup: Any, listen: str) -> None:
    while hangup.read(1):
        pass
    with _binding:
        _forget_sockets(listen)
        os._exit(0)


def _forget_sockets(listen: str) -> None:
    """Remove the sockets and, as the last of its siblings, their directory; the driver may have done so before."""
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            Path(f"{path}{_DIRECT_SUFFIX}").unlink(missing_ok=True)
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
    """Interceptor: without the token nothing but a health check is answered, and no message is read.

    A ``grpc.ServerInterceptor`` in all but name, which has no types.
    """

    def __init__(self, token: Token, check_health: Callable[[], bytes]) -> None:
        """``check_health`` gives the encoded answer to a health check."""
        self._token = token
        self._check_health = check_health
        # Stream handlers for every method: a unary one would first wait for the request, in one of the few threads that
        # there are, and for as long as a stranger likes; or take in one as large as a driver's.
        self._refusal = grpc.stream_stream_rpc_method_handler(self._refuse)
        self._health = grpc.stream_stream_rpc_method_handler(self._answer)

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        if self._token.matches(details.invocation_metadata):
            return continuation(details)
        return self._health if details.method == f"/{health.SERVICE_NAME}/Check" else self._refusal

    def _answer(self, _: object, context: Any) -> Iterator[bytes]:
        yield self._check_health()

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
        self._bootstrap = bootstrap
        self._limit = bootstrap.max_message_bytes
        self._lock = threading.Lock()
        self._driver: str | None = None
        self._closed_by_driver = False
        self._listener: TicketListener | None = None
        self._asked: Future[pb.InitWorkerRequest] = Future()
        self._answered: Future[pb.InitWorkerReply] = Future()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self._health = health.HealthServicer()
        interceptors: Any = [_RequireToken(Token(bootstrap.token), self._encoded_health)]
        self._server = grpc.server(
            ThreadPoolExecutor(_THREADS, thread_name_prefix="lightvllm-grpc"),
            interceptors=interceptors,
            options=wire.server_options(bootstrap.listen, self._limit),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        methods = {
            "InitWorker": self._init_worker,
            "OpenDirect": self._open_direct,
            "Session": wire.with_sender(self._session),
            "CollectiveRpc": self._collective_rpc,
            "LoadModel": self._load_model,
            "ExecuteModel": self._execute_model,
            "ExecuteModelStream": self._execute_model_stream,
        }
        self._server.add_generic_rpc_handlers((wire.handlers(methods),))
        if bootstrap.reflection:
            reflection.enable(self._server)
        port = wire.bind(self._server, bootstrap.listen, bootstrap.tls)
        unix = bootstrap.listen.startswith("unix:")
        self.address = bootstrap.listen if unix else f"{bootstrap.listen.rpartition(':')[0]}:{port}"
        self._server.start()
        for service in ("", wire.SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._server.stop(0.2).wait()

    def _encoded_health(self) -> bytes:
        """Of the server as a whole, whichever service a stranger asks for."""
        no_context: Any = None  # it is for names of services that are not there
        answer: bytes = self._health.Check(health_pb2.HealthCheckRequest(), no_context).SerializeToString()
        return answer

    # ------------------------------------------------------------------------------------------- the session

    def _session(self, messages: Iterator[bytes], context: Any, send: Callable[[bytes | None], None]) -> None:
        """Take the worker, construct it, then run its calls one by one, in the order in which they arrive."""
        driver = _driver_of(context)
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
        request = self._asked.result()
        try:
            direct = self._direct_link(request)
            worker = _Invoker(*self._construct(request), self._limit, self._bootstrap.listen)
            if direct is not None:
                self._serve_direct(direct, worker)
            elif request.carrier == pb.UNARY:
                self._serve_unary(messages, worker)
            else:
                self._serve_stream(messages, send, worker)
        except ConnectionError as violation:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the driver broke the protocol: {violation}")
        self._closed_by_driver = True
        send(None)

    def _serve_stream(self, messages: Iterator[bytes], send: Callable[[bytes | None], None], worker: _Invoker) -> None:
        sending = threading.Lock()  # a reply's pieces follow one another, and gRPC takes one message at a time

        def send_reply(number: int, reply: bytes) -> None:
            with sending:
                for message in wire.encode_reply(number, reply):
                    send(message)

        replies = _Replies(send_reply)
        for number, method, payload in wire.whole_calls(messages, self._limit):
            replies.give(number, worker.begin(method, payload))
        replies.end()

    def _session_over(self) -> None:
        for service in ("", wire.SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        if not self._closed_by_driver:
            _forget_sockets(self._bootstrap.listen)
            os._exit(0)
        self.ended.set()

    def _init_worker(self, request: Any, context: Any) -> Any:
        with self._lock:
            expected = self._is_driver(context) and not self._asked.done()
            connected = request.carrier != pb.DIRECT or self._listener is not None
            if expected and connected:
                self._asked.set_result(request)
        if not expected:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "InitWorker is called once, by the driver that has a session"
            )
        if not connected:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "the carrier is DIRECT; call OpenDirect and connect first"
            )
        return self._answered.result()

    def _construct(self, request: Any) -> tuple[object, bytes]:
        """The worker and nothing, or None and an encoded failure; InitWorker is answered either way."""
        worker, failure = None, b""
        try:
            set_environment(request.env, request.env_overrides)
            worker = load_worker_class(request.worker_class)()
        except Exception as error:  # noqa: BLE001  whatever it is, the driver gets it
            failure = encode_failure(error)
        except BaseException as error:  # noqa: BLE001
            exit_with(error)
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

    def _is_driver(self, context: Any) -> bool:
        driver = _driver_of(context)
        return driver is not None and driver == self._driver

    # ------------------------------------------------------------------------------------ the direct carrier

    def _open_direct(self, _: Any, context: Any) -> Any:
        """Listen beside the gRPC server for the driver's direct connection."""
        bootstrap = self._bootstrap
        with self._lock:
            if not self._is_driver(context) or self._asked.done():
                context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "OpenDirect is called before InitWorker, by the driver that has a session",
                )
            if self._listener is not None:
                self._listener.close()
            unix = bootstrap.listen.startswith("unix:")
            listen = f"{bootstrap.listen}{_DIRECT_SUFFIX}" if unix else split_address(bootstrap.listen)[0]
            tls = None if bootstrap.tls is None else bootstrap.tls.context(server=True)
            try:
                listener = self._listener = TicketListener(listen, self._limit, _DIRECT_SECONDS, tls)
            except OSError as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, f"cannot listen for a direct connection: {error}")
                raise
        address = listener.address if unix else listener.address.rpartition(":")[2]
        return pb.OpenDirectReply(address=address, ticket=listener.ticket)

    def _direct_link(self, request: Any) -> FrameSocket | None:
        """The connection that the driver has made, if it wants its calls to come by it."""
        listener = self._listener
        if listener is None or request.carrier != pb.DIRECT:
            if listener is not None:
                listener.close()
            return None
        try:
            return listener.accepted.result()  # it gives up by itself
        except OSError as error:
            raise ConnectionError(f"its direct connection was never made: {error}") from None

    def _serve_direct(self, direct: FrameSocket, worker: _Invoker) -> None:
        def send_reply(number: int, reply: bytes) -> None:
            try:
                direct.write(frames.REPLY, number, b"", reply, None)  # as long as the driver lives, it reads
            except ConnectionError:
                return  # the next read tells

        replies = _Replies(send_reply)
        while True:
            try:
                kind, number, name, payload = direct.read(None)
                if kind == frames.CLOSE:
                    replies.end()
                    return
                if kind != frames.CALL:
                    raise ConnectionError(f"it sent a frame of kind {kind}, expected a call")
                method = name.decode()
            except (ConnectionError, UnicodeDecodeError) as broken:
                sys.stderr.write(f"the driver's direct connection is over: {broken}\n")
                _forget_sockets(self._bootstrap.listen)
                os._exit(0)
            replies.give(number, worker.begin(method, payload))

    # ------------------------------------------------------------------------------------- the unary carrier

    def _serve_unary(self, messages: Iterator[bytes], worker: _Invoker) -> None:
        threading.Thread(target=self._wait_for_the_end, args=(messages,), daemon=True).start()
        while (work := self._work.get()) is not None:
            work.done.set_result(work.run(worker))

    def _wait_for_the_end(self, messages: Iterator[bytes]) -> None:
        with contextlib.suppress(grpc.RpcError):
            for _ in messages:  # the lease has none; one that comes means nothing
                pass
        self._work.put(None)

    def _run(self, context: Any, work: Callable[[_Invoker], T]) -> T:
        """Have the session's thread do ``work``."""
        with self._lock:
            ready = self._is_driver(context) and self._answered.done() and self._asked.result().carrier == pb.UNARY
        if not ready:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "plain calls are for the driver that has a session, after an InitWorker with the carrier UNARY",
            )
        done: Future[Any] = Future()
        self._work.put(_Work(work, done))
        result: T = done.result()
        return result

    def _collective_rpc(self, request: Any, context: Any) -> Any:
        return pb.CollectiveRpcReply(
            payload=self._run(context, lambda worker: worker.call(request.method, request.payload))
        )

    def _load_model(self, _: Any, context: Any) -> Any:
        method, payload = encode_call("load_model", (), None)
        return pb.CollectiveRpcReply(payload=self._run(context, lambda worker: worker.call(method, payload)))

    def _execute_model(self, request: Any, context: Any) -> Any:
        def step(worker: _Invoker) -> Any:
            if request.intermediate_tensors:
                output, tensors = worker.execute_stage(request)
                return pb.ExecuteModelReply(model_output=output, intermediate_tensors=tensors)
            output = worker.call("execute_model", request.scheduler_output)
            if request.grammar_output and not is_failure(output):
                output = worker.call("sample_tokens", request.grammar_output)
            return pb.ExecuteModelReply(model_output=output)

        return self._run(context, step)

    def _execute_model_stream(self, request: Any, context: Any) -> Iterator[Any]:
        output, tensors = self._run(context, lambda worker: worker.execute_stage(request))
        if is_failure(output):
            context.set_trailing_metadata(((wire.FAILURE_KEY, output),))
            context.abort(grpc.StatusCode.INTERNAL, f"the stage failed; {wire.FAILURE_KEY} holds the failure")
        for tensor in tensors:
            yield from wire.tensor_pieces(tensor)


class _Work(NamedTuple):
    run: Callable[[_Invoker], Any]
    done: Future[Any]


class _Replies:
    """Sends the replies to a session's calls: those that are there at once, the late ones in an order of their own."""

    def __init__(self, send: Callable[[int, bytes], None]) -> None:
        """``send(number, reply)`` is called from two threads, perhaps at the same time."""
        self._send = send
        self._late = LateThread("lightvllm-late-replies")

    def give(self, number: int, reply: bytes | Callable[[], bytes]) -> None:
        """What ``_Invoker.begin`` has given for call ``number``."""
        if isinstance(reply, bytes):
            self._send(number, reply)
        else:
            self._late.put(functools.partial(self._finish, number, reply))

    def _finish(self, number: int, finish: Callable[[], bytes]) -> None:
        try:
            self._send(number, finish())
        except BaseException as error:  # noqa: BLE001  SystemExit and the like: the end of the process
            exit_with(error)

    def end(self) -> None:
        """Return when all late replies have been sent. Has no limit of its own: a driver that will not wait breaks its
        session, which ends the process."""
        self._late.end()
        self._late.join()


class _Invoker:
    """Runs calls on the worker; for the session's thread alone."""

    def __init__(self, worker: object, failure: bytes, limit: int, listen: str) -> None:
        self._worker, self._failure, self._limit = worker, failure, limit
        self._programs = Programs(worker, listen, limit)

    def begin(self, method: str, payload: Buffer) -> bytes | Callable[[], bytes]:
        """The encoded reply, or what finishes it, on any thread, and gives it."""
        reply: bytes | Callable[[], bytes]
        try:
            if method.startswith(PREFIX) and not self._failure:
                reply = self._programs.call(method, payload)
            else:
                reply = self._failure or begin(self._worker, method, payload)
        except BaseException as error:  # noqa: BLE001  SystemExit and the like: the end of the process
            exit_with(error)
        if isinstance(reply, bytes):
            return reply if len(reply) <= self._limit else self._too_large(method, reply)
        return functools.partial(self._finish, method, reply)

    def _finish(self, method: str, finish: Callable[[], bytes]) -> bytes:
        reply = finish()
        return reply if len(reply) <= self._limit else self._too_large(method, reply)

    def call(self, method: str, payload: Buffer) -> bytes:
        """The encoded reply, finished here."""
        reply = self.begin(method, payload)
        if isinstance(reply, bytes):
            return reply
        try:
            return reply()
        except BaseException as error:  # noqa: BLE001  as in begin
            exit_with(error)

    def _too_large(self, method: str, reply: bytes) -> bytes:
        return encode_failure(
            ConfigError(f"the reply of {method} is {len(reply)} bytes, more than max_message_bytes={self._limit}")
        )

    def execute_stage(self, request: Any) -> tuple[bytes, list[Any]]:
        """One pipeline stage's step by hand: the encoded output or failure, and the hidden states that follow."""
        given = [wire.tensor_message(tensor) for tensor in request.intermediate_tensors]
        try:
            (step,) = decode_args("execute_model", request.scheduler_output)
        except Exception as error:  # noqa: BLE001  the caller gets it
            return encode_failure(error), []
        method, payload = encode_call("execute_stage", (step, given), None)
        reply = self.call(method, payload)
        if is_failure(reply):
            return reply, []
        output, tensors = decode_reply(method, reply)
        return encode_result(output), [wire.intermediate_tensor(tensor) for tensor in tensors]


def _driver_of(context: Any) -> str | None:
    return next((value for name, value in context.invocation_metadata() if name == wire.DRIVER_KEY), None)


if __name__ == "__main__":
    main()

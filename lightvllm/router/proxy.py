"""One request: which replica, try and try again, and its answer passed on as it comes.

Until the first byte of an answer has been passed on, a request that fails is tried on another replica. Therefore the
headers of a stream wait for its first bytes, and an answer that is no stream for its end (up to a size). After that
nothing is retried: a stream that breaks off ends with an error event, any other answer with its connection.

When the client leaves, aiohttp cancels the handler, which closes the connection to the replica at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from lightvllm.logs import request_id
from lightvllm.router.body import affinity_key, parse
from lightvllm.router.events import WholeEvents
from lightvllm.router.health import describe
from lightvllm.router.memory import Memory, Share
from lightvllm.router.metrics import Metrics
from lightvllm.router.pool import Pool, Request
from lightvllm.router.replica import Replica
from lightvllm.router.replies import ApiError, shutting_down, unknown_model
from lightvllm.router.settings import RouterSettings
from lightvllm.router.upstream import Upstream, downstream_headers, read_most

logger = logging.getLogger(__name__)
access = logging.getLogger("lightvllm.access")

_RETRIED = (429, 502, 503)
_ERROR_BYTES = 1 << 20  # of an error answer that is kept while others are tried
_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between rounds over replicas that have all failed
_MOST_BUSY = 10.0  # seconds for which a 429's Retry-After is believed
_RETRY_ROOM = 5.0  # seconds told to a client whose body there is no memory for
_ANSWERED_BADLY = (aiohttp.ClientError, OSError, ValueError)


class _Failed(Exception):
    """A try failed before anything was passed on.

    Attributes:
        reason: one word, for the metrics.
        answer: what the replica said, if it said something.
        lost: the connection broke after the request had been sent.
    """

    def __init__(self, reason: str, message: str, answer: web.Response | None = None, *, lost: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.answer = answer
        self.lost = lost


class Proxy:
    """Handles all requests that go to a model.

    Attributes:
        ending: the router's time is over: a request that is cancelled now is told so.
        memory: what is kept of requests and answers.
        begun: connections on which an answer is being passed on, so that nothing else can be said there.
    """

    def __init__(self, pool: Pool, upstream: Upstream, metrics: Metrics, settings: RouterSettings) -> None:
        self.ending = False
        self.begun: set[object] = set()
        self.memory = Memory(settings.max_body_memory)
        self._pool, self._upstream, self._metrics, self._settings = pool, upstream, metrics, settings

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer it. Raises ApiError for what the router itself refuses."""
        share = Share(self.memory)
        try:
            return await self._handle(request, share)
        finally:
            share.give_back()

    async def _handle(self, request: web.Request, share: Share) -> web.StreamResponse:
        arrived = time.monotonic()
        exchange = self._enter(request, await self._read(request, share), share, arrived)
        entry = exchange.entry
        status = "499"  # what stays if the client leaves
        try:
            response = await self._serve(exchange)
            status = str(response.status) if not exchange.broken else exchange.broken
            return response
        except ApiError as error:
            status = str(error.status)
            raise
        except asyncio.CancelledError:
            if self.ending:
                status = "503"
            raise
        except Exception:
            status = "500"
            raise
        finally:
            self._pool.leave(entry)
            self._account(exchange, status)

    def _enter(self, request: web.Request, content: bytes, share: Share, arrived: float) -> _Exchange:
        body = parse(content)
        model = self._model(body.model)
        entry = self._pool.enter(model, affinity_key(body, self._settings.affinity_bytes))
        return _Exchange(request, content, share, entry, arrived)

    async def _read(self, request: web.Request, share: Share) -> bytes:
        most = self._settings.max_request_bytes
        too_large = ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
        if (request.content_length or 0) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while part := await request.content.readany():
                    size += len(part)
                    if size > most:
                        raise too_large
                    if not share.take(len(part)):
                        raise ApiError(
                            503,
                            f"the router keeps {self.memory.used} bytes of other requests, and is full",
                            code="router_overloaded",
                            retry_after=_RETRY_ROOM,
                        )
                    parts.append(part)
                return b"".join(parts)
        except web.RequestPayloadError:
            raise ApiError(
                400, "the body is not what its Content-Encoding says", headers={"Connection": "close"}
            ) from None
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._settings.body_timeout:g} s", headers={"Connection": "close"}
            ) from None

    def _model(self, name: str | None) -> str:
        known = self._pool.models
        if name is None:
            if len(known) == 1:
                return known[0]
            raise ApiError(
                400,
                f"'model' is missing; known: {', '.join(known) or 'none yet'}",
                param="model",
                code="missing_required_parameter",
            )
        if not self._pool.knows(name):
            raise unknown_model(name, known)
        return name

    async def _serve(self, exchange: _Exchange) -> web.StreamResponse:
        settings, pool, entry = self._settings, self._pool, exchange.entry
        tried: list[Replica] = []
        losses = rounds = 0
        last = _Failed("none", "no replica was tried")
        while len(tried) < settings.max_tries and losses < settings.max_losses:
            if tried and time.monotonic() - exchange.arrived > settings.retry_timeout:
                break  # rather than be held
            replica = await pool.acquire(entry, tried)
            exchange.backend = replica.name
            try:
                if tried and time.monotonic() - exchange.arrived > settings.retry_timeout:
                    break  # it was held meanwhile
                if replica in tried:  # and so have all been that are left
                    if last.answer is not None and last.answer.status == 429:
                        return last.answer
                    rounds += 1
                    pause = min(_PAUSE * 2**rounds, _LONGEST_PAUSE) * random.uniform(0.5, 1)  # noqa: S311
                    await asyncio.sleep(pause)
                    if not replica.usable:
                        continue
                exchange.tries += 1
                return await self._try(exchange, replica)
            except _Failed as failed:
                last = failed
                losses += failed.lost
                tried.append(replica)
                self._metrics.retries.labels(entry.model, failed.reason).inc()
                logger.warning("try %d failed on %s: %s", exchange.tries, replica.name, failed)
            finally:
                pool.release(replica)
        if last.answer is not None:
            return last.answer
        status = 504 if last.reason == "timeout" else 502
        raise ApiError(status, f"{exchange.tries} tries failed, the last because {last}", code="bad_gateway")

    async def _try(self, exchange: _Exchange, replica: Replica) -> web.StreamResponse:
        settings = self._settings
        answer: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(settings.header_timeout):
                answer = await self._upstream.post(
                    replica,
                    exchange.path,
                    exchange.content,
                    self._upstream.headers(exchange.request.headers, exchange.request.remote or "", exchange.id),
                )
            if answer.status in _RETRIED and (answer.status != 429 or "Retry-After" in answer.headers):
                raise await self._refused(exchange, replica, answer)
            return await self._pass_on(exchange, replica, answer)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._pool.failed(replica, describe(error), at_once=True)
            raise _Failed("connect", describe(error)) from None
        except TimeoutError:
            message = f"it did not begin to answer within {settings.header_timeout:g} s"
            if answer is not None:
                message = f"nothing came for {settings.idle_timeout:g} s"
            self._pool.failed(replica, message)
            raise _Failed("timeout", message, lost=True) from None
        except _ANSWERED_BADLY as error:
            if answer is None and isinstance(error, ValueError) and not isinstance(error, aiohttp.ClientError):
                raise ApiError(400, f"a header of the request cannot be passed on: {error}") from None
            self._pool.failed(replica, describe(error))
            raise _Failed("broken", describe(error), lost=True) from None
        finally:
            if answer is not None and not answer.closed:
                answer.release() if answer.content.at_eof() else answer.close()

    async def _refused(self, exchange: _Exchange, replica: Replica, answer: aiohttp.ClientResponse) -> _Failed:
        """The replica does not want the request."""
        body = b""
        async with asyncio.timeout(self._settings.idle_timeout):
            body = await read_most(answer, _ERROR_BYTES)
        message = f"it says {answer.status}"
        if answer.status == 429:
            replica.busy_until = time.monotonic() + _retry_after(answer.headers["Retry-After"])
        else:
            self._pool.failed(replica, message, at_once=answer.status == 503)
        headers = downstream_headers(answer.headers, exchange.id)
        return _Failed(
            f"status_{answer.status}", message, web.Response(status=answer.status, body=body, headers=headers)
        )

    async def _pass_on(
        self, exchange: _Exchange, replica: Replica, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        """Its answer to the client. Raises what ``_try`` retries before anything was passed on, and nothing after."""
        headers = downstream_headers(answer.headers, exchange.id)
        idle, read = self._settings.idle_timeout, answer.content.readany
        is_stream = answer.content_type == "text/event-stream"
        kept = bytearray()
        async with asyncio.timeout(idle) as limit:
            while chunk := await read():
                kept += chunk
                full = len(kept) > self._settings.max_buffered_bytes or not exchange.share.take(len(chunk))
                if is_stream or full:
                    break
                limit.reschedule(asyncio.get_running_loop().time() + idle)
        exchange.first_byte = time.monotonic()
        if not chunk:
            self._done_well(replica, answer)
            return web.Response(status=answer.status, body=bytes(kept), headers=headers)

        events = WholeEvents() if is_stream and "Content-Encoding" not in answer.headers else None
        if not is_stream and answer.content_length is not None:
            headers["Content-Length"] = str(answer.content_length)
        out = web.StreamResponse(status=answer.status, headers=headers)
        self.begun.add(exchange.request.protocol)
        try:
            await out.prepare(exchange.request)
            exchange.forget()
            problem = await self._stream(bytes(kept), answer, out, events)
            if problem is None:
                self._done_well(replica, answer)
                async with self._write_limit():
                    await out.write_eof()
            else:
                exchange.broken = "broken"
                self._pool.failed(replica, problem)
                logger.warning("an answer of %s broke off: %s", replica.name, problem)
                message = f"the replica broke off: {problem}; try again"
                await self._end_broken(exchange, out, events, ApiError(502, message, code="stream_broken"))
        except (aiohttp.ClientError, OSError):  # of the client, who cannot be told anything any more
            exchange.broken = "499"
            if exchange.request.transport is not None:
                exchange.request.transport.abort()
        except asyncio.CancelledError:
            if self.ending:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    await self._end_broken(exchange, out, events, shutting_down())
            raise
        return out

    def _done_well(self, replica: Replica, answer: aiohttp.ClientResponse) -> None:
        """A complete answer. One of 5xx may be the request's fault, so it neither ejects nor clears."""
        if answer.status < 500:
            self._pool.succeeded(replica)

    async def _stream(
        self, chunk: bytes, answer: aiohttp.ClientResponse, out: web.StreamResponse, events: WholeEvents | None
    ) -> str | None:
        """Pass on ``chunk`` and all that comes; why it broke off, or None. Raises what writing to the client raises."""
        idle, read, now = self._settings.idle_timeout, answer.content.readany, asyncio.get_running_loop().time
        writing = False
        try:
            async with asyncio.timeout(idle) as limit:
                renew = now() + idle / 4
                while chunk:
                    if events is not None:
                        chunk = events.feed(chunk)
                    if chunk:
                        writing = True
                        await out.write(chunk)  # waits while the client is slow, and then nothing more is read
                        writing = False
                    try:
                        chunk = await read()
                    except _ANSWERED_BADLY as error:  # no time-out, which comes as a cancellation here
                        return describe(error)
                    if now() >= renew:  # not at every chunk: moving a timer costs more than the chunk
                        limit.reschedule(now() + idle)
                        renew = now() + idle / 4
                if events is not None and (rest := events.finish()):
                    writing = True
                    await out.write(rest)
        except TimeoutError:
            if writing:
                raise self._unread() from None
            return f"nothing came for {idle:g} s"
        return None

    @contextlib.asynccontextmanager
    async def _write_limit(self) -> AsyncIterator[None]:
        """For the last of an answer: raises what a client that takes nothing any more is treated by."""
        try:
            async with asyncio.timeout(self._settings.idle_timeout):
                yield
        except TimeoutError:
            raise self._unread() from None

    def _unread(self) -> aiohttp.ClientConnectionResetError:
        return aiohttp.ClientConnectionResetError(f"the client took nothing for {self._settings.idle_timeout:g} s")

    async def _end_broken(
        self, exchange: _Exchange, out: web.StreamResponse, events: WholeEvents | None, error: ApiError
    ) -> None:
        """The last that the client gets: an error event where one can be read, else a connection that ends early."""
        if out.prepared and events is not None and events.between:
            async with self._write_limit():
                await out.write(error.event())
                await out.write_eof()
        elif exchange.request.transport is not None:
            exchange.request.transport.abort()

    def _account(self, exchange: _Exchange, status: str) -> None:
        metrics, entry, now = self._metrics, exchange.entry, time.monotonic()
        metrics.requests.labels(entry.model, exchange.backend, status).inc()
        metrics.request_seconds.labels(entry.model).observe(now - exchange.arrived)
        if exchange.first_byte:
            metrics.first_byte_seconds.labels(entry.model).observe(exchange.first_byte - exchange.arrived)
        if entry.held:
            metrics.held.labels(entry.model).inc()
            metrics.hold_seconds.labels(entry.model).observe(entry.held)
        if self._settings.access_log:
            said = {
                "path": exchange.request.path,
                "status": status,
                "seconds": round(now - exchange.arrived, 6),
            }
            extra = {
                "model": entry.model,
                "backend": exchange.backend or None,
                "tries": exchange.tries,
                "held_seconds": round(entry.held, 6) if entry.held else None,
                "first_byte_seconds": round(exchange.first_byte - exchange.arrived, 6) if exchange.first_byte else None,
                "client": exchange.request.remote,
            }
            access.info("POST %(path)s %(status)s in %(seconds).3f s", said, extra=extra)


class _Exchange:
    """A request on its way through the proxy."""

    def __init__(self, request: web.Request, content: bytes, share: Share, entry: Request, arrived: float) -> None:
        self.request = request
        self.id = request_id.get()
        self.content = content
        self.share = share
        self.entry = entry
        self.arrived = arrived
        self.backend = ""
        self.tries = 0
        self.first_byte = 0.0
        self.broken = ""

    def forget(self) -> None:
        """Its answer has begun: it is not sent again."""
        self.content = b""
        self.share.give_back()

    @property
    def path(self) -> str:
        query = self.request.rel_url.raw_query_string
        return f"{self.request.path}?{query}" if query else self.request.path


def _retry_after(value: str) -> float:
    """Seconds, at most ``_MOST_BUSY``; the form with a date counts as that."""
    try:
        return min(max(float(value), 0.0), _MOST_BUSY)
    except ValueError:
        return _MOST_BUSY

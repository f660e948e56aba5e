"""How long a request's head may be: llhttp, by which uvicorn reads requests, takes one in without end.

Its memory would be had without an API key, since nobody has been asked for one before the head is complete.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from lightvllm.server.errors import ApiError

logger = logging.getLogger(__name__)


def bounded_heads(base: Any, max_bytes: int) -> Any:
    """uvicorn's protocol ``base`` over httptools, refusing what is no body and grows beyond ``max_bytes``.

    Counted are bytes that come in a row and neither complete a head or a message nor bring any of a body: a request
    line, headers, trailers, extensions of chunks. One read's worth (256 KiB) is let pass if it completes them. A head
    is answered with 431, the rest by the connection's end.
    """

    class BoundedHeads(base):  # type: ignore[misc]
        _in_a_row = 0
        _reading_head = True
        _went_on = False

        def data_received(self, data: bytes) -> None:
            self._went_on = False
            super().data_received(data)
            if self._went_on:
                self._in_a_row = 0
                return
            self._in_a_row += len(data)
            if self._in_a_row > max_bytes and not self.transport.is_closing():
                self._refuse_head()

        def on_headers_complete(self) -> None:
            self._reading_head, self._went_on = False, True
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._went_on = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._reading_head = self._went_on = True
            super().on_message_complete()

        def _refuse_head(self) -> None:
            logger.debug("a request's head or trailer is longer than %d bytes; its connection is closed", max_bytes)
            if not self._reading_head or (self.cycle is not None and not self.cycle.response_complete):
                self.transport.abort()  # an answer may be under way
                return
            error = ApiError(
                431,
                f"the request's headers are longer than {max_bytes} bytes, the most allowed",
                code="headers_too_large",
            )
            answer = error.response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            head = b"".join(b"%s: %s\r\n" % header for header in headers)
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + head + b"\r\n" + bytes(answer.body)
            )
            self.transport.close()

    protocol: type[asyncio.Protocol] = BoundedHeads
    return protocol

"""Whole events of a stream: what has come of a server-sent event is passed on when its end has come.

So a stream that breaks off is cut between two events, and an error event can follow. Bytes and their order are kept.
"""

from __future__ import annotations

_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
_MOST = 1 << 18


class WholeEvents:
    """For one stream."""

    def __init__(self) -> None:
        self._rest = b""
        self._torn = False

    @property
    def between(self) -> bool:
        """Whether what was passed on ends with an event's end."""
        return not self._torn

    def feed(self, chunk: bytes) -> bytes:
        """What may be passed on now that ``chunk`` has come; perhaps nothing."""
        if not self._rest and chunk.endswith(b"\n\n"):  # nearly always
            self._torn = False
            return chunk
        data = self._rest + chunk
        ends = [at + len(end) for end in _ENDS if (at := data.rfind(end)) >= 0]
        cut = max(ends, default=0)
        if len(data) - cut > _MOST:  # no more is kept for the sake of a rare error
            self._rest, self._torn = b"", True
            return data
        if cut:
            self._torn = False
        self._rest = data[cut:]
        return data[:cut]

    def finish(self) -> bytes:
        """What is left at the stream's regular end."""
        rest, self._rest = self._rest, b""
        return rest

"""Plain ASGI middlewares: the request's id and its log line, API keys, and how large and slow a body may be.

They see every request before FastAPI does, and answer in OpenAI's shape by themselves. Rate limits are in
``rate_limit.py``.
"""

from __future__ import annotations


class InFlight:
    """How many requests are being answered, probes left out."""

    def __init__(self) -> None:
        self.count = 0

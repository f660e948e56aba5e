"""A tiny model behind a real socket, and OpenAI's own client for it; the engine can be looked at from the test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
from served_app import ServedApp
from waiting import wait_until

from lightvllm.engine.async_llm import AsyncLLM
from lightvllm.server.app import attach_engine, create_app
from lightvllm.server.settings import ServerSettings


class ServedModel:
    """``client`` talks to ``engine`` over HTTP at ``url``."""

    def __init__(self, served: ServedApp, engine: AsyncLLM) -> None:
        self.served = served
        self.engine = engine
        self.url = served.url
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def call(self, function: Any) -> Any:
        """In the server's event loop."""
        return self.served.call(function)

    def wait_idle(self) -> None:
        """Until nothing runs; then no block may be held."""
        stats = lambda: self.engine.stats  # noqa: E731
        wait_until(lambda: not (stats().num_running or stats().num_waiting), "no request is left in the engine")
        wait_until(lambda: stats().num_free_kv_blocks == stats().num_kv_blocks, "every block is free")


@contextlib.contextmanager
def serve(folder: Path, settings: ServerSettings | None = None, **options: Any) -> Iterator[ServedModel]:
    """``options`` are AsyncLLM's; the engine is a thread of this process."""
    app = create_app(None, settings or ServerSettings(served_model_names=("tiny", "org/tiny"), log_requests=False))
    served = ServedApp(app)
    try:
        engine = served.call(
            lambda: AsyncLLM.create(folder, **{"engine_process": False, "num_kv_blocks": 256} | options)
        )
        try:
            served.call(lambda: attach_engine(app, engine))
            model = ServedModel(served, engine)
            try:
                yield model
            finally:
                model.client.close()
        finally:
            served.call(engine.shutdown)
    finally:
        served.stop()

"""A server over a ``ScriptedClient``, run by ``lightvllm.server.run``: ``python scripted_server.py JSON``.

The JSON has ``listen`` and ``server`` (fields of the settings), ``run`` (arguments of ``run``), and what the engine
does: ``start_seconds`` (before it is ready), ``start_error``, ``fail_after`` (seconds until rank 1 dies). One route of
the API, ``/v1/stream?n=``, sends a line every 0.05 s, and ``{"error": …}`` if the engine is shut down meanwhile.
Prints the URL, then "ready".
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from scripted_client import ScriptedClient

from lightvllm.engine.protocol import EngineClient
from lightvllm.errors import ConfigError, LightvllmError, Shutdown
from lightvllm.server.app import create_app, in_flight
from lightvllm.server.errors import as_api_error
from lightvllm.server.listen import ListenSettings, bind, tls_context, url
from lightvllm.server.run import run
from lightvllm.server.settings import ServerSettings

router = APIRouter()


@router.get("/v1/stream")
async def stream(engine: Annotated[EngineClient, Depends(in_flight)], n: int = 3) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for number in range(n):
            await asyncio.sleep(0.05)
            if engine.state == "stopped":
                yield json.dumps(as_api_error(Shutdown("stopped")).body()) + "\n"
                return
            yield f"{number}\n"

    return StreamingResponse(lines(), media_type="text/plain")


@router.post("/v1/echo")
async def echo(request: Request) -> dict[str, int]:
    return {"bytes": len(await request.body())}


@router.get("/v1/defect")
async def defect() -> None:
    raise ZeroDivisionError("a secret of the code")


@router.get("/v1/late-defect")
async def late_defect() -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        yield "one\n"
        raise ZeroDivisionError("a secret of the code")

    return StreamingResponse(lines(), media_type="text/plain")


@router.get("/v1/endless")
async def endless() -> StreamingResponse:
    async def lines() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0)
            yield b"x" * 65536

    return StreamingResponse(lines(), media_type="text/plain")


def main(given: dict[str, Any]) -> int:
    settings = ServerSettings(**given.get("server", {}))
    listen = ListenSettings(**{"port": 0} | given.get("listen", {}))
    app = create_app(None, settings)
    app.include_router(router)
    tls = tls_context(listen)
    listener = bind(listen, authenticated=bool(settings.api_keys))
    print(url(listener, tls=tls is not None), flush=True)
    tasks = []

    async def start_engine(progress: Any) -> EngineClient:
        progress("loading weights")
        await asyncio.sleep(given.get("start_seconds", 0))
        if "start_error" in given:
            raise ConfigError(given["start_error"])
        engine = ScriptedClient(tp=2)

        async def die() -> None:
            await asyncio.sleep(given["fail_after"])
            engine.kill(1)

        if "fail_after" in given:
            tasks.append(asyncio.create_task(die()))
        return engine

    return run(
        app,
        listener,
        listen,
        start_engine,
        tls=tls,
        on_ready=lambda engine: print("ready", flush=True),
        on_stop=lambda what: print(what, file=sys.stderr, flush=True),
        **given.get("run", {}),
    )


if __name__ == "__main__":
    try:
        sys.exit(128 + main(json.loads(sys.argv[1])))
    except LightvllmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

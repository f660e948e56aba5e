"""Running a request's prompts on the engine: to the end, or as a stream of what is new. No shapes of any API here.

Whatever ends an answer early (an error, a client that leaves) closes the engine's generators before it goes on, and so
aborts the requests and frees their blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from pydantic import BaseModel

from lightvllm.engine.intake import TokensPrompt
from lightvllm.engine.outputs import CompletionOutput, RequestOutput
from lightvllm.engine.protocol import EngineClient, OutputKind
from lightvllm.errors import ConfigError
from lightvllm.sampling_params import SamplingParams
from lightvllm.server.errors import ApiError
from lightvllm.server.params import blamed, timed_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Prompts that are run with the same parameters for one request of the API.

    Attributes:
        request: what an error is blamed on.
        request_id: of the engine's requests, a number behind it if there are several.
        form: the request's field that asks for a form of the output; errors in it are blamed on it.
    """

    request: BaseModel
    request_id: str
    prompts: Sequence[TokensPrompt]
    params: SamplingParams
    priority: int = 0
    timeout: float | None = None
    form: str | None = None


async def run(engine: EngineClient, job: Job) -> list[RequestOutput]:
    """The finished outputs, in the order of the prompts.

    Raises ApiError for what the engine refuses, 408 for a time-out; and what the engine raises.
    """
    finished: list[RequestOutput | None] = [None] * len(job.prompts)
    async with aclosing(_merged(engine, job, "final")) as outputs:
        async for index, output in outputs:
            finished[index] = output
    return [output for output in finished if output is not None]


async def stream(engine: EngineClient, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """What is new, with the number of its prompt, as it comes. Raises as ``run`` does."""
    async with aclosing(_merged(engine, job, "delta")) as outputs:
        async for item in outputs:
            yield item


def _merged(engine: EngineClient, job: Job, kind: OutputKind) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    return _one(engine, job, kind, 0) if len(job.prompts) == 1 else _several(engine, job, kind)


async def _one(
    engine: EngineClient, job: Job, kind: OutputKind, index: int
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    outputs = engine.generate(
        job.prompts[index],
        job.params,
        job.request_id if len(job.prompts) == 1 else f"{job.request_id}-{index}",
        priority=job.priority,
        timeout=job.timeout,
        output_kind=kind,
    )
    try:
        async with aclosing(outputs):
            async for output in outputs:
                for completion in output.outputs:
                    _check_end(completion, job)
                yield index, output
    except ConfigError as error:
        raise blamed(error, job.request) from None


async def _several(engine: EngineClient, job: Job, kind: OutputKind) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """As many prompts at a time as the engine runs sequences, so that one request does not fill its queue."""
    # One place: what the reader has not taken yet is merged by the engine, not kept here.
    queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue(maxsize=1)
    places = asyncio.Semaphore(engine.info.config.scheduler.max_num_seqs)

    async def feed(index: int) -> None:
        try:
            async with places, aclosing(_one(engine, job, kind, index)) as outputs:
                async for item in outputs:
                    await queue.put(item)
            await queue.put(None)
        except Exception as error:  # noqa: BLE001  raised by the reader
            await queue.put(error)

    tasks = [asyncio.create_task(feed(index)) for index in range(len(job.prompts))]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_end(completion: CompletionOutput, job: Job) -> None:
    """Some ends are no answers."""
    if completion.finish_reason == "timeout":
        raise timed_out(job.timeout)
    if completion.finish_reason == "error":  # what the request asks for leaves no token to choose
        raise ApiError(400, str(completion.stop_reason), param=job.form, code="no_token")
    if completion.finish_reason == "abort":
        raise ApiError(503, "the request was aborted by the server", code="aborted", retry_after=1)

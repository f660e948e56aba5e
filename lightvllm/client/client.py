"""``Client``: questions to a served model, one or many, whole or as they come, from synchronous code or any loop."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from typing import Any, Literal, Self, TypeVar, overload

import httpx2
import pydantic

from lightvllm.client import chat
from lightvllm.client.background import Background, Produce
from lightvllm.client.chat import Prompt
from lightvllm.client.http import Http
from lightvllm.errors import ConfigError, LightvllmError

Model = TypeVar("Model", bound=pydantic.BaseModel)
Form = type[pydantic.BaseModel]
Answer = str | pydantic.BaseModel

API_KEY = "LIGHTVLLM_API_KEY"


class Client:
    """A model behind an OpenAI-compatible server; end it with ``close``, or use it in a ``with`` statement.

    All requests run in one thread of the client's own: its methods may be called from any thread and any asyncio loop,
    the synchronous ones also from inside a running loop (which they block).

    A prompt is text, which a user says, or a list of OpenAI's messages. ``system`` is said before it. ``sampling`` goes
    into the request as it is: ``max_tokens``, ``temperature``, ``seed``, ``stop``, ``logit_bias`` and what else the
    server knows. With ``structured_output``, a pydantic class, the model is held to its JSON schema and the answer is
    an instance.

    A request is sent again (``max_retries`` times, after the server's Retry-After) where nothing has been done for
    it: no connection, 429, 503; and where its connection was closed before an answer, which a server does to kept ones
    (one that died in the middle of it has then computed it in vain). An answer that has begun is not asked for again.

    Args:
        base_url: as OpenAI's clients take it, such as ``http://127.0.0.1:8000/v1``; ``/v1`` may be left out.
        model: its name; None asks the server, which must have just one.
        api_key: None takes that of the environment variable LIGHTVLLM_API_KEY, if there is one.
        timeout: seconds in which a request must be answered in full, further tries included.
        connect_timeout: seconds for a connection.
        max_concurrency: requests at a time; more wait, and their time does not run.
        max_retries: further tries of a request.
        tls_ca: a file with the authorities to trust, PEM, for https with a certificate of one's own.
        transport: an httpx2 transport instead of the network, for tests.

    Raises (every method):
        ConfigError: what is asked for makes no request, or the client's arguments no client.
        ServerError: the server cannot be reached, answers with an error, or breaks off.
        AuthError: the server wants another key.
        RpcTimeout: after ``timeout``.
        InvalidOutput: the text is not what ``structured_output`` asks for; mostly one cut off by ``max_tokens``.
        Shutdown: after ``close``.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        max_concurrency: int = 64,
        max_retries: int = 4,
        tls_ca: str | os.PathLike[str] | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        for name, value in (("timeout", timeout), ("connect_timeout", connect_timeout)):
            if not value > 0:
                raise ConfigError(f"{name}={value!r} is not allowed; use a number of seconds above 0")
        if max_concurrency < 1 or max_retries < 0:
            raise ConfigError(f"{max_concurrency=}, {max_retries=}; use at least 1 and 0")
        if api_key is None:  # the same variable may hold several for a server
            api_key = next(iter(os.environ.get(API_KEY, "").split()), None)
        self._http = Http(
            base_url,
            api_key=api_key,
            timeout=timeout,
            connect_timeout=connect_timeout,
            max_connections=max_concurrency,
            max_retries=max_retries,
            tls_ca=None if tls_ca is None else os.fspath(tls_ca),
            transport=transport,
        )
        self._core = _Core(self._http, model, max_concurrency)
        self._background = Background(f"lightvllm-client-{self._http.url.netloc.decode()}")
        self._finalizer = weakref.finalize(self, self._background.close, self._http.close)

    # -------------------------------------------------------------------------------------------------- one prompt

    @overload
    def inference(
        self, prompt: Prompt, *, structured_output: None = None, system: str | None = None, **sampling: Any
    ) -> str: ...
    @overload
    def inference(
        self, prompt: Prompt, *, structured_output: type[Model], system: str | None = None, **sampling: Any
    ) -> Model: ...
    def inference(
        self, prompt: Prompt, *, structured_output: Form | None = None, system: str | None = None, **sampling: Any
    ) -> Answer:
        """The answer to a prompt: text, or an instance of ``structured_output``."""
        body = chat.question(prompt, system, structured_output, sampling)
        return self._background.call(self._core.one(body, structured_output))

    @overload
    async def a_inference(
        self, prompt: Prompt, *, structured_output: None = None, system: str | None = None, **sampling: Any
    ) -> str: ...
    @overload
    async def a_inference(
        self, prompt: Prompt, *, structured_output: type[Model], system: str | None = None, **sampling: Any
    ) -> Model: ...
    async def a_inference(
        self, prompt: Prompt, *, structured_output: Form | None = None, system: str | None = None, **sampling: Any
    ) -> Answer:
        """``inference``, awaited. Cancelling it ends the request, at the server too."""
        body = chat.question(prompt, system, structured_output, sampling)
        return await self._background.acall(self._core.one(body, structured_output))

    # ------------------------------------------------------------------------------------------------- many prompts

    @overload
    def inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: None = None,
        system: str | None = None,
        return_exceptions: Literal[False] = False,
        **sampling: Any,
    ) -> list[str]: ...
    @overload
    def inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: type[Model],
        system: str | None = None,
        return_exceptions: Literal[False] = False,
        **sampling: Any,
    ) -> list[Model]: ...
    @overload
    def inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: type[Model] | None = None,
        system: str | None = None,
        return_exceptions: bool,
        **sampling: Any,
    ) -> list[str | Model | LightvllmError]: ...
    def inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: Form | None = None,
        system: str | None = None,
        return_exceptions: bool = False,
        **sampling: Any,
    ) -> Any:
        """The answers to several prompts, in their order, ``max_concurrency`` at a time.

        The first prompt that fails ends the batch: the others are cancelled, and its error is raised, with a note that
        says which it was. With ``return_exceptions`` its error stands in its place instead, and the others go on.
        """
        bodies = _bodies(prompts, system, structured_output, sampling)
        return self._background.call(self._core.many(bodies, structured_output, return_exceptions))

    @overload
    async def a_inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: None = None,
        system: str | None = None,
        return_exceptions: Literal[False] = False,
        **sampling: Any,
    ) -> list[str]: ...
    @overload
    async def a_inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: type[Model],
        system: str | None = None,
        return_exceptions: Literal[False] = False,
        **sampling: Any,
    ) -> list[Model]: ...
    @overload
    async def a_inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: type[Model] | None = None,
        system: str | None = None,
        return_exceptions: bool,
        **sampling: Any,
    ) -> list[str | Model | LightvllmError]: ...
    async def a_inference_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: Form | None = None,
        system: str | None = None,
        return_exceptions: bool = False,
        **sampling: Any,
    ) -> Any:
        """``inference_batch``, awaited."""
        bodies = _bodies(prompts, system, structured_output, sampling)
        return await self._background.acall(self._core.many(bodies, structured_output, return_exceptions))

    # ------------------------------------------------------------------------------------------------------ streams

    def streaming_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: type[Model] | None = None,
        system: str | None = None,
        return_exceptions: bool = False,
        **sampling: Any,
    ) -> Generator[tuple[int, str | Model | LightvllmError], None, None]:
        """What the answers to several prompts gain, as it comes: a prompt's index and its new text.

        With ``structured_output`` the last item of a prompt is its instance. Errors are as with ``inference_batch``.
        Closing the generator ends the requests, at the server too. A prompt alone is a list of one.
        """
        bodies = _bodies(prompts, system, structured_output, sampling)
        return self._background.iterate(self._streams(bodies, structured_output, return_exceptions))

    def a_streaming_batch(
        self,
        prompts: Iterable[Prompt],
        *,
        structured_output: type[Model] | None = None,
        system: str | None = None,
        return_exceptions: bool = False,
        **sampling: Any,
    ) -> AsyncGenerator[tuple[int, str | Model | LightvllmError], None]:
        """``streaming_batch`` for ``async for``."""
        bodies = _bodies(prompts, system, structured_output, sampling)
        return self._background.aiterate(self._streams(bodies, structured_output, return_exceptions))

    def _streams(
        self, bodies: list[dict[str, Any]], form: type[Model] | None, return_exceptions: bool
    ) -> Produce[tuple[int, str | Model | LightvllmError]]:
        """Holds the client, so that a stream outlives the last name of it."""

        async def produce(put: Callable[[tuple[int, str | Model | LightvllmError]], None]) -> None:
            await self._core.many(bodies, form, return_exceptions, put)

        return produce

    # ---------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """End what is under way, and the connections. Idempotent; also done when the client is collected."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)


def _bodies(
    prompts: Iterable[Prompt], system: str | None, structured_output: Form | None, sampling: dict[str, Any]
) -> list[dict[str, Any]]:
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is the text {prompts!r:.80}; expected a list of prompts")
    return [chat.question(prompt, system, structured_output, sampling) for prompt in prompts]


class _Core:
    """The client's requests, in its loop."""

    def __init__(self, http: Http, model: str | None, max_concurrency: int) -> None:
        self._http = http
        self._model = model
        self._asking = asyncio.Lock()  # for the model's name
        self._slots = asyncio.Semaphore(max_concurrency)
        self._max_concurrency = max_concurrency

    async def one(
        self, body: dict[str, Any], form: type[Model] | None, receive: Callable[[str], None] | None = None
    ) -> str | Model:
        model = await self._name()
        async with self._slots:
            return await chat.ask(self._http, {"model": model, **body}, form, receive)

    async def _name(self) -> str:
        """The model's; asked for once."""
        async with self._asking:
            if self._model is None:
                self._model = await chat.only_model(self._http)
            return self._model

    async def many(
        self,
        bodies: list[dict[str, Any]],
        form: type[Model] | None,
        return_exceptions: bool,
        put: Callable[[tuple[int, str | Model | LightvllmError]], None] | None = None,
    ) -> list[str | Model | LightvllmError]:
        """The answers. If there is ``put`` they are streamed to it, and what is no text follows whole."""
        if not bodies:
            return []
        await self._name()  # a server that cannot even say it fails the batch, and not prompt after prompt
        answers: dict[int, str | Model | LightvllmError] = {}
        numbered = enumerate(bodies)

        async def work() -> None:
            for index, body in numbered:
                receive = None if put is None else lambda text, index=index: put((index, text))
                try:
                    answers[index] = await self.one(body, form, receive)
                except LightvllmError as error:
                    if not return_exceptions:
                        error.add_note(f"prompt {index} of the batch")
                        raise
                    answers[index] = error
                if put is not None and not isinstance(answers[index], str):
                    put((index, answers[index]))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._max_concurrency, len(bodies))):
                    group.create_task(work())
        except* LightvllmError as failed:
            raise failed.exceptions[0] from None
        return [answers[index] for index in range(len(bodies))]

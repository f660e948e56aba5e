"""``LLM``: a model to call from Python, with vLLM's names and shapes for ``generate`` and ``chat``.

It turns options into configuration, has an executor made, and drives an ``LLMEngine`` over it. Not thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from lightvllm.config import ExecutorName, KubernetesTransport, PipelineTransport
from lightvllm.engine.engine import LLMEngine, OnStep, Prompt, TokensPrompt
from lightvllm.engine.options import Options, Strategy
from lightvllm.engine.outputs import EmbeddingOutput, RequestOutput
from lightvllm.engine.tokenizer import Message, Tokenizer
from lightvllm.errors import ConfigError
from lightvllm.sampling_params import SamplingParams

Progress = Callable[[str], None]


class LLM:
    """A loaded model and its workers; end it with ``shutdown``, or use it in a ``with`` statement.

    Making it blocks until the first step can be run; when that fails or is interrupted, nothing is left behind.

    Args:
        model: a Hugging Face folder, a name known to ``lightvllm models``, or a hub id.
        executor: where the workers run: ``"uniproc"`` (this process), ``"ray"`` or ``"k8s"``.
        tensor_parallel_size, pipeline_parallel_size: the layout; their product is the number of workers.
        pp_transport, pp_shared_dir: how hidden states go from a pipeline stage to the next; see ``ParallelConfig``.
        dtype: ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        max_model_len: longest prompt plus output; None takes what the model allows.
        load_format: ``"safetensors"``, or ``"dummy"`` for random weights.
        skip_tokenizer_init: token ids in and out only; the folder needs no tokenizer.
        block_size: tokens per block of KV cache.
        num_kv_blocks: blocks of KV cache; None derives it from ``kv_cache_memory``.
        kv_cache_memory: per worker, bytes or text such as ``"2GiB"``; None leaves it to the worker.
        enable_prefix_caching: compute equal beginnings of prompts once.
        max_num_seqs: sequences that run at a time.
        max_num_batched_tokens: tokens computed in one step; longer prompts are prefilled in chunks.
        async_scheduling: plan and send each step while the one before runs; None does so where there is one pipeline
            stage.
        device, threads, attention_backend, kernels, gpu_memory_utilization: see ``DeviceConfig``.
        seed: of the random numbers of requests that bring no seed of their own.
        return_logits: have the workers send each step's logits, for ``on_step``.
        ray_address, k8s_workers, k8s_service, k8s_pod_prefix, k8s_gpus_per_pod, k8s_token_file, k8s_tls_cert,
            k8s_tls_key, k8s_tls_ca, k8s_transport, strategy, start_timeout, rpc_timeout, step_timeout, env: see
            ``ExecutorConfig``.
        progress: told in a few words what start-up is waiting for.
        on_step: see ``LLMEngine``.

    Raises:
        ConfigError: an option is unknown or cannot be met, the model cannot be used, an extra is not installed.
        PlacementError, WorkerDied, WorkerError, RpcTimeout, AuthError: the workers could not be started.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        executor: ExecutorName = "uniproc",
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        pp_transport: PipelineTransport = "torch",
        pp_shared_dir: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_model_len: int | None = None,
        load_format: Literal["safetensors", "dummy"] = "safetensors",
        skip_tokenizer_init: bool = False,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
        kv_cache_memory: int | str | None = None,
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        async_scheduling: bool | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int = 0,
        attention_backend: Literal["auto", "naive", "sdpa", "paged"] = "auto",
        kernels: Literal["auto", "compiled", "reference"] = "auto",
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        return_logits: bool = False,
        ray_address: str | None = None,
        k8s_workers: Sequence[str] = (),
        k8s_service: str | None = None,
        k8s_pod_prefix: str | None = None,
        k8s_gpus_per_pod: int = 1,
        k8s_token_file: str | None = None,
        k8s_tls_cert: str | None = None,
        k8s_tls_key: str | None = None,
        k8s_tls_ca: str | None = None,
        k8s_transport: KubernetesTransport = "auto",
        strategy: Strategy = "PACK",
        start_timeout: float = 120.0,
        rpc_timeout: float = 600.0,
        step_timeout: float = 300.0,
        env: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
        **unknown: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in Options.__struct_fields__}
        options = Options.check(unknown | given, beside=("progress", "on_step"))
        from lightvllm.executors.factory import make_executor

        self.config, executor_config, path = options.configure(model)
        self._tokenizer = None if skip_tokenizer_init else Tokenizer.from_dir(path)
        self._num_requests = 0
        self._inboxes: dict[str, tuple[int, deque[RequestOutput]]] = {}  # by request id: prompt index, the call's queue
        self.executor = make_executor(executor_config, self.config, progress)
        try:
            self.engine = LLMEngine(self.config, self.executor, tokenizer=self._tokenizer, on_step=on_step)
            self._finalizer = weakref.finalize(self, self.engine.shutdown)  # also at the interpreter's exit
        except BaseException:
            self.executor.shutdown()
            raise

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What ``generate`` and ``chat`` use when they are given none."""
        return SamplingParams()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError when it was skipped."""
        if self._tokenizer is None:
            raise ConfigError("there is no tokenizer: skip_tokenizer_init=True; leave that out")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; the finished outputs, in the order of the prompts.

        Args:
            prompts: one or several: text, token ids, or mappings with ``prompt_token_ids``.
            sampling_params: for all prompts, or one for each.
            use_tqdm: show a progress bar, if standard error is a terminal.

        Raises:
            ConfigError: a prompt or its parameters cannot be run; then none is.
            WorkerDied, WorkerError, RpcTimeout: a step failed; make a new LLM.
            Shutdown: after ``shutdown``.
        """
        listed = _as_list(prompts)
        finished: dict[int, RequestOutput] = {}
        with _bar(len(listed), shown=use_tqdm) as advance:
            for output in self._run(listed, sampling_params, stream=False):
                finished[output.prompt_index] = output
                advance(output)
        return [finished[index] for index in range(len(listed))]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several; ``generate`` after the model's chat template."""
        prompts = self.preprocess_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """``generate``, but yield each request's output whenever it has grown, the finished one last.

        Outputs are cumulative, and their text only grows: print what is behind what you have printed.
        ``RequestOutput.prompt_index`` tells the prompts apart. Closing the generator aborts what is unfinished.
        """
        return self._run(_as_list(prompts), sampling_params, stream=True)

    def embed(self, prompts: Prompt | Sequence[Prompt], use_tqdm: bool = True) -> list[EmbeddingOutput]:
        """Each prompt as a vector, in the order of the prompts; of a model that makes embeddings.

        Raises as ``generate`` does; ConfigError if the model generates text.
        """
        listed = _as_list(prompts)
        embedded: dict[int, EmbeddingOutput] = {}
        with _bar(len(listed), shown=use_tqdm) as advance:
            for output in self._run(listed, None, stream=False, embed=True):
                embedded[output.prompt_index] = EmbeddingOutput.of(output)
                advance(output)
        return [embedded[index] for index in range(len(listed))]

    def preprocess_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = True,
    ) -> list[TokensPrompt]:
        """The prompts that the model's chat template makes of one conversation or several."""
        tokenizer = self.get_tokenizer()
        several = bool(messages) and isinstance(messages[0], Sequence) and not isinstance(messages[0], str)
        conversations = messages if several else [messages]
        prompts: list[TokensPrompt] = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(conversation, add_generation_prompt)  # type: ignore[arg-type]
            ids = tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return prompts

    def shutdown(self) -> None:
        """End the workers and leave nothing behind. Idempotent; also done when the interpreter exits."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()

    def _run(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        stream: bool,
        embed: bool = False,
    ) -> Generator[RequestOutput, None, None]:
        """Queue the prompts and yield their outputs.

        Whoever steps the engine may receive another call's outputs (a stream may be left standing half way): they go
        to that call's inbox.
        """
        params = self._params(sampling_params, len(prompts))
        inbox: deque[RequestOutput] = deque()
        unfinished: set[str] = set()
        try:
            for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                request_id = str(self._num_requests)
                self._num_requests += 1
                if embed:
                    self.engine.add_embedding_request(request_id, prompt)
                else:
                    self.engine.add_request(request_id, prompt, one, stream=stream)
                self._inboxes[request_id] = index, inbox
                unfinished.add(request_id)
            while unfinished:
                if not inbox:
                    for output in self.engine.step():
                        output.prompt_index, queue = self._inboxes[output.request_id]
                        queue.append(output)
                    continue
                output = inbox.popleft()
                if output.finished:
                    unfinished.discard(output.request_id)
                    del self._inboxes[output.request_id]
                yield output
        finally:
            for request_id in unfinished:
                self.engine.abort(request_id)
                self._inboxes.pop(request_id, None)

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.default_sampling_params] * num_prompts
        if not isinstance(given, (list, tuple)):
            raise ConfigError(f"sampling_params is {given!r:.80}; expected SamplingParams, or a list of them")
        if len(given) != num_prompts:
            raise ConfigError(f"{num_prompts} prompts, but {len(given)} sampling_params; give one for each, or one")
        return given


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt may be given without a list around it; a list of numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and not isinstance(listed[0], (str, Mapping, Sequence)) else listed


@contextlib.contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """A progress bar over finished requests, on standard error; nothing where that is no terminal."""
    if not (shown and total and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("prompts", total=total, rate="")
        tokens = 0

        def advance(output: RequestOutput) -> None:
            nonlocal tokens
            tokens += sum(len(completion.token_ids) for completion in output.outputs)
            seconds = progress.tasks[task].elapsed or 0.0
            progress.update(task, advance=1, rate=f"{tokens / seconds:.0f} tokens/s" if seconds else "")

        yield advance

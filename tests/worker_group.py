"""Real worker processes for tests, driven over pipes by the same bytes that a backend would carry, and the smallest
driver that turns steps into text: no executor, no scheduler."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from lightvllm.config import EngineConfig
from lightvllm.messages import (
    NewSequence,
    ScheduledSequence,
    StepInput,
    StepOutput,
    WorkerInit,
    decode_reply,
    encode_call,
    invoke,
)
from lightvllm.sampling_params import SamplingParams
from lightvllm.transfer.credentials import make_credentials

GREEDY = SamplingParams(temperature=0.0)


def _host(pipe: Connection) -> None:
    from lightvllm.worker import Worker

    worker = Worker()
    while True:
        try:
            method, payload = pipe.recv()
        except EOFError:
            return
        pipe.send_bytes(invoke(worker, method, payload))


class ProcessWorkers:
    """``size`` processes, each with a Worker. Use as a context manager."""

    def __init__(self, size: int, timeout: float = 120.0) -> None:
        self._timeout = timeout
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_host, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> ProcessWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def call(self, ranks: Sequence[int], method: str, *args: Any) -> list[Any]:
        """Call all of ``ranks`` at once; their results, or the first one's exception."""
        name, payload = encode_call(method, args, None)
        return self.call_each(ranks, [(name, payload)] * len(ranks))

    def call_each(self, ranks: Sequence[int], calls: Sequence[tuple[str, bytes]]) -> list[Any]:
        for rank, call in zip(ranks, calls, strict=True):
            self._pipes[rank].send(call)
        replies = []
        for rank, (method, _) in zip(ranks, calls, strict=True):
            if not self._pipes[rank].poll(self._timeout):
                raise TimeoutError(f"rank {rank} did not answer {method} within {self._timeout} s")
            replies.append((method, self._pipes[rank].recv_bytes(), rank))
        return [decode_reply(*reply) for reply in replies]


class LocalWorker:
    """One Worker in this process, with the interface of ``ProcessWorkers``."""

    def __init__(self) -> None:
        from lightvllm.worker import Worker

        self.worker = Worker()

    def call(self, ranks: Sequence[int], method: str, *args: Any) -> list[Any]:
        assert list(ranks) == [0]
        return [getattr(self.worker, method)(*args)]

    def call_each(self, ranks: Sequence[int], calls: Sequence[tuple[str, bytes]]) -> list[Any]:
        assert list(ranks) == [0]
        return [decode_reply(method, invoke(self.worker, method, payload), 0) for method, payload in calls]


class Driver:
    """Starts a group of workers and generates with it, giving each sequence blocks of its own."""

    def __init__(
        self, workers: ProcessWorkers | LocalWorker, config: EngineConfig, num_blocks: int = 64, local: bool = True
    ) -> None:
        """``local`` is what the workers are told: whether all are on one host."""
        self._workers, self._config = workers, config
        self._world = config.parallel.world_size
        self.ranks = range(self._world)
        self._step = 0
        self._next_block = 0
        self.num_blocks = num_blocks
        layout = config.parallel
        self._credentials = make_credentials(layout, local)
        self._local = local
        workers.call_each(self.ranks, [self._init(rank) for rank in self.ranks])
        rendezvous = workers.call([0], "open_rendezvous")[0] if layout.needs_process_groups else ""
        staged = layout.pipeline_parallel_size > 1
        addresses = workers.call(self.ranks, "open_stage_transport") if staged else []
        workers.call(self.ranks, "init_device", rendezvous)
        if staged:
            behind = addresses[layout.tensor_parallel_size :] + [""] * layout.tensor_parallel_size
            workers.call_each(
                self.ranks, [encode_call("connect_stage_transport", (address,), None) for address in behind]
            )
        self.infos = workers.call(self.ranks, "load_model")
        workers.call(self.ranks, "initialize_from_config", num_blocks)
        workers.call(self.ranks, "compile_or_warm_up_model")

    def _init(self, rank: int) -> tuple[str, bytes]:
        init = WorkerInit(
            rank=rank,
            local_rank=rank,
            local_world_size=self._world if self._local else 1,
            device_index=rank,
            world_size=self._world,
            config=self._config,
            stage_credentials=self._credentials[rank],
        )
        return encode_call("init_worker", (init,), None)

    def step(self, **fields: Any) -> StepOutput:
        """One StepInput on every rank; the output rank's result, the only one there may be."""
        self._step += 1
        replies = self._workers.call(self.ranks, "execute_model", StepInput(step=self._step, **fields))
        output = replies.pop(self._config.parallel.output_rank)
        assert isinstance(output, StepOutput)
        assert output.step == self._step
        assert replies == [None] * (self._world - 1)
        return output

    def blocks(self, count: int) -> list[int]:
        """Fresh blocks, falling in number, so that no sequence's are in the cache's own order."""
        self._next_block += count
        assert self._next_block <= self.num_blocks
        return [self.num_blocks - 1 - b for b in range(self._next_block - count, self._next_block)]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: SamplingParams = GREEDY,
        seeds: Sequence[int] | None = None,
        chunk: int | None = None,
    ) -> list[list[int]]:
        """Tokens for each prompt, all in one batch; prompts are prefilled by at most ``chunk`` tokens a step.

        Prompts of different lengths then prefill and decode in the same step.
        """
        self._next_block = 0
        size = self._config.cache.block_size
        tokens = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        pending: list[list[int]] = [[] for _ in prompts]
        new = [
            NewSequence(i, list(prompt), len(prompt), seeds[i] if seeds else i, sampling, [])
            for i, prompt in enumerate(prompts)
        ]
        blocks = {i: self.blocks(-(-(len(p) + max_tokens) // size)) for i, p in enumerate(prompts)}
        while any(len(t) < len(p) + max_tokens for t, p in zip(tokens, prompts, strict=True)):
            scheduled = []
            for i, prompt in enumerate(prompts):
                if len(tokens[i]) == len(prompt) + max_tokens:
                    continue
                count = min(len(tokens[i]) - done[i], chunk or len(tokens[i]))
                scheduled.append(ScheduledSequence(i, done[i], count, pending[i], blocks.pop(i, [])))
                pending[i] = []
                done[i] += count
            output = self.step(new=new, scheduled=scheduled)
            new = []
            for i, token in zip(output.seq_ids, output.token_ids, strict=True):
                tokens[i].append(token)
                pending[i] = [token]
        self.step(finished=list(range(len(prompts))))
        return [t[len(p) :] for t, p in zip(tokens, prompts, strict=True)]

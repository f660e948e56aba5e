"""Runs one step on this rank: batch, stage, hand-over to the next stage, logits, sampling."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lightvllm.config import EngineConfig
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.layers.attention import AttentionBackend, KVCache
from lightvllm.layers.logprobs import token_logprobs
from lightvllm.layers.memory import Memory
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.pooling import Pooler
from lightvllm.layers.sampler import sample
from lightvllm.layers.structured import Grammars
from lightvllm.layers.weights import parameter_bytes
from lightvllm.messages import NewSequence, ScheduledSequence, StepInput, StepOutput, TokenLogprobs
from lightvllm.messages import Tensor as TensorMessage
from lightvllm.models.loader import load_weights
from lightvllm.models.registry import build_model, torch_dtype
from lightvllm.sampling_params import SamplingParams
from lightvllm.transfer import tensors
from lightvllm.transfer.stage import StageTransport
from lightvllm.worker.input_batch import Batch, PromptRows, SequenceTable

PROMPT_LOGITS = 2**24
"""Logits of a prompt that are computed in one go, for ``prompt_logprobs``: 64 MiB of them."""


class ModelRunner:
    """One rank's model, its KV cache and its sequences.

    Attributes:
        parameter_bytes: memory of the weights on this rank.
        return_logits: whether steps return their logits; at first as configured.
    """

    def __init__(
        self,
        config: EngineConfig,
        parallel: ParallelContext,
        attention: AttentionBackend,
        stages: StageTransport | None = None,
    ) -> None:
        """``stages`` are this rank's neighbours in the pipeline; None where there is one stage only."""
        self._config, self._parallel, self._attention, self._stages = config, parallel, attention, stages
        self._device, self._dtype = parallel.device, torch_dtype(config.model)
        self._block_size = config.cache.block_size
        self.return_logits = config.return_logits
        self._model = build_model(config.model, parallel, attention)
        load_weights(self._model, config.model)
        self.parameter_bytes = parameter_bytes(self._model.weights())
        self._caches: list[KVCache] = []
        samples = parallel.is_last_stage and parallel.tp_rank == 0
        self._grammars = Grammars(config.model) if samples else None
        model = config.model
        self._pooler = None if model.pooling is None else Pooler(model.pooling, model.normalize)
        self._sequences = self._table(0)

    @property
    def bytes_per_block(self) -> int:
        """Of KV cache, over this rank's layers and heads."""
        model = self._model
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * self._config.model.dtype_bytes
        return per_token * self._block_size

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache; forgets the one before and every sequence."""
        capacity, longest = num_blocks * self._block_size, self._config.model.max_model_len
        if capacity < longest:
            needed = -(-longest // self._block_size)
            raise ConfigError(
                f"the KV cache of {num_blocks} blocks holds {capacity} tokens, fewer than max_model_len={longest}; "
                f"give it {needed * self.bytes_per_block} bytes per worker, or lower max_model_len to {capacity}"
            )
        self._allocate(num_blocks)

    def _allocate(self, num_blocks: int) -> None:
        shape = (num_blocks, self._block_size, self._model.num_kv_heads, self._model.head_dim)
        self._caches = []  # the old cache goes before the new one comes

        memory = Memory(self._device)

        def zeros() -> Tensor:
            # Zeros, because a masked weight of 0 times a stray NaN would be NaN.
            cache = memory.empty(*shape, dtype=self._dtype)
            return cache if self._device.type == "cpu" else cache.zero_()

        self._caches = [(zeros(), zeros()) for _ in range(self._model.num_layers)]
        self._sequences = self._table(num_blocks)

    def _table(self, num_blocks: int) -> SequenceTable:
        longest = self._config.model.max_model_len
        return SequenceTable(self._block_size, num_blocks, longest, self._device, self._grammars)

    def release_cache(self) -> None:
        self._caches = []

    def reset_sequences(self) -> None:
        """Forget all sequences and whatever a failed step left unfinished. No step may be running on any rank."""
        self._sequences.clear()
        if self._pooler is not None:
            self._pooler.clear()
        if self._stages is not None:
            self._stages.reset()

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput | None:
        """Run one step; its result on the output rank, None on the others.

        All ranks must be given the same steps in the same order. After an error the ranks may disagree about the
        sequences: call ``reset_sequences`` on all and send the sequences as new.
        """
        began = time.perf_counter()
        stages, parallel = self._stages, self._parallel
        if stages is None and parallel.pp_size > 1:
            raise LightvllmError("there is no transport to the other stages; call connect_stage_transport first")
        try:
            batch = self._begin(step)
            x = None
            if batch is not None:
                x = batch.input_ids
                if stages is not None and not parallel.is_first_stage:
                    x = stages.receive(self._hidden_shape(batch), self._dtype, step.step)
                x = self._run_stage(batch, x)
        except Exception:
            if stages is not None and not parallel.is_last_stage and step.scheduled:
                with contextlib.suppress(LightvllmError):  # the first error counts; the next stage has a time-out
                    stages.send_failure(step.step)
            raise
        if parallel.is_last_stage:
            return self._output(step, batch, x, began)
        if stages is not None and x is not None:
            stages.send(x, step.step)
        return None

    @torch.inference_mode()
    def execute_stage(self, step: StepInput, hidden: Sequence[Tensor]) -> tuple[StepOutput | None, list[Tensor]]:
        """``execute`` with the hidden states from the caller's hands and into them; see ``Worker.execute_stage``."""
        began = time.perf_counter()
        batch = self._begin(step)
        if batch is None or self._parallel.is_first_stage:
            if hidden:
                where = "the first stage" if self._parallel.is_first_stage else "a step without tokens"
                raise LightvllmError(f"step {step.step}: {len(hidden)} tensors came for {where}; expected none")
            x = None if batch is None else self._run_stage(batch, batch.input_ids)
        else:
            expected = self._hidden_shape(batch)
            if [(tuple(one.shape), one.dtype) for one in hidden] != [(expected, self._dtype)]:
                got = ", ".join(f"{one.dtype} {list(one.shape)}" for one in hidden) or "none"
                raise LightvllmError(
                    f"step {step.step}: the hidden states that came are {got}; expected {self._dtype} {list(expected)}"
                )
            x = self._run_stage(batch, tensors.to_device(hidden[0], self._device))
        if self._parallel.is_last_stage:
            return self._output(step, batch, x, began), []
        return None, [] if x is None else [x]

    def _hidden_shape(self, batch: Batch) -> tuple[int, int]:
        return batch.num_tokens, self._config.model.hidden_size

    def _begin(self, step: StepInput) -> Batch | None:
        """Take in what the step says of the sequences; None if nothing is to be computed."""
        if not self._caches:
            raise LightvllmError("there is no KV cache to run a step with; call initialize_from_config first")
        self._sequences.update(step)
        return self._sequences.batch(step.scheduled, self._share) if step.scheduled else None

    def _share(self, sampled: list[int | None]) -> list[int]:
        """What tensor rank 0 has sampled, on every tensor rank; see ``SequenceTable.batch``."""
        tokens = [-1 if token_id is None else token_id for token_id in sampled]
        if self._parallel.pp_size > 1 or (self._parallel.tp_rank == 0 and None in sampled):
            raise LightvllmError(
                "the driver counts on a token that was not sampled here; it may do so only for a sequence that was "
                "sampled in an earlier step, and only where there is one pipeline stage"
            )
        if self._parallel.tp_size == 1:
            return tokens
        shared = self._parallel.broadcast(torch.tensor(tokens, dtype=torch.int64, device=self._device))
        return [int(token_id) for token_id in shared.tolist()]

    def _run_stage(self, batch: Batch, x: Tensor) -> Tensor:
        """From token ids, or the hidden states of the stage before, to this stage's; after the norm in the last one."""
        metadata = batch.metadata
        metadata.plan = self._attention.plan(metadata, self._block_size)
        return self._model(x, batch.positions, self._caches, metadata)

    def _output(self, step: StepInput, batch: Batch | None, hidden: Tensor | None, began: float) -> StepOutput | None:
        """The step's result in the last stage, on tensor rank 0."""
        if self._pooler is not None:
            return self._embeddings(self._pooler, step, batch, hidden, began)
        logits, prompt_logprobs = None, {}
        if batch is not None and hidden is not None:
            if batch.sampled:
                rows = hidden if batch.logits_rows is None else hidden.index_select(0, batch.logits_rows)
                logits = self._model.compute_logits(rows)
            prompt_logprobs = self._prompt_logprobs(batch.prompt_rows, hidden)
        if self._parallel.tp_rank != 0:
            return None
        if batch is None or logits is None:
            return StepOutput(
                step=step.step,
                seq_ids=[],
                token_ids=[],
                prompt_logprobs=prompt_logprobs,
                model_seconds=time.perf_counter() - began,
            )
        token_ids, logprobs = sample(logits, [state.sampling for state in batch.sampled])
        for state, token_id in zip(batch.sampled, token_ids, strict=True):
            state.sampled_last = token_id
        errors = [(seq_id, state.sampling.error) for seq_id, state in zip(batch.seq_ids, batch.sampled, strict=True)]
        return StepOutput(
            step=step.step,
            seq_ids=batch.seq_ids,
            token_ids=token_ids,
            logprobs={s: lp for s, lp in zip(batch.seq_ids, logprobs, strict=True) if lp is not None},
            prompt_logprobs=prompt_logprobs,
            errors={seq_id: error for seq_id, error in errors if error is not None},
            logits=_message(logits) if self.return_logits else None,
            model_seconds=time.perf_counter() - began,
        )

    def _embeddings(
        self, pooler: Pooler, step: StepInput, batch: Batch | None, hidden: Tensor | None, began: float
    ) -> StepOutput | None:
        """``_output`` of a model that makes embeddings. Each tensor rank has all of the hidden states."""
        if self._parallel.tp_rank != 0:
            return None
        pooler.forget(step.finished)
        seq_ids, vectors = [] if batch is None else batch.seq_ids, None
        if hidden is not None:
            vectors = _message(pooler.pool(hidden, step.scheduled, seq_ids))
        return StepOutput(
            step=step.step,
            seq_ids=seq_ids,
            token_ids=[0] * len(seq_ids),
            embeddings=vectors,
            model_seconds=time.perf_counter() - began,
        )

    def _prompt_logprobs(self, parts: list[PromptRows], hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """By seq_id, on tensor rank 0; all tensor ranks must call it. Few logits are held at a time."""
        found: dict[int, list[TokenLogprobs]] = {}
        at_once = max(1, PROMPT_LOGITS // self._config.model.vocab_size)
        for part in parts:
            for start in range(0, len(part.token_ids), at_once):
                token_ids = part.token_ids[start : start + at_once]
                first = part.first + start
                logits = self._model.compute_logits(hidden[first : first + len(token_ids)])
                if logits is not None:
                    counts = [min(part.num_top, logits.shape[-1])] * len(token_ids)
                    found.setdefault(part.seq_id, []).extend(token_logprobs(logits, token_ids, counts))
        return found

    def warm_up(self) -> None:
        """Run a prefill and a decode in the first block of the cache, so that the first real step finds kernels
        built and memory allocated. Every rank must do it, at the same point, when no sequence is alive.

        What structured outputs need is made beside it, and nothing waits for that."""
        if self._grammars is not None:
            self._grammars.warm_up()
        length = min(self._block_size, self._config.model.max_model_len)
        self._dummy_steps([max(1, length - 1)], then_decode=length > 1 and self._pooler is None)

    def profile(self) -> None:
        """Run the largest step there can be, for measuring memory, in a cache that is dropped afterwards."""
        limits, longest = self._config.scheduler, self._config.model.max_model_len
        full, rest = divmod(limits.max_num_batched_tokens, longest)
        counts = ([longest] * full + ([rest] if rest else []))[: limits.max_num_seqs]
        self._allocate(sum(-(-count // self._block_size) for count in counts))
        self._dummy_steps(counts, then_decode=False)
        self.release_cache()

    def _dummy_steps(self, prefills: list[int], then_decode: bool) -> None:
        """A step that prefills sequences of the given lengths, and one in which each gets one token more."""
        block, new, scheduled = 0, [], []
        for number, count in enumerate(prefills):
            blocks = -(-(count + then_decode) // self._block_size)
            new.append(NewSequence(number, [0] * count, count, 0, SamplingParams(temperature=0.0), []))
            scheduled.append(ScheduledSequence(number, 0, count, [], list(range(block, block + blocks))))
            block += blocks
        self.execute(StepInput(step=-1, new=new, scheduled=scheduled))
        if then_decode:
            decodes = [ScheduledSequence(s.seq_id, s.count, 1, [0], []) for s in scheduled]
            self.execute(StepInput(step=-2, scheduled=decodes))
        self.reset_sequences()


def _message(tensor: Tensor) -> TensorMessage:
    return TensorMessage("float32", list(tensor.shape), tensor.contiguous().cpu().numpy().tobytes())

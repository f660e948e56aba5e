"""Runs one step on this rank: batch, stage, hand-over to the next stage, logits, sampling."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from lightvllm.config import EngineConfig
from lightvllm.errors import ConfigError, LightvllmError
from lightvllm.layers.attention import AttentionBackend, KVCache
from lightvllm.layers.memory import Memory
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.sampler import sample
from lightvllm.layers.weights import parameter_bytes
from lightvllm.messages import NewSequence, ScheduledSequence, StepInput, StepOutput
from lightvllm.messages import Tensor as TensorMessage
from lightvllm.models.loader import load_weights
from lightvllm.models.registry import build_model, torch_dtype
from lightvllm.sampling_params import SamplingParams
from lightvllm.worker.input_batch import Batch, SequenceTable


class ModelRunner:
    """One rank's model, its KV cache and its sequences.

    Attributes:
        parameter_bytes: memory of the weights on this rank.
        return_logits: whether steps return their logits; at first as configured.
    """

    def __init__(self, config: EngineConfig, parallel: ParallelContext, attention: AttentionBackend) -> None:
        self._config, self._parallel, self._attention = config, parallel, attention
        self._device, self._dtype = parallel.device, torch_dtype(config.model)
        self._block_size = config.cache.block_size
        self.return_logits = config.return_logits
        self._model = build_model(config.model, parallel, attention)
        load_weights(self._model, config.model)
        self.parameter_bytes = parameter_bytes(self._model.weights())
        self._caches: list[KVCache] = []
        self._sequences = SequenceTable(self._block_size, 0, config.model.max_model_len, self._device)

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
        self._sequences = SequenceTable(self._block_size, num_blocks, self._config.model.max_model_len, self._device)

    def release_cache(self) -> None:
        self._caches = []

    def reset_sequences(self) -> None:
        """Forget all sequences and whatever a failed step left unfinished. No step may be running on any rank."""
        self._sequences.clear()
        self._parallel.abandon_sending()

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput | None:
        """Run one step; its result on the output rank, None on the others.

        All ranks must be given the same steps in the same order. After an error the ranks may disagree about the
        sequences: call ``reset_sequences`` on all and send the sequences as new.
        """
        began = time.perf_counter()
        if not self._caches:
            raise LightvllmError("there is no KV cache to run a step with; call initialize_from_config first")
        self._sequences.update(step)
        logits, batch = None, None
        if step.scheduled:
            batch = self._sequences.batch(step.scheduled)
            hidden = self._run_stage(batch, step.step)
            if hidden is not None and batch.sampled:
                rows = hidden if batch.logits_rows is None else hidden.index_select(0, batch.logits_rows)
                logits = self._model.compute_logits(rows)
        if not (self._parallel.is_last_stage and self._parallel.tp_rank == 0):
            return None
        if batch is None or logits is None:
            return StepOutput(step=step.step, seq_ids=[], token_ids=[], model_seconds=time.perf_counter() - began)
        token_ids, logprobs = sample(logits, [state.sampling for state in batch.sampled])
        return StepOutput(
            step=step.step,
            seq_ids=batch.seq_ids,
            token_ids=token_ids,
            logprobs={s: lp for s, lp in zip(batch.seq_ids, logprobs, strict=True) if lp is not None},
            logits=_message(logits) if self.return_logits else None,
            model_seconds=time.perf_counter() - began,
        )

    def _run_stage(self, batch: Batch, step: int) -> Tensor | None:
        """Hidden states after the last stage's norm; None in the stages before, which hand theirs on."""
        parallel, metadata = self._parallel, batch.metadata
        metadata.plan = self._attention.plan(metadata, self._block_size)
        tag = step & 0x7FFFFFFF
        if parallel.is_first_stage:
            x = batch.input_ids
        else:
            shape = (batch.num_tokens, self._config.model.hidden_size)
            x = parallel.receive_from_previous_stage(shape, self._dtype, tag)
        x = self._model(x, batch.positions, self._caches, metadata)
        if parallel.is_last_stage:
            return x
        parallel.send_to_next_stage(x, tag)
        return None

    def warm_up(self) -> None:
        """Run a prefill and a decode in the first block of the cache, so that the first real step finds kernels
        built and memory allocated. Every rank must do it, at the same point, when no sequence is alive."""
        length = min(self._block_size, self._config.model.max_model_len)
        self._dummy_steps([max(1, length - 1)], then_decode=length > 1)

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
        self._parallel.finish_sending()
        self.reset_sequences()


def _message(logits: Tensor) -> TensorMessage:
    return TensorMessage("float32", list(logits.shape), logits.contiguous().cpu().numpy().tobytes())

"""``LightvLLM``: the bare model, called with token ids and giving logits, like a transformers model.

It runs in this process on one device and reads its keys and values from a paged cache as the engine does; it knows
no requests and samples nothing (``lightvllm.LLM`` does).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError
from lightvllm.layers.attention import AttentionMetadata, KVCache, attention_backend
from lightvllm.layers.parallel import ParallelContext
from lightvllm.models.loader import load_weights
from lightvllm.models.registry import build_model, torch_dtype

BLOCK_SIZE = 16
"""Tokens per block of the caches made here."""


@dataclass(frozen=True, slots=True)
class CausalLMOutput:
    """``logits``: float32 [B, L, V], one row per input token."""

    logits: Tensor


class PagedCache:
    """Keys and values of ``batch`` sequences of equal length, in blocks. Made by ``LightvLLM.new_cache``.

    Attributes:
        length: tokens that each sequence holds already.
        capacity: tokens that each can hold.
    """

    def __init__(self, batch: int, capacity: int, layers: list[KVCache]) -> None:
        self.batch, self.capacity, self.layers = batch, capacity, layers
        self.length = 0
        blocks = -(-capacity // BLOCK_SIZE)
        # Neighbouring blocks of the cache belong to different sequences, as they do in a running engine.
        self.block_tables = np.arange(batch * blocks, dtype=np.int32).reshape(blocks, batch).T.copy()


class LightvLLM:
    """A causal language model; ``model(input_ids).logits``.

    Attributes:
        config: the model's shape and dtype.
        device: where it lies.
    """

    def __init__(self, config: ModelConfig, device: str | torch.device, attention: str) -> None:
        self.config = config
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={str(self.device)!r}, but torch sees no CUDA device; use device='cpu'")
        self._attention = attention_backend(attention, self.device)
        self._model = build_model(config, ParallelContext(self.device), self._attention)
        load_weights(self._model, config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        attention_backend: str = "auto",
        max_model_len: int | None = None,
    ) -> LightvLLM:
        """Load a Hugging Face folder with safetensors.

        Args:
            path: the folder.
            dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for the checkpoint's own.
            device: ``"cpu"`` or ``"cuda[:n]"``.
            attention_backend: ``"naive"``, ``"sdpa"``, ``"paged"`` or ``"auto"``.
            max_model_len: longest sequence, tokens; None is the model's ``max_position_embeddings``.

        Raises ConfigError when the folder, the model or the device cannot be used.
        """
        return cls(ModelConfig.from_dir(path, dtype=dtype, max_model_len=max_model_len), device, attention_backend)

    def new_cache(self, batch: int, capacity: int | None = None) -> PagedCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens (``max_model_len`` if None)."""
        limit = self.config.max_model_len
        capacity = limit if capacity is None else capacity
        if batch < 1 or not 1 <= capacity <= limit:
            raise ConfigError(
                f"batch={batch}, capacity={capacity}; use a batch of 1 or more and a capacity of 1 to {limit}"
            )
        shape = (-(-capacity // BLOCK_SIZE) * batch, BLOCK_SIZE, self._model.num_kv_heads, self._model.head_dim)
        dtype = torch_dtype(self.config)

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        return PagedCache(batch, capacity, [(zeros(), zeros()) for _ in range(self._model.num_layers)])

    def __call__(self, input_ids: Tensor, cache: PagedCache | None = None) -> CausalLMOutput:
        """Logits of every position of input_ids [B, L] (integers, without padding).

        With a ``cache`` the tokens follow those that it holds, and are added to it; without, they stand alone.
        Raises ConfigError when they are not token ids of this model or do not fit.
        """
        self._check(input_ids, cache)
        batch, length = input_ids.shape
        if cache is None:
            cache = self.new_cache(batch, length)
        with torch.no_grad():  # not inference_mode: the caller may change the logits in place
            counts = np.full(batch, length, np.int64)
            starts = np.full(batch, cache.length, np.int64)
            blocks = -(-(cache.length + length) // BLOCK_SIZE)
            metadata, positions = AttentionMetadata.build(
                starts, counts, np.ascontiguousarray(cache.block_tables[:, :blocks]), BLOCK_SIZE, self.device
            )
            metadata.plan = self._attention.plan(metadata, BLOCK_SIZE)
            tokens = input_ids.reshape(-1).to(self.device, torch.int64)
            logits = self._model.compute_logits(self._model(tokens, positions, cache.layers, metadata))
        assert logits is not None
        cache.length += length
        return CausalLMOutput(logits.view(batch, length, -1))

    def _check(self, input_ids: Tensor, cache: PagedCache | None) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
            raise ConfigError(
                f"input_ids has shape {list(input_ids.shape)} and dtype {input_ids.dtype}; "
                "expected integers [batch, length] with at least one token"
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ConfigError(f"input_ids run from {low} to {high}; expected 0 to {self.config.vocab_size - 1}")
        batch, length = input_ids.shape
        if cache is None:
            if length > self.config.max_model_len:
                raise ConfigError(f"{length} tokens are more than max_model_len={self.config.max_model_len}; use fewer")
            return
        if batch != cache.batch:
            raise ConfigError(f"input_ids has batch {batch}, the cache {cache.batch}; make one with new_cache({batch})")
        if cache.length + length > cache.capacity:
            raise ConfigError(
                f"{length} tokens after {cache.length} do not fit the cache's capacity of {cache.capacity}; "
                "make it with a larger capacity"
            )

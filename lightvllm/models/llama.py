"""LLaMA: the decoder, split over tensor ranks within a layer and over pipeline stages by layer. (arXiv:2307.09288)

A stage takes hidden states and gives hidden states; the first embeds the tokens, the last one norms them and has
the head. Between layers the sum of the residual stream is left to the next norm, which is fused with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightvllm import kernels
from lightvllm.config import ModelConfig, stage_layers
from lightvllm.layers.attention import Attention, AttentionBackend, AttentionMetadata, KVCache
from lightvllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from lightvllm.layers.layernorm import RMSNorm
from lightvllm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from lightvllm.layers.parallel import ParallelContext
from lightvllm.layers.rotary_embedding import RotaryEmbedding
from lightvllm.layers.weights import WeightSlice
from lightvllm.models.registry import torch_dtype


class LlamaAttention:
    def __init__(
        self, config: ModelConfig, parallel: ParallelContext, rotary: RotaryEmbedding, backend: AttentionBackend
    ) -> None:
        dtype, width = torch_dtype(config), config.num_attention_heads * config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.attention_bias,
            dtype,
            parallel,
        )
        self.o_proj = RowParallelLinear(width, config.hidden_size, config.attention_bias, dtype, parallel)
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.head_dim = config.head_dim
        self.heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        self.rotary = rotary
        self.attention = Attention(config.head_dim, backend)

    def __call__(self, x: Tensor, positions: Tensor, cache: KVCache, metadata: AttentionMetadata) -> Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = torch.split(qkv, self.heads, dim=1)
        self.rotary(positions, query, key)
        return self.o_proj(self.attention(query, key, value, cache, metadata).flatten(1))

    def weights(self, name: str) -> Iterator[WeightSlice]:
        yield from self.qkv_proj.weights(name)
        yield from self.o_proj.weights(f"{name}.o_proj")


class LlamaMLP:
    def __init__(self, config: ModelConfig, parallel: ParallelContext) -> None:
        dtype, width = torch_dtype(config), config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [("gate_proj", width), ("up_proj", width)], config.mlp_bias, dtype, parallel
        )
        self.down_proj = RowParallelLinear(width, config.hidden_size, config.mlp_bias, dtype, parallel)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.silu_and_mul(self.gate_up_proj(x)))

    def weights(self, name: str) -> Iterator[WeightSlice]:
        yield from self.gate_up_proj.weights(name)
        yield from self.down_proj.weights(f"{name}.down_proj")


class LlamaDecoderLayer:
    def __init__(
        self, config: ModelConfig, parallel: ParallelContext, rotary: RotaryEmbedding, backend: AttentionBackend
    ) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, torch_dtype(config), parallel.device)

        self.input_layernorm = norm()
        self.self_attn = LlamaAttention(config, parallel, rotary, backend)
        self.post_attention_layernorm = norm()
        self.mlp = LlamaMLP(config, parallel)

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, positions: Tensor, cache: KVCache, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """The layer's output is the sum of the two that it returns."""
        if residual is None:
            hidden, residual = self.input_layernorm(hidden), hidden
        else:
            hidden, residual = self.input_layernorm.add(hidden, residual)
        hidden = self.self_attn(hidden, positions, cache, metadata)
        hidden, residual = self.post_attention_layernorm.add(hidden, residual)
        return self.mlp(hidden), residual

    def weights(self, name: str) -> Iterator[WeightSlice]:
        yield from self.input_layernorm.weights(f"{name}.input_layernorm")
        yield from self.self_attn.weights(f"{name}.self_attn")
        yield from self.post_attention_layernorm.weights(f"{name}.post_attention_layernorm")
        yield from self.mlp.weights(f"{name}.mlp")


class LlamaModel:
    """The decoder's layers of one stage, with the embedding before the first and the norm after the last."""

    def __init__(self, config: ModelConfig, parallel: ParallelContext, backend: AttentionBackend) -> None:
        dtype = torch_dtype(config)
        self.layer_range = stage_layers(config.num_hidden_layers, parallel.pp_size, parallel.pp_rank)
        # A last stage with a tied head needs the embedding's weight too.
        has_tied_head = config.pooling is None and config.tie_word_embeddings
        needs_embedding = parallel.is_first_stage or (parallel.is_last_stage and has_tied_head)
        self.embed_tokens = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size, dtype, parallel) if needs_embedding else None
        )
        self.is_first_stage = parallel.is_first_stage
        rotary = RotaryEmbedding(
            config.head_dim, config.max_model_len, config.rope_theta, config.rope_scaling, parallel.device
        )
        self.layers = [LlamaDecoderLayer(config, parallel, rotary, backend) for _ in self.layer_range]
        self.norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, parallel.device) if parallel.is_last_stage else None
        )

    def __call__(self, x: Tensor, positions: Tensor, caches: Sequence[KVCache], metadata: AttentionMetadata) -> Tensor:
        if self.is_first_stage:
            assert self.embed_tokens is not None
            x = self.embed_tokens(x)
        residual = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, positions, cache, metadata)
        assert residual is not None
        return residual.add_(x) if self.norm is None else self.norm.add(x, residual)[0]

    def weights(self, name: str) -> Iterator[WeightSlice]:
        if self.embed_tokens is not None:
            yield from self.embed_tokens.weights(f"{name}.embed_tokens")
        for index, layer in zip(self.layer_range, self.layers, strict=True):
            yield from layer.weights(f"{name}.layers.{index}")
        if self.norm is not None:
            yield from self.norm.weights(f"{name}.norm")


class LlamaForCausalLM:
    """One rank's part of the model; one that makes embeddings (``ModelConfig.pooling``) has no head.

    Attributes:
        num_kv_heads: key/value heads on this rank, head_dim their size: the shape of its KV cache.
        num_layers: decoder layers on this rank.
    """

    def __init__(self, config: ModelConfig, parallel: ParallelContext, backend: AttentionBackend) -> None:
        self.config = config
        self.model = LlamaModel(config, parallel, backend)
        self.lm_head: ParallelLMHead | None = None
        if parallel.is_last_stage and config.pooling is None:
            tied = self.model.embed_tokens if config.tie_word_embeddings else None
            self.lm_head = ParallelLMHead(
                tied or VocabParallelEmbedding(config.vocab_size, config.hidden_size, torch_dtype(config), parallel)
            )
        self.num_layers = len(self.model.layers)
        self.num_kv_heads = self.model.layers[0].self_attn.num_kv_heads
        self.head_dim = config.head_dim

    def __call__(self, x: Tensor, positions: Tensor, caches: Sequence[KVCache], metadata: AttentionMetadata) -> Tensor:
        """One stage of one step.

        Args:
            x: token ids [T], int64, in the first stage; hidden states [T, N] of the stage before in the others.
            positions: int64 [T], each below ``max_model_len``.
            caches: one per layer of this stage.

        Returns hidden states [T, N]: normed in the last stage, to be handed on in the others.
        """
        return self.model(x, positions, caches, metadata)

    def compute_logits(self, hidden: Tensor) -> Tensor | None:
        """Float32 logits [R, V] of normed hidden states [R, N]; None but on tensor rank 0. Last stage only."""
        assert self.lm_head is not None
        logits = self.lm_head(hidden)
        return None if logits is None else logits.float()

    def weights(self) -> Iterator[WeightSlice]:
        """Every tensor that this rank needs, once (a tied head shares the embedding's)."""
        yield from self.model.weights("model")
        if self.lm_head is not None and not self.config.tie_word_embeddings:
            yield from self.lm_head.weights("lm_head")

    def is_known(self, name: str) -> bool:
        """Whether a checkpoint of this architecture may hold a tensor called ``name``, on this rank or another."""
        c = self.config
        if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            return True
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or len(parts) < 5 or not parts[2].isdigit():
            return False
        if int(parts[2]) >= c.num_hidden_layers:
            return False
        rest = ".".join(parts[3:])
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        # Older checkpoints store the rotary frequencies, which are computed here.
        if rest in norms or rest == "self_attn.rotary_emb.inv_freq":
            return True
        for block, matrices, bias in (
            ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), c.attention_bias),
            ("mlp", ("gate_proj", "up_proj", "down_proj"), c.mlp_bias),
        ):
            for matrix in matrices:
                if rest == f"{block}.{matrix}.weight" or (bias and rest == f"{block}.{matrix}.bias"):
                    return True
        return False

"""Does a model fit? The memory of each GPU, from the model's dimensions and how it is split. Pure; knows no torch.

    weights      every matrix of a tensor rank's share of a stage, as lightvllm's models allocate them
    KV per token 2 × layers of the stage × KV heads of the rank × head_dim × bytes of the dtype
    KV cache     utilization × memory − taken − weights − activations
    tokens       KV cache ÷ KV per token, in whole blocks, of the stage that has the fewest

Weights and KV per token are exact for lightvllm (the tests compare them with what its workers report), and for vLLM and
SGLang but for what they pad. The rest is an estimate, whose assumptions are the constants here; nothing here replaces a
start on the GPU itself.

Not counted: CUDA graphs and fragmentation, for which there is what ``utilization`` leaves. A sliding window is taken as
full attention, which needs no less.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from lightvllm.config import CacheConfig, ParallelConfig, stage_layers
from lightvllm.errors import ConfigError
from lightvllm.model_config import SUPPORTED_ARCHITECTURES, ModelConfig

GIB = 2**30

CONTEXT_BYTES = GIB
"""Of a GPU, before there is a weight on it: the CUDA context, the libraries' code, NCCL's buffers."""

PROCESS_BYTES = 2 * GIB
"""Of a pod that computes on the CPU: Python and torch, of the server and of a worker. SmolLM2's process has 0.5 GiB
besides its weights; this is twice that for each."""

STEP_TOKENS = 8192
"""Tokens of one step: vLLM's default on GPUs of 80 GB. lightvllm's default is 2048, which needs less."""

STEP_SEQUENCES = 256
"""Sequences of one step, each with a row of logits, where nobody says how many: vLLM's default on GPUs below 70 GiB."""

LOGITS_BYTES = 8
"""Per logit: float32, and as much again to sample from it."""

GPUS_PER_NODE = 8
"""Most GPUs that a layout which is proposed gives to one stage: tensor parallelism stays inside a node."""

MOST_GPUS = 64
"""Largest layout that is tried before it is said that there is none."""

QK_NORM = ("Qwen3ForCausalLM",)
"""Architectures that norm each head's queries and keys."""

KNOWN_ARCHITECTURES = (*SUPPORTED_ARCHITECTURES, "MistralForCausalLM", "Qwen3ForCausalLM")
"""Those that are counted right: LLaMA's decoder, or that with ``QK_NORM``. lightvllm's engine runs fewer."""


@dataclass(frozen=True)
class Device:
    """What one worker computes on.

    Attributes:
        memory: bytes in all.
        utilization: the part of it that is used.
        taken: bytes that are used before there is a weight.
        cache_limit: most bytes of KV cache; None for what is left.
        kind: what it is called.
    """

    memory: int
    utilization: float = 0.9
    taken: int = CONTEXT_BYTES
    cache_limit: int | None = None
    kind: str = "GPU"


class Share(NamedTuple):
    """Bytes on a device of one pipeline stage; of its tensor ranks the first, which holds no less than the others.

    ``cache`` is below 0 where the rest alone is too much.
    """

    stage: int
    layers: int
    weights: int
    kv_per_token: int
    activations: int
    cache: int

    @property
    def tokens(self) -> int:
        """That its cache holds, in whole blocks."""
        block = CacheConfig().block_size
        return max(0, self.cache) // (self.kv_per_token * block) * block


@dataclass(frozen=True)
class Fit:
    """A model split ``tensor`` × ``pipeline`` ways over devices of one kind, for ``max_num_seqs`` sequences a step."""

    model: ModelConfig
    tensor: int
    pipeline: int
    device: Device
    max_num_seqs: int
    shares: tuple[Share, ...]

    @property
    def tightest(self) -> Share:
        """The stage whose cache holds the fewest tokens; the engine gives all stages as many blocks."""
        return min(self.shares, key=lambda share: (share.tokens, share.cache))

    @property
    def tokens(self) -> int:
        """That the KV cache holds."""
        return self.tightest.tokens

    @property
    def sequences(self) -> int:
        """Of ``max_model_len`` tokens that the KV cache holds at a time."""
        return self.tokens // self.model.max_model_len

    @property
    def fits(self) -> bool:
        """Whether one sequence of ``max_model_len`` tokens has room, without which engines do not start."""
        return self.tokens >= self.model.max_model_len


def read(folder: str | os.PathLike[str], *, dtype: str = "auto", max_model_len: int | None = None) -> ModelConfig:
    """The model in ``folder``, of which ``config.json`` is enough. Raises ConfigError."""
    return ModelConfig.from_dir(
        folder, dtype=dtype, max_model_len=max_model_len, load_format="dummy", supported=KNOWN_ARCHITECTURES
    )


def parameters(model: ModelConfig) -> int:
    """Of the whole model."""
    return stage_parameters(model, 1, 1, 0)


def stage_parameters(model: ModelConfig, tensor: int, pipeline: int, stage: int) -> int:
    """That the first tensor rank of a stage holds.

    The vocabulary is padded to a multiple of ``tensor``; with more ranks than KV heads, each has one; norms, and biases
    of what is summed over the ranks, are not split.
    """
    hidden, width = model.hidden_size, model.head_dim
    heads, kv_heads = model.num_attention_heads // tensor, _kv_heads(model, tensor)
    inner = model.intermediate_size // tensor
    qkv = (heads + 2 * kv_heads) * width
    layer = qkv * hidden + heads * width * hidden + 3 * inner * hidden + 2 * hidden
    if model.attention_bias:
        layer += qkv + hidden
    if model.mlp_bias:
        layer += 2 * inner + hidden
    if model.architecture in QK_NORM:
        layer += 2 * width
    first, last = stage == 0, stage == pipeline - 1
    has_head = last and model.pooling is None
    matrix = -(-model.vocab_size // tensor) * hidden
    ends = matrix if first or (has_head and model.tie_word_embeddings) else 0
    ends += matrix if has_head and not model.tie_word_embeddings else 0
    ends += hidden if last else 0
    return len(stage_layers(model.num_hidden_layers, pipeline, stage)) * layer + ends


def kv_bytes_per_token(model: ModelConfig, tensor: int, pipeline: int, stage: int) -> int:
    """Of KV cache, on each rank of a stage."""
    layers = len(stage_layers(model.num_hidden_layers, pipeline, stage))
    return 2 * layers * _kv_heads(model, tensor) * model.head_dim * model.dtype_bytes


def activation_bytes(model: ModelConfig, tensor: int, sequences: int) -> int:
    """What the largest step needs besides weights and cache: three hidden states (the residual, a layer's input and its
    result), what is widest inside a layer (gate, up and their product, or query, key, value and the attention's
    result), and the logits."""
    heads, kv_heads = model.num_attention_heads // tensor, _kv_heads(model, tensor)
    widest = max(3 * (model.intermediate_size // tensor), 2 * (heads + kv_heads) * model.head_dim)
    logits = 0 if model.pooling is not None else sequences * model.vocab_size * LOGITS_BYTES
    return STEP_TOKENS * (3 * model.hidden_size + widest) * model.dtype_bytes + logits


def fit(model: ModelConfig, tensor: int, pipeline: int, device: Device, max_num_seqs: int = STEP_SEQUENCES) -> Fit:
    """The arithmetic for one layout, whether it fits or not. Raises ConfigError if the model cannot be split so."""
    ParallelConfig(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline).check(model)
    activations = activation_bytes(model, tensor, max_num_seqs)
    shares = []
    for stage in range(pipeline):
        weights = stage_parameters(model, tensor, pipeline, stage) * model.dtype_bytes
        cache = int(device.memory * device.utilization) - device.taken - weights - activations
        if device.cache_limit is not None:
            cache = min(cache, device.cache_limit)
        layers = len(stage_layers(model.num_hidden_layers, pipeline, stage))
        per_token = kv_bytes_per_token(model, tensor, pipeline, stage)
        shares.append(Share(stage, layers, weights, per_token, activations, cache))
    return Fit(model, tensor, pipeline, device, max_num_seqs, tuple(shares))


def smallest(model: ModelConfig, device: Device, max_num_seqs: int = STEP_SEQUENCES) -> Fit | None:
    """The layout of the fewest devices that fits; of equally many that with the fewest stages. None if none does."""
    for world in range(1, MOST_GPUS + 1):
        for tensor in range(min(world, GPUS_PER_NODE), 0, -1):
            if world % tensor:
                continue
            try:
                found = fit(model, tensor, world // tensor, device, max_num_seqs)
            except ConfigError:  # it cannot be split so
                continue
            if found.fits:
                return found
    return None


def check(found: Fit) -> None:
    """Raise ConfigError, naming the smallest layout that does, unless ``found`` fits."""
    if found.fits:
        return
    model, share, device = found.model, found.tightest, found.device
    needed = share.kv_per_token * model.max_model_len
    has = (
        f"its {gib(max(0, share.cache))} of KV cache hold {share.tokens} tokens, max_model_len={model.max_model_len} "
        f"needs {gib(needed)}"
        if share.cache > 0
        else f"{gib(share.weights)} of weights and {gib(share.activations + device.taken)} besides leave nothing for "
        "the KV cache"
    )
    other = smallest(model, device, found.max_num_seqs)
    remedy = (
        f"the smallest layout that fits is -tp {other.tensor} -pp {other.pipeline}"
        if other is not None
        else f"no layout of up to {MOST_GPUS} such {device.kind}s fits"
    )
    shorter = f", or lower max_model_len to {share.tokens}" if share.tokens else ""
    raise ConfigError(
        f"{model.path} does not fit -tp {found.tensor} -pp {found.pipeline} on {device.kind}s of {gib(device.memory)} "
        f"with {device.utilization:g} in use: {has}; {remedy}{shorter}"
    )


def gib(size: int) -> str:
    """``29.92 GiB``"""
    return f"{size / GIB:.2f} GiB"


def lines(found: Fit) -> list[str]:
    """The arithmetic, for people."""
    model, share, device = found.model, found.tightest, found.device
    block = CacheConfig().block_size
    of = f" (stage {share.stage}, the fullest)" if found.pipeline > 1 else ""
    limited = device.cache_limit is not None and share.cache == device.cache_limit
    used = gib(int(device.memory * device.utilization))
    rows = {
        "model": f"{model.path}: {model.num_hidden_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads, {model.num_key_value_heads} KV heads of {model.head_dim}, "
        f"intermediate {model.intermediate_size}, vocabulary {model.vocab_size}"
        + (", tied" if model.tie_word_embeddings else ""),
        "parameters": f"{parameters(model):,} × {model.dtype_bytes} bytes ({model.dtype}) "
        f"= {gib(parameters(model) * model.dtype_bytes)}",
        "split": f"tensor {found.tensor} × pipeline {found.pipeline}: {found.tensor * found.pipeline} {device.kind}(s) "
        f"of {gib(device.memory)}; of one with {share.layers} layers{of}:",
        "  in use": f"{device.utilization:g} × {gib(device.memory)} = {used}",
        "  taken": f"{gib(device.taken)} before there is a weight (assumed)",
        "  weights": gib(share.weights),
        "  activations": f"{gib(share.activations)} for a step of {STEP_TOKENS} tokens (estimated)",
        "  KV cache": f"{gib(share.cache)} {'as told' if limited else 'left'}; per token 2 × {share.layers} layers × "
        f"{_kv_heads(model, found.tensor)} KV heads × {model.head_dim} × {model.dtype_bytes} bytes "
        f"= {share.kv_per_token:,} bytes",
        "holds": f"{found.tokens:,} tokens in blocks of {block}: {found.sequences} sequence(s) of "
        f"{model.max_model_len:,} tokens at a time",
    }
    return [f"{name:13} {said}" for name, said in rows.items()]


def _kv_heads(model: ModelConfig, tensor: int) -> int:
    return max(1, model.num_key_value_heads // tensor)

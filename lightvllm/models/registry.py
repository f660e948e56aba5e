"""Architectures by the name that ``config.json`` gives them; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from lightvllm.config import ModelConfig
from lightvllm.errors import ConfigError

if TYPE_CHECKING:
    from lightvllm.layers.attention import AttentionBackend
    from lightvllm.layers.parallel import ParallelContext
    from lightvllm.models.llama import LlamaForCausalLM

# LlamaModel is the same model without its head, as embedding models are saved.
_HOMES = dict.fromkeys(("LlamaForCausalLM", "LlamaModel"), ("lightvllm.models.llama", "LlamaForCausalLM"))


def build_model(config: ModelConfig, parallel: ParallelContext, attention: AttentionBackend) -> LlamaForCausalLM:
    """This rank's part of the model, its memory allocated but not filled (see ``loader.load_weights``)."""
    if config.architecture not in _HOMES:
        raise ConfigError(f"architecture {config.architecture!r} is not supported; use {', '.join(_HOMES)}")
    module, name = _HOMES[config.architecture]
    model: LlamaForCausalLM = getattr(importlib.import_module(module), name)(config, parallel, attention)
    return model


def torch_dtype(config: ModelConfig) -> torch.dtype:
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype

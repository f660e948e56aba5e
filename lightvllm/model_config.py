"""One model as its folder describes it: Hugging Face's ``config.json``, and what stands beside it.

Knows no torch. What can be refused by the files alone (an unknown architecture, a context that is too long) is refused
here, with what would work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import msgspec

from lightvllm.errors import ConfigError
from lightvllm.pooling import Pooling, read_pooling

DType = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """``rope_type="llama3"``: frequencies stretched by wavelength (transformers' ``_compute_llama3_parameters``).
    ``rope_type="linear"``: positions divided by ``factor``."""

    rope_type: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One LLaMA-family model: where it lies, its shape, and the precision it is run in.

    Attributes:
        path: folder with ``config.json`` and ``*.safetensors``.
        dtype: of weights, activations and KV cache.
        max_model_len: longest prompt plus output, tokens.
        load_format: ``"safetensors"``, or ``"dummy"`` for random weights of the right shapes (tests, benchmarks).
        eos_token_ids: tokens that end a generation.
        pooling: of a model that makes embeddings; None for one that generates.
        normalize: embeddings have length 1.
    """

    path: str
    architecture: str
    dtype: DType
    max_model_len: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    pooling: Pooling | None = None
    normalize: bool = False

    @classmethod
    def from_dir(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        load_format: Literal["safetensors", "dummy"] = "safetensors",
        supported: Collection[str] = SUPPORTED_ARCHITECTURES,
    ) -> ModelConfig:
        """Read ``config.json`` (and ``generation_config.json``) of a Hugging Face model folder.

        A folder with sentence-transformers' ``modules.json`` is a model that makes embeddings, pooled as is said there;
        so is one whose architecture is ``LlamaModel``: the last token's, normalised, as in vLLM, if nothing is said.

        ``dtype="auto"`` takes the checkpoint's own. ``supported`` are the architectures that are taken; those that our
        models do not know are for arithmetic only. Raises ConfigError when the folder, the architecture, the
        dtype or the length cannot be used.
        """
        folder = Path(path).expanduser()
        raw = _read_json(folder, "config.json")
        architectures = raw.get("architectures") or []
        architecture = next((a for a in architectures if a in supported), None)
        if architecture is None:
            raise ConfigError(
                f"{folder}: architecture {', '.join(architectures) or '(none named in config.json)'} is not supported; "
                f"supported: {', '.join(supported)}"
            )
        for name, expected in (("hidden_act", "silu"),):
            if raw.get(name, expected) != expected:
                raise ConfigError(f"{folder}: {name}={raw[name]!r} is not supported; expected {expected!r}")
        if raw.get("quantization_config"):
            raise ConfigError(f"{folder}: quantised checkpoints are not supported; use the unquantised model")
        if load_format == "safetensors" and not list(folder.glob("*.safetensors")):
            raise ConfigError(f"{folder}: no *.safetensors file; convert the checkpoint to safetensors first")
        headless = architecture == "LlamaModel"
        pooling, normalize = read_pooling(folder, default=("last", True) if headless else (None, False))
        try:
            hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
            context = int(raw.get("max_position_embeddings", 2048))
            rope = raw.get("rope_parameters") or {}
            config = cls(
                path=str(folder),
                architecture=architecture,
                dtype=_dtype(dtype, raw),
                max_model_len=context if max_model_len is None else max_model_len,
                vocab_size=int(raw["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(raw["intermediate_size"]),
                num_hidden_layers=int(raw["num_hidden_layers"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
                rope_scaling=_rope_scaling(raw.get("rope_scaling") or rope, folder),
                max_position_embeddings=context,
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
                bos_token_id=raw.get("bos_token_id"),
                eos_token_ids=_eos(folder, raw),
                load_format=load_format,
                pooling=pooling,
                normalize=normalize,
            )
        except KeyError as missing:
            raise ConfigError(f"{folder}/config.json lacks {missing}; is it a complete Hugging Face model?") from None
        except ConfigError:
            raise
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as wrong:
            raise ConfigError(f"{folder}/config.json cannot be used ({wrong}); is it a Hugging Face model's?") from None
        if not 1 <= config.max_model_len <= context:
            raise ConfigError(
                f"max_model_len={config.max_model_len} does not fit the model; "
                f"use 1 to {context} (max_position_embeddings)"
            )
        if heads % config.num_key_value_heads:
            raise ConfigError(
                f"{folder}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={config.num_key_value_heads}"
            )
        return config

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether a prompt's computed beginning is enough; a mean needs every token's hidden state."""
        return self.pooling in (None, "last")

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model folder; give a local Hugging Face folder or a model's name")
    try:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {name}; expected a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise ConfigError(f"{folder / name}: not valid JSON: {broken}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{folder / name}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _dtype(asked: str, raw: dict[str, Any]) -> DType:
    name = asked
    if asked == "auto":
        name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    for known in ("float32", "bfloat16", "float16"):
        if name == known:
            return known
    raise ConfigError(f"dtype={name!r} is not supported; use {', '.join(DTYPE_BYTES)} or auto")


def _rope_scaling(raw: dict[str, Any], folder: Path) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type")
    if kind in (None, "default"):
        return None
    try:
        return msgspec.convert({k: v for k, v in raw.items() if k != "type"} | {"rope_type": kind}, RopeScaling)
    except msgspec.ValidationError as wrong:
        raise ConfigError(
            f"{folder}: rope_scaling {raw} is not supported ({wrong}); supported: llama3, linear"
        ) from None


def _eos(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = _read_json(folder, "generation_config.json") if (folder / "generation_config.json").exists() else {}
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)

"""A catalogue of ready LLMInferences for common models, each with what it assumes of its GPUs.

Dimensions are those of each model's published ``config.json``. What they come to is computed (``memory``), never
written down here; the tests check every template: it is one that the API server takes, it can be planned, and it fits.

A template says neither who may use the model nor how many replicas there are: ``lightvllm manifest --template`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lightvllm.backends.k8s.labels import KIND
from lightvllm.errors import ConfigError
from lightvllm.model_config import ModelConfig, RopeScaling
from lightvllm.operator.memory import GIB, PROCESS_BYTES, Device, Fit, fit
from lightvllm.operator.types import API_VERSION

_LLAMA3_ROPE = RopeScaling(rope_type="llama3", factor=8.0)

SMOLLM2_135M = ModelConfig(
    path="smollm2-135m",
    architecture="LlamaForCausalLM",
    dtype="float32",  # as lightvllm models get leaves it
    max_model_len=8192,
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
LLAMA_31_8B = ModelConfig(
    path="meta-llama/Llama-3.1-8B-Instruct",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    max_model_len=131072,
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=_LLAMA3_ROPE,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
LLAMA_33_70B = msgspec.structs.replace(
    LLAMA_31_8B,
    path="meta-llama/Llama-3.3-70B-Instruct",
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
)
QWEN3_8B = ModelConfig(
    path="Qwen/Qwen3-8B",
    architecture="Qwen3ForCausalLM",
    dtype="bfloat16",
    max_model_len=40960,
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)
QWEN3_32B = msgspec.structs.replace(
    QWEN3_8B,
    path="Qwen/Qwen3-32B",
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    num_attention_heads=64,
)
MISTRAL_7B = ModelConfig(
    path="mistralai/Mistral-7B-Instruct-v0.3",
    architecture="MistralForCausalLM",
    dtype="bfloat16",
    max_model_len=32768,
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)
MISTRAL_SMALL_24B = msgspec.structs.replace(
    MISTRAL_7B,
    path="mistralai/Mistral-Small-24B-Instruct-2501",
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_hidden_layers=40,
    rope_theta=100000000.0,
)

GPU_80GB = Device(79 * GIB)
"""An H100 or A100 of 80 GB, of which drivers report 79.6 GiB and more."""
GPU_48GB = Device(44 * GIB)
"""An L40S, L40 or A6000 of 48 GB, of which 44.5 GiB are there with ECC."""
GPU_24GB = Device(22 * GIB)
"""An L4 or A10 of 24 GB, of which 22.4 GiB are there with ECC."""
CPU_4GIB = Device(4 * GIB, utilization=1.0, taken=PROCESS_BYTES, cache_limit=GIB, kind="CPU pod")

_HF_TOKEN: dict[str, Any] = {"envFrom": [{"secretRef": {"name": "hf"}}]}
_ROCE = {
    "annotations": {"k8s.v1.cni.cncf.io/networks": "roce"},
    "nccl": {"NCCL_IB_GID_INDEX": "3", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_TC": "106"},
    "shmSize": "16Gi",
}


@dataclass(frozen=True)
class Template:
    """One of the catalogue.

    Attributes:
        name: of the template, and of what it makes, where dots are dashes.
        summary: what it is for, in a line.
        config: the model's dimensions, with its longest context.
        device: what each worker has.
        spec: the LLMInference's, but for the model's name and who may use it; it says maxModelLen and maxNumSeqs.
        notes: what the cluster must have that others need not.
    """

    name: str
    summary: str
    config: ModelConfig
    device: Device
    spec: dict[str, Any]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The LLMInference, anew for each caller; without ``apiKey`` or ``allowUnauthenticated`` it is not complete."""
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": self.name.replace(".", "-")},
            "spec": {"model": self.config.path, **copy.deepcopy(self.spec)},
        }

    def fit(self, device: Device | None = None, spec: Mapping[str, Any] | None = None) -> Fit:
        """Its arithmetic, on other devices or with another spec if told.

        Raises ConfigError if the model cannot be split so.
        """
        said = self.spec if spec is None else spec
        return fit(
            msgspec.structs.replace(self.config, max_model_len=said["maxModelLen"]),
            said.get("tensorParallelSize", 1),
            said.get("pipelineParallelSize", 1),
            device or self.device,
            said["maxNumSeqs"],
        )


def _pod(cpu: int, memory: str, **resources: int) -> dict[str, Any]:
    """``resources`` besides, as limits."""
    asked: dict[str, Any] = {"requests": {"cpu": cpu, "memory": memory}}
    if resources:
        asked["limits"] = {name.replace("_", "/"): count for name, count in resources.items()}
    return {"resources": asked}


def _vllm(tensor: int = 1, pipeline: int = 1, **fields: Any) -> dict[str, Any]:
    layout = {"tensorParallelSize": tensor, "pipelineParallelSize": pipeline}
    return {"engine": {"name": "vllm"}, **{name: size for name, size in layout.items() if size > 1}, **fields}


_TOKEN_NOTE = "the model is gated: kubectl create secret generic hf --from-literal=HF_TOKEN=TOKEN"
_ROCE_NOTE = (
    "RoCE: your secondary network in k8s.v1.cni.cncf.io/networks, your device plugin's resource for rdma/hca, "
    "and your network's GID index and traffic class"
)

_ALL = (
    Template(
        "smollm2-135m-cpu",
        "SmolLM2 135M on a CPU: to try things, and for tests",
        SMOLLM2_135M,
        CPU_4GIB,
        {
            "engine": {"name": "lightvllm", "args": [f"--kv-cache-memory={GIB}"]},
            "gpuResource": "",
            "maxModelLen": 8192,
            "maxNumSeqs": 8,
            "pod": {"resources": {"requests": {"cpu": 1, "memory": "4Gi"}, "limits": {"memory": "4Gi"}}},
        },
        ("pods do not download this model: put it on a volume (spec.modelSource), or into the image",),
    ),
    Template(
        "llama-3.1-8b",
        "Llama 3.1 8B on one GPU of 48 GB",
        LLAMA_31_8B,
        GPU_48GB,
        {"maxModelLen": 32768, "maxNumSeqs": 64, **_HF_TOKEN, "pod": _pod(4, "24Gi")},
        (_TOKEN_NOTE,),
    ),
    Template(
        "llama-3.1-8b-tp2",
        "Llama 3.1 8B on two GPUs of 24 GB of one node",
        LLAMA_31_8B,
        GPU_24GB,
        {"tensorParallelSize": 2, "maxModelLen": 32768, "maxNumSeqs": 64, **_HF_TOKEN, "pod": _pod(6, "32Gi")},
        (_TOKEN_NOTE,),
    ),
    Template(
        "llama-3.3-70b-tp4",
        "Llama 3.3 70B on four GPUs of 80 GB of one node",
        LLAMA_33_70B,
        GPU_80GB,
        _vllm(4, maxModelLen=32768, maxNumSeqs=256, **_HF_TOKEN, network={"shmSize": "16Gi"}, pod=_pod(12, "64Gi")),
        (_TOKEN_NOTE,),
    ),
    Template(
        "llama-3.3-70b-tp4-pp2",
        "Llama 3.3 70B on two pods of four GPUs of 48 GB",
        LLAMA_33_70B,
        GPU_48GB,
        _vllm(4, 2, maxModelLen=32768, maxNumSeqs=256, **_HF_TOKEN, network={"shmSize": "16Gi"}, pod=_pod(12, "64Gi")),
        (_TOKEN_NOTE,),
    ),
    Template(
        "llama-3.3-70b-tp4-pp2-roce",
        "Llama 3.3 70B with its whole context, on two pods of four GPUs of 80 GB with RoCE between them",
        LLAMA_33_70B,
        GPU_80GB,
        _vllm(4, 2, maxModelLen=131072, maxNumSeqs=256, **_HF_TOKEN, network=_ROCE, pod=_pod(12, "64Gi", rdma_hca=1)),
        (_TOKEN_NOTE, _ROCE_NOTE),
    ),
    Template(
        "qwen3-8b",
        "Qwen3 8B on one GPU of 48 GB",
        QWEN3_8B,
        GPU_48GB,
        _vllm(maxModelLen=32768, maxNumSeqs=64, pod=_pod(4, "24Gi")),
    ),
    Template(
        "qwen3-32b-tp2",
        "Qwen3 32B on two GPUs of 80 GB of one node",
        QWEN3_32B,
        GPU_80GB,
        _vllm(2, maxModelLen=40960, maxNumSeqs=128, network={"shmSize": "16Gi"}, pod=_pod(8, "48Gi")),
    ),
    Template(
        "mistral-7b",
        "Mistral 7B v0.3 on one GPU of 24 GB",
        MISTRAL_7B,
        GPU_24GB,
        _vllm(maxModelLen=16384, maxNumSeqs=64, **_HF_TOKEN, pod=_pod(4, "24Gi")),
        (_TOKEN_NOTE,),
    ),
    Template(
        "mistral-small-24b",
        "Mistral Small 24B (2501) on one GPU of 80 GB",
        MISTRAL_SMALL_24B,
        GPU_80GB,
        _vllm(maxModelLen=32768, maxNumSeqs=64, **_HF_TOKEN, pod=_pod(4, "48Gi")),
        (_TOKEN_NOTE,),
    ),
)
TEMPLATES = {template.name: template for template in _ALL}
"""By name, in the order in which they are shown."""


def get(name: str) -> Template:
    """Raises ConfigError, which names those there are."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise ConfigError(f"no template {name!r}; use one of {', '.join(TEMPLATES)}") from None

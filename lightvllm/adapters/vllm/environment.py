"""Which of the driver's environment variables reach remote workers: a rule that can be read, printed and changed.

``RULES`` is the rule itself, with a reason for each line; docs/vllm.md and ``lightvllm vllm env`` show it. What a
worker's own environment has already is never overwritten by what comes from here. ``AdapterSettings.env`` is apart from
it: variables that are given for the workers, which win. Worker processes that a driver starts on its own machine
inherit all of its environment; this module has no part in that. Imports no vllm.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from lightvllm.adapters.vllm.settings import AdapterSettings


class Rule(msgspec.Struct, frozen=True):
    """One line of the rule: variables by name or with ``*`` (as in a shell), whether they reach workers, and why."""

    pattern: str
    reaches: bool
    why: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one variable.

    Attributes:
        reaches: whether it reaches remote workers.
        why: in a few words, for people.
        touched: whether the rule or a setting speaks of it; most of an environment is not spoken of, and stays.
        secret: its value should not be shown.
    """

    name: str
    reaches: bool
    why: str
    touched: bool = True
    secret: bool = False


_OWN_ADDRESS = "an address of one host"
_OWN_DEVICES = "the devices of one worker; whoever places the workers deals them"
_OWN_RANK = "one worker's place in its group, which the executor tells it"
_OWN_CORES = "core numbers of one host"
_LINK = "Kubernetes' address of a Service; a pod has its own"

STAY = (
    Rule("VLLM_HOST_IP", False, _OWN_ADDRESS),
    Rule("VLLM_HOST_PORT", False, _OWN_ADDRESS),
    Rule("VLLM_*_SIDE_CHANNEL_HOST", False, _OWN_ADDRESS),
    Rule("MOONCAKE_REQUESTER_LOCAL_HOSTNAME", False, _OWN_ADDRESS),
    Rule("MOONCAKE_PREFERRED_SEGMENT", False, _OWN_ADDRESS),
    Rule("NCCL_HOSTID", False, "tells hosts apart: with one for all, NCCL would look for the others in shared memory"),
    Rule("VLLM_PORT", False, "ports of one host's processes; Kubernetes sets it too, for a Service called vllm"),
    Rule("VLLM_RPC_BASE_PATH", False, "a folder for one host's sockets"),
    Rule("VLLM_GPU_NIC_PCIE_MAPPING", False, "PCI addresses of one host"),
    Rule("VLLM_NIC_SELECTION_VARS", False, "belongs to VLLM_GPU_NIC_PCIE_MAPPING"),
    Rule("CUDA_MPS_*_DIRECTORY", False, "a folder for one host's sockets"),
    Rule("*_SERVICE_HOST", False, _LINK),
    Rule("*_SERVICE_PORT*", False, _LINK),
    Rule("*_PORT_[0-9]*_*", False, _LINK),
    Rule("*_VISIBLE_DEVICES", False, _OWN_DEVICES),
    Rule("*_VISIBLE_CHIPS", False, _OWN_DEVICES),
    Rule("GPU_DEVICE_ORDINAL", False, _OWN_DEVICES),
    Rule("ZE_AFFINITY_MASK", False, _OWN_DEVICES),
    Rule("ONEAPI_DEVICE_SELECTOR", False, _OWN_DEVICES),
    Rule("RANK", False, _OWN_RANK),
    Rule("LOCAL_RANK", False, _OWN_RANK),
    Rule("GROUP_RANK", False, _OWN_RANK),
    Rule("WORLD_SIZE", False, _OWN_RANK),
    Rule("LOCAL_WORLD_SIZE", False, _OWN_RANK),
    Rule("MASTER_*", False, "a rendezvous that another launcher made; the executor makes its own"),
    Rule("TORCHELASTIC_*", False, "another launcher's"),
    Rule("VLLM_DP_*", False, "an engine's place among the others; the configuration carries it"),
    Rule("OMP_PLACES", False, _OWN_CORES),
    Rule("KMP_AFFINITY", False, _OWN_CORES),
    Rule("KMP_HW_SUBSET", False, _OWN_CORES),
    Rule("GOMP_CPU_AFFINITY", False, _OWN_CORES),
    Rule("LD_LIBRARY_PATH", False, "read when a process starts, so that it would come too late"),
    Rule("LD_PRELOAD", False, "read when a process starts, so that it would come too late"),
    Rule("TORCHINDUCTOR_CACHE_DIR", False, "vLLM sets it in every process, to a folder named after the user there"),
    Rule("TRITON_CACHE_DIR", False, "vLLM sets it in every process, to a folder of its compile cache there"),
    Rule("VLLM_RAY_*", False, "of vLLM's own Ray executors"),
    Rule("RAY_*", False, "Ray sets those of its processes itself"),
    Rule("LIGHTVLLM_*", False, "settings of this process"),
)
"""What belongs to one process, worker or host. Before ``REACH``; only a full name in ``env_include`` overrules it."""

REACH = (
    Rule("VLLM_*", True, "vLLM's, registered or of a plug-in"),
    Rule("NCCL_*", True, "transport of collectives: all ranks must agree"),
    Rule("RCCL_*", True, "transport of collectives: all ranks must agree"),
    Rule("GLOO_*", True, "transport of collectives: all ranks must agree"),
    Rule("UCX_*", True, "transport of KV caches: both ends must agree"),
    Rule("NVSHMEM_*", True, "transport of experts' tokens: all ranks must agree"),
    Rule("MOONCAKE_*", True, "a KV connector's settings"),
    Rule("LMCACHE_*", True, "a KV connector's settings"),
    Rule("HF_*", True, "where and how weights are found"),
    Rule("HUGGING_FACE_*", True, "where and how weights are found"),
    Rule("TRANSFORMERS_*", True, "where and how weights are found"),
    Rule("RUNAI_STREAMER_*", True, "how weights are streamed from object storage"),
    Rule("FLASH_ATTENTION_*", True, "choice of kernels: all ranks must compute alike"),
    Rule("FLASHINFER_*", True, "choice of kernels: all ranks must compute alike"),
    Rule("AITER_*", True, "choice of kernels: all ranks must compute alike"),
    Rule("DG_*", True, "DeepGEMM's choice and compilation of kernels"),
    Rule("TORCH_*", True, "torch and its process groups: all ranks must agree"),
    Rule("TORCHDYNAMO_*", True, "compilation: all ranks must compute alike"),
    Rule("TORCHINDUCTOR_*", True, "compilation: all ranks must compute alike"),
    Rule("TRITON_*", True, "compilation: all ranks must compute alike"),
    Rule("PYTORCH_*", True, "torch's allocator, read at its first allocation"),
    Rule("CUBLAS_WORKSPACE_CONFIG", True, "makes results repeatable, if all ranks have it"),
    Rule("CUDA_*", True, "how devices are numbered, launched and compiled for"),
    Rule("OMP_*", True, "threads of a process"),
    Rule("KMP_*", True, "threads of a process"),
    Rule("MKL_*", True, "threads of a process"),
    Rule("PYTHONHASHSEED", True, "vLLM hashes blocks of the prefix cache with it"),
)
"""What means the same on every worker."""

RULES = STAY + REACH

REGISTERED = "registered by vLLM (vllm.envs)"
SECRET_WORDS = (
    *("TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "CREDENTIAL", "CREDENTIALS"),
    *("KEY", "KEYS", "APIKEY", "AUTH", "AUTHORIZATION", "BEARER", "COOKIE"),
)
"""A name that has one of these words, between underscores or at its ends, marks a secret."""
NO_SECRETS = ("*_TOKEN_THRESHOLD",)
"""Names that have such a word, of which vLLM is known to mean something else: numbers of tokens."""

# Run together with what stands before, as in HFTOKEN and DBPASSWORD. TOKENS and TOKENIZERS are no secrets.
_SECRET_WORD = re.compile(
    r".*(TOKEN|SECRET|SECRETS|PASSWORD|PASSWORDS|PASSWD|PASSPHRASE|CREDENTIAL|CREDENTIALS|APIKEY|ACCESSKEY|SECRETKEY"
    r"|PRIVATEKEY)"
)
_SECRET_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")
_SERVICE_PORT = Rule("*_PORT", False, _LINK)  # if that is its value; a number is no link


def secret_word(name: str) -> str | None:
    """The word that marks the variable's name as that of a secret, or None."""
    name = name.upper()
    if any(fnmatchcase(name, pattern) for pattern in NO_SECRETS):
        return None
    for word in re.split(r"[^A-Z0-9]+", name):
        if word in SECRET_WORDS or _SECRET_WORD.fullmatch(word):
            return word
    return None


def decide(environ: Mapping[str, str], registered: Collection[str], settings: AdapterSettings) -> list[Decision]:
    """What becomes of each variable of ``environ``, and of those in ``settings.env``; by name.

    The first that applies: ``env``, ``env_exclude``, a full name in ``env_include``, secrets, ``STAY``, a ``PREFIX*``
    in ``env_include``, ``REACH``, what vLLM has registered. Anything else stays.

    Args:
        registered: the names that vLLM knows (``vllm.envs.environment_variables``); empty where it is not installed.
    """
    return [
        _decide(name, environ.get(name, ""), registered, settings) for name in sorted(environ.keys() | settings.env)
    ]


def for_workers(environ: Mapping[str, str], registered: Collection[str], settings: AdapterSettings) -> dict[str, str]:
    """The variables that reach remote workers where they have none of that name, without those of ``settings.env``."""
    return {
        decision.name: environ[decision.name]
        for decision in decide(environ, registered, settings)
        if decision.reaches and decision.name not in settings.env
    }


def registered_by_vllm() -> tuple[str, ...] | None:
    """The names that the installed vLLM knows, read without importing vLLM and torch; None if it is not installed.

    A driver, which has imported vLLM, passes ``vllm.envs.environment_variables`` instead: plug-ins may have added some.
    """
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:  # none, or a folder that happens to be called vllm
        return None
    spec = importlib.util.spec_from_file_location("_lightvllm_vllm_envs", Path(package.origin).with_name("envs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.environment_variables)


def _decide(name: str, value: str, registered: Collection[str], settings: AdapterSettings) -> Decision:
    word = secret_word(name)
    held = f"a secret, by the word {word}" if word else "a URL with a password" if _SECRET_URL.search(value) else ""

    def decision(reaches: bool, why: str, touched: bool = True) -> Decision:
        return Decision(name=name, reaches=reaches, why=why, touched=touched, secret=bool(held))

    if name in settings.env:
        return decision(True, "given in env, which wins over a worker's own")
    if by := _named(name, settings.env_exclude):
        return decision(False, f"env_exclude has {by}")
    if name in settings.env_include:
        return decision(True, "env_include names it")
    stays = _rule(name, STAY) or (name.endswith("_PORT") and _SERVICE_URL.match(value) and _SERVICE_PORT)
    reaches = _rule(name, REACH)
    by = _named(name, settings.env_include)
    sent = f"env_include has {by}" if by else reaches.why if reaches else REGISTERED if name in registered else ""
    if held and (stays or sent):
        return decision(False, f"{held}; env_include with its full name would send it")
    if stays:
        return decision(False, stays.why, touched=stays.why is not _LINK or bool(sent))  # pods have hundreds of those
    if sent:
        return decision(True, sent)
    return decision(False, "nothing speaks of it", touched=False)


def _rule(name: str, rules: tuple[Rule, ...]) -> Rule | None:
    return next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)


def _named(name: str, patterns: Collection[str]) -> str:
    """The first of ``NAME`` or ``PREFIX*`` that means the variable, or ``""``."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), "")

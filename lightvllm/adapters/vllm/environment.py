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


def _rules(reaches: bool, why: str, *patterns: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, reaches, why) for pattern in patterns)


_LINK = "Kubernetes' address of a Service; a pod has its own"

STAY = (
    *_rules(
        False,
        "an address of one host",
        "VLLM_HOST_IP",
        "VLLM_HOST_PORT",
        "VLLM_*_SIDE_CHANNEL_HOST",
        "MOONCAKE_REQUESTER_LOCAL_HOSTNAME",
        "MOONCAKE_PREFERRED_SEGMENT",
    ),
    *_rules(
        False, "tells hosts apart: with one for all, NCCL would look for the others in shared memory", "NCCL_HOSTID"
    ),
    *_rules(False, "ports of one host's processes; Kubernetes sets it too, for a Service called vllm", "VLLM_PORT"),
    *_rules(False, "a folder for one host's sockets", "VLLM_RPC_BASE_PATH", "CUDA_MPS_*_DIRECTORY"),
    *_rules(False, "a file of one host, without which vLLM would not start", "VLLM_LOGGING_CONFIG_PATH"),
    *_rules(False, "PCI addresses of one host", "VLLM_GPU_NIC_PCIE_MAPPING"),
    *_rules(False, "belongs to VLLM_GPU_NIC_PCIE_MAPPING", "VLLM_NIC_SELECTION_VARS"),
    *_rules(False, _LINK, "*_SERVICE_HOST", "*_SERVICE_PORT*", "*_PORT_[0-9]*_*"),
    *_rules(
        False,
        "the devices of one worker; whoever places the workers deals them",
        "*_VISIBLE_DEVICES",
        "*_VISIBLE_CHIPS",
        "GPU_DEVICE_ORDINAL",
        "ZE_AFFINITY_MASK",
        "ONEAPI_DEVICE_SELECTOR",
    ),
    *_rules(
        False,
        "one worker's place in its group, which the executor tells it",
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
    ),
    *_rules(False, "a rendezvous that another launcher made; the executor makes its own", "MASTER_*"),
    *_rules(False, "another launcher's", "TORCHELASTIC_*"),
    *_rules(False, "an engine's place among the others; the configuration carries it", "VLLM_DP_*"),
    *_rules(False, "core numbers of one host", "OMP_PLACES", "KMP_AFFINITY", "KMP_HW_SUBSET", "GOMP_CPU_AFFINITY"),
    *_rules(False, "read when a process starts, so that it would come too late", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *_rules(
        False,
        "torch or vLLM sets it in every process, to a folder of that host",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
    ),
    *_rules(False, "of vLLM's own Ray executors", "VLLM_RAY_*"),
    *_rules(False, "Ray sets those of its processes itself", "RAY_*"),
    *_rules(False, "settings of this process", "LIGHTVLLM_*"),
)
"""What belongs to one process, worker or host. Before ``REACH``; only a full name in ``env_include`` overrules it."""

REACH = (
    *_rules(True, "vLLM's, registered or of a plug-in", "VLLM_*"),
    *_rules(True, "transport of collectives: all ranks must agree", "NCCL_*", "RCCL_*", "GLOO_*"),
    *_rules(True, "transport of KV caches: both ends must agree", "UCX_*"),
    *_rules(True, "transport of experts' tokens: all ranks must agree", "NVSHMEM_*"),
    *_rules(True, "a KV connector's settings", "MOONCAKE_*", "LMCACHE_*"),
    *_rules(True, "where and how weights are found", "HF_*", "HUGGING_FACE_*", "TRANSFORMERS_*"),
    *_rules(True, "how weights are streamed from object storage", "RUNAI_STREAMER_*"),
    *_rules(True, "choice of kernels: all ranks must compute alike", "FLASH_ATTENTION_*", "FLASHINFER_*", "AITER_*"),
    *_rules(True, "DeepGEMM's choice and compilation of kernels", "DG_*"),
    *_rules(True, "torch and its process groups: all ranks must agree", "TORCH_*"),
    *_rules(True, "compilation: all ranks must compute alike", "TORCHDYNAMO_*", "TORCHINDUCTOR_*", "TRITON_*"),
    *_rules(True, "torch's allocator, read at its first allocation", "PYTORCH_*"),
    *_rules(True, "makes results repeatable, if all ranks have it", "CUBLAS_WORKSPACE_CONFIG"),
    *_rules(True, "how devices are numbered, launched and compiled for", "CUDA_*"),
    *_rules(True, "threads of a process", "OMP_*", "KMP_*", "MKL_*"),
    *_rules(True, "vLLM hashes blocks of the prefix cache with it", "PYTHONHASHSEED"),
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
    values = {**environ, **settings.env}
    return [_decide(name, values[name], registered, settings) for name in sorted(values)]


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

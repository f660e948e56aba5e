"""Which variables reach workers: the rule, its order, secrets, and vLLM's own names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightvllm.adapters.vllm.environment import (
    REACH,
    REGISTERED,
    RULES,
    SECRET_WORDS,
    STAY,
    Decision,
    decide,
    for_workers,
    registered_by_vllm,
    secret_word,
)
from lightvllm.adapters.vllm.settings import AdapterSettings


def of(name: str, value: str = "1", registered: tuple[str, ...] = (), **settings: Any) -> Decision:
    (decision,) = decide({name: value}, registered, AdapterSettings(**settings))
    assert decision.name == name
    assert decision.why
    return decision


@pytest.mark.parametrize(
    "name",
    [
        *("VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "VLLM_OF_A_PLUGIN", "VLLM_CACHE_ROOT"),
        *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "UCX_TLS", "NVSHMEM_IB_ENABLE_IBGDA"),
        *("HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LMCACHE_CONFIG_FILE", "RUNAI_STREAMER_CONCURRENCY"),
        *("FLASH_ATTENTION_TRITON_AMD_ENABLE", "FLASHINFER_DISABLE_VERSION_CHECK", "CUBLAS_WORKSPACE_CONFIG"),
        *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_PRINT_AUTOTUNING"),
        *("PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "PYTHONHASHSEED"),
        *("OMP_NUM_THREADS", "KMP_BLOCKTIME", "MKL_NUM_THREADS"),
        # with a word that looks like a secret's, but is none
        *("VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", "VLLM_USE_FASTOKENS", "VLLM_ENABLE_PREGRAD_PASSES", "NCCL_IB_PKEY"),
        *("VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD", "HF_TOKENIZERS_PARALLELISM", "VLLM_KEYWORDS", "VLLM_AUTHOR"),
        "VLLM_NIXL_SIDE_CHANNEL_PORT",
    ],
)
def test_what_reaches_workers(name: str) -> None:
    decision = of(name)
    assert decision.reaches
    assert decision.touched
    assert not decision.secret


@pytest.mark.parametrize(
    "name",
    [
        *("VLLM_HOST_IP", "VLLM_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_DP_RANK", "VLLM_RAY_BUNDLE_INDICES"),
        *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY"),
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
        *("NCCL_HOSTID", "OMP_PLACES", "LD_LIBRARY_PATH", "TORCHINDUCTOR_CACHE_DIR", "RAY_ADDRESS"),
        *("LIGHTVLLM_HOST_IP", "VLLM_LLAMA_SERVICE_HOST", "VLLM_SERVICE_PORT_HTTP", "VLLM_LLAMA_PORT_8000_TCP_ADDR"),
    ],
)
def test_what_belongs_to_one_process_or_host(name: str) -> None:
    decision = of(name, registered=(name,))
    assert not decision.reaches
    assert decision.touched
    # a beginning does not send it, its full name does
    assert not of(name, env_include=("*",)).reaches
    assert of(name, env_include=(name,)).reaches


def test_a_service_link_is_known_by_its_value() -> None:
    assert not of("VLLM_LLAMA_PORT", "tcp://10.0.0.1:8000").reaches
    assert of("VLLM_LLAMA_PORT", "8000").reaches
    # the hundreds that a pod has of these are not spoken of, unless something would have sent them
    assert not of("KUBERNETES_SERVICE_HOST").touched
    assert not of("KUBERNETES_PORT", "tcp://10.0.0.1:443").touched
    assert of("VLLM_SERVICE_HOST").touched


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "VLLM_API_KEY", "S3_SECRET_ACCESS_KEY", "S3_ACCESS_KEY_ID"),
        *("VLLM_HFTOKEN", "LMCACHE_REDIS_PASSWORD", "LMCACHE_REDIS_PASS", "HF_TOKEN_PATH", "vllm_api_key"),
        *("VLLM_PRIVATE_KEY", "UCX_AUTH", "VLLM_DBPASSWORD", "TORCH_CREDENTIALS", "VLLM_SECRETS", "VLLM_APIKEYS_KEY"),
    ],
)
def test_secrets_stay_unless_they_are_named(name: str) -> None:
    for include in ((), ("*",), (name[:3] + "*",)):
        decision = of(name, registered=(name,), env_include=include)
        assert not decision.reaches
        assert decision.secret
        assert "env_include" in decision.why
    assert of(name, env_include=(name,)).reaches
    assert of(name, env_include=(name,)).secret  # all the same: its value is not to be shown


def test_a_url_with_a_password_is_a_secret() -> None:
    assert not of("LMCACHE_REMOTE_URL", "redis://user:hunter2@cache:6379").reaches
    assert not of("LMCACHE_REMOTE_URL", "redis://:hunter2@cache:6379").reaches
    assert of("MY_URL", env={"MY_URL": "redis://user:hunter2@cache"}).secret
    for plain in ("redis://cache:6379", "redis://user@cache:6379", "lm://cache:1/a:b@c"):
        assert of("LMCACHE_REMOTE_URL", plain).reaches


WORDS = st.from_regex(r"[A-Z0-9]{0,6}", fullmatch=True)


@given(
    before=st.sampled_from([*(rule.pattern.strip("*") for rule in REACH), "MY_", ""]),
    left=WORDS,
    word=st.sampled_from(SECRET_WORDS),
    right=WORDS,
    others=st.lists(st.from_regex(r"[A-Z_]{1,12}\*|\*", fullmatch=True), max_size=3),
)
def test_no_secret_passes_unless_it_is_named(before: str, left: str, word: str, right: str, others: list[str]) -> None:
    name = "_".join(filter(None, (before.strip("_"), left, word, right)))
    assume(not name[0].isdigit() and not name.endswith("_TOKEN_THRESHOLD"))
    settings = AdapterSettings(env_include=tuple(others))
    assert for_workers({name: "hunter2"}, {name}, settings) == {}
    assert for_workers({name: "hunter2"}, {name}, AdapterSettings(env_include=(name,))) == {name: "hunter2"}


@given(
    environ=st.dictionaries(
        st.sampled_from(["VLLM_A", "VLLM_PORT", "HF_TOKEN", "PATH", "NCCL_DEBUG", "MY_A", "RANK", "MAX_JOBS"]),
        st.text(),
    ),
    exclude=st.lists(st.sampled_from(["VLLM_*", "HF_TOKEN", "*", "MY_A"])),
    include=st.lists(st.sampled_from(["VLLM_PORT", "HF_TOKEN", "*", "MY_*", "RANK"])),
    env=st.dictionaries(st.sampled_from(["VLLM_A", "MY_A", "NEW"]), st.text()),
)
def test_what_is_sent_is_what_was_decided(
    environ: dict[str, str], exclude: list[str], include: list[str], env: dict[str, str]
) -> None:
    settings = AdapterSettings(env=env, env_include=tuple(include), env_exclude=tuple(exclude))
    decisions = {each.name: each for each in decide(environ, ("MAX_JOBS",), settings)}
    assert decisions.keys() == environ.keys() | env.keys()
    sent = for_workers(environ, ("MAX_JOBS",), settings)
    assert sent.items() <= environ.items()
    assert sent.keys() | env.keys() == {name for name, each in decisions.items() if each.reaches}
    assert not sent.keys() & env.keys()
    assert not any(name.startswith(pattern.strip("*")) for name in sent for pattern in exclude)


def test_exclude_is_stronger_than_include_and_env_stronger_than_both() -> None:
    assert of("VLLM_A", env_exclude=("VLLM_A",)).why == "env_exclude has VLLM_A"
    assert not of("MY_A", env_include=("MY_A",), env_exclude=("MY_*",)).reaches
    assert of("MY_A", env={"MY_A": "2"}, env_exclude=("*",)).why == "given in env, which wins over a worker's own"
    assert of("MY_A", env_include=("MY_*",)).why == "env_include has MY_*"
    assert for_workers({"MY_A": "1"}, (), AdapterSettings(env={"MY_A": "2"})) == {}


def test_what_nothing_speaks_of_stays() -> None:
    decision = of("PATH")
    assert (decision.reaches, decision.touched) == (False, False)
    assert of("MAX_JOBS", registered=("MAX_JOBS",)).why == REGISTERED
    assert not of("MAX_JOBS").reaches


def test_no_line_of_the_rule_is_hidden_by_an_earlier_one() -> None:
    assert len({rule.pattern for rule in RULES}) == len(RULES)
    assert all(rule.reaches for rule in REACH)
    assert not any(rule.reaches for rule in STAY)
    for rule in RULES:
        example = rule.pattern.replace("[0-9]*", "8000").replace("*", "A")
        assert of(example).reaches is rule.reaches, rule
        assert secret_word(example) is None, rule


def test_the_names_of_an_installed_vllm_are_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "envs.py").write_text("environment_variables = {'MAX_JOBS': int, 'VLLM_PORT': str}")
    monkeypatch.syspath_prepend(tmp_path)
    assert registered_by_vllm() == ("MAX_JOBS", "VLLM_PORT")


def test_a_folder_called_vllm_is_not_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert registered_by_vllm() is None


# Of the 316 names that vLLM 0.32 registers, those that do not reach workers: a change of the rule that catches more of
# them, by a word that looks like a secret's for instance, is to be seen here.
KEPT_OF_VLLM_0_32 = {
    *("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "LOCAL_RANK"),
    *("MOONCAKE_PREFERRED_SEGMENT", "MOONCAKE_REQUESTER_LOCAL_HOSTNAME"),
    *("VLLM_DP_MASTER_IP", "VLLM_DP_MASTER_PORT", "VLLM_DP_RANK", "VLLM_DP_RANK_LOCAL", "VLLM_DP_SIZE"),
    *("VLLM_EC_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_P2P_SIDE_CHANNEL_HOST", "VLLM_HOST_IP"),
    *("VLLM_GPU_NIC_PCIE_MAPPING", "VLLM_NIC_SELECTION_VARS", "VLLM_PORT", "VLLM_RPC_BASE_PATH"),
    "VLLM_LOGGING_CONFIG_PATH",
    *("VLLM_RAY_BUNDLE_INDICES", "VLLM_RAY_DP_PACK_STRATEGY", "VLLM_RAY_DP_PLACEMENT_NODE_IPS"),
    *("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "VLLM_RAY_PER_WORKER_GPUS"),
}
SECRETS_OF_VLLM_0_32 = {"S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "VLLM_API_KEY"}


def test_the_names_of_vllm_0_32() -> None:
    names = (Path(__file__).parent / "vllm_0_32_names.txt").read_text().split()
    assert len(names) == 316
    decisions = decide(dict.fromkeys(names, "1"), names, AdapterSettings())
    assert {each.name for each in decisions if each.secret} == SECRETS_OF_VLLM_0_32
    assert {each.name for each in decisions if not each.reaches} == KEPT_OF_VLLM_0_32 | SECRETS_OF_VLLM_0_32


# ------------------------------------------------------------------------------------------------- docs/vllm.md

PAGE = Path(__file__).parent.parent / "docs/vllm.md"


def section(heading: str) -> str:
    return PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_pages_table_is_the_rule() -> None:
    said = {}
    for names, reach, why in rows(section("Which variables reach the workers")):
        assert reach in ("yes", "no")
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in said
            said[name] = (reach == "yes", why)
    assert said == {rule.pattern: (rule.reaches, rule.why) for rule in RULES}


def test_the_page_names_the_words_of_secrets() -> None:
    (line,) = re.findall(r"one of these words: ([^.]+)\.", section("Which variables reach the workers"))
    assert tuple(re.findall(r"`(\w+)`", line)) == SECRET_WORDS


def test_the_pages_settings_are_all_settings() -> None:
    names = [re.findall(r"`([^`]+)`", row[0]) for row in rows(section("Settings"))]
    assert [name for several in names for name in several] == list(AdapterSettings.__struct_fields__)


def test_the_pages_defaults_are_the_defaults() -> None:
    defaults = AdapterSettings()
    for names, _, default in rows(section("Settings")):
        for name in re.findall(r"`([^`]+)`", names):
            value = getattr(defaults, name)
            shown = "" if value in (None, (), {}) else value if isinstance(value, str) else json.dumps(value)
            assert default.strip("`") == shown.removesuffix(".0"), name

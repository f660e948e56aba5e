"""The adapter's settings: where they come from, what is refused and how it is said, who gets which workers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightvllm.adapters.vllm.settings import (
    AdapterSettings,
    Executor,
    first_pod_of_engine,
    load_settings,
    variable_of,
    workers_of_engine,
)
from lightvllm.errors import ConfigError


def load(ours: Any = None, environ: dict[str, str] | None = None, executor: Executor = "k8s") -> AdapterSettings:
    return load_settings({} if ours is None else {"lightvllm": ours}, environ or {}, executor)


def test_defaults() -> None:
    assert load() == AdapterSettings()
    assert load_settings(object(), {}, "ray") == AdapterSettings()
    assert load_settings({"another plugin's": 1}, {"PATH": "/bin"}, "k8s") == AdapterSettings()


K8S: dict[str, tuple[Any, str]] = {
    "k8s_workers": (["w0:50051", "w1:50051"], "w0:50051, w1:50051,"),
    "k8s_service": ("llm-headless.prod:50051", "llm-headless.prod:50051"),
    "k8s_pod_prefix": ("llm", "llm"),
    "k8s_gpus_per_pod": (8, "8"),
    "k8s_token_file": ("/run/token", "/run/token"),
    "k8s_tls_cert": ("/run/tls.crt", "/run/tls.crt"),
    "k8s_tls_key": ("/run/tls.key", "/run/tls.key"),
    "k8s_tls_ca": ("/run/ca.crt", "/run/ca.crt"),
    "k8s_transport": ("grpc", "grpc"),
}
RAY: dict[str, tuple[Any, str]] = {"ray_address": ("head:6379", "head:6379")}
BOTH: dict[str, tuple[Any, str]] = {
    "strategy": ("STRICT_PACK", "STRICT_PACK"),
    "start_timeout": (30, "30"),
    "rpc_timeout": (7200.5, "7200.5"),
    "shutdown_timeout": (1.5, "1.5"),
    "env": ({"A": "1", "B": "x=y"}, '{"A": "1", "B": "x=y"}'),
    "env_include": (["HF_TOKEN", "MY_*"], "HF_TOKEN,MY_*"),
    "env_exclude": (["VLLM_CACHE_ROOT"], "VLLM_CACHE_ROOT"),
    "show_worker_output": (False, "false"),
}


def test_these_are_all_fields() -> None:
    assert {**K8S, **RAY, **BOTH}.keys() == set(AdapterSettings.__struct_fields__)


@pytest.mark.parametrize(
    ("executor", "field"), [*(("k8s", field) for field in K8S | BOTH), *(("ray", field) for field in RAY | BOTH)]
)
def test_each_field_from_either_place(executor: Executor, field: str) -> None:
    value, text = (K8S | RAY | BOTH)[field]
    workers: dict[str, Any] = {}
    if field.startswith("k8s_") and field not in ("k8s_workers", "k8s_service"):
        workers = {"k8s_service": "llm"} if field == "k8s_pod_prefix" else {"k8s_workers": ["w:1"]}
    from_config = load({field: value, **workers}, executor=executor)
    expected = tuple(value) if isinstance(value, list) else value
    assert getattr(from_config, field) == expected != getattr(AdapterSettings(), field)
    assert load(workers, {variable_of(field): text}, executor=executor) == from_config


def test_the_configuration_wins_over_the_variable_field_by_field() -> None:
    environ = {"LIGHTVLLM_START_TIMEOUT": "1", "LIGHTVLLM_RPC_TIMEOUT": "2", "LIGHTVLLM_ENV": "A=1,B=2"}
    settings = load({"start_timeout": 9, "env": {"C": "3"}}, environ)
    assert (settings.start_timeout, settings.rpc_timeout, settings.env) == (9, 2, {"C": "3"})


def test_a_variable_set_to_nothing_is_not_set() -> None:
    assert load(environ={"LIGHTVLLM_START_TIMEOUT": " ", "LIGHTVLLM_K8S_WORKERS": ""}) == AdapterSettings()


@pytest.mark.parametrize(
    ("text", "env"),
    [("A=1, B=x=y ,", {"A": "1", "B": "x=y "}), ('{"A": "1,2"}', {"A": "1,2"}), ("A=", {"A": ""})],
)
def test_ways_to_write_variables_for_workers(text: str, env: dict[str, str]) -> None:
    assert load(environ={"LIGHTVLLM_ENV": text}).env == env


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("START_TIMEOUT", "soon", "a positive number of seconds"),
        ("START_TIMEOUT", "0", "a positive number of seconds"),
        ("RPC_TIMEOUT", "-1", "a positive number of seconds"),
        ("SHUTDOWN_TIMEOUT", "inf", "a positive number of seconds"),
        ("RPC_TIMEOUT", "nan", "a positive number of seconds"),
        ("K8S_GPUS_PER_POD", "0", "a whole number from 1"),
        ("K8S_GPUS_PER_POD", "1.5", "a whole number from 1"),
        ("K8S_TRANSPORT", "tcp", "auto, grpc or direct"),
        ("STRATEGY", "pack", "PACK, SPREAD, STRICT_PACK or STRICT_SPREAD"),
        ("SHOW_WORKER_OUTPUT", "maybe", "true or false"),
        ("ENV_INCLUDE", "A,*B", "variables' names or PREFIX*"),
        ("ENV_EXCLUDE", "A-B", "variables' names or PREFIX*"),
    ],
)
def test_a_wrong_variable_is_named_with_its_value(name: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(environ={f"LIGHTVLLM_{name}": text})
    assert str(error.value) == f"LIGHTVLLM_{name}={text!r}: expected {expected}"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("start_timeout", "30", "a positive number of seconds"),
        ("start_timeout", True, "a positive number of seconds"),
        ("k8s_workers", "w0:1,w1:1", "addresses 'host:port'"),
        ("k8s_workers", [""], "addresses 'host:port'"),
        ("k8s_gpus_per_pod", "8", "a whole number from 1"),
        ("k8s_service", "", "a Service's name"),
        ("k8s_pod_prefix", 1, "a StatefulSet's name"),
        ("k8s_token_file", "", "a file's path"),
        ("show_worker_output", 1, "true or false"),
    ],
)
def test_a_wrong_value_in_the_configuration(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load({field: value})
    assert str(error.value) == f"additional_config['lightvllm'][{field!r}]={value!r}: expected {expected}"


@pytest.mark.parametrize(
    "given",
    [
        {"environ": {"LIGHTVLLM_ENV": "hunter2"}},
        {"environ": {"LIGHTVLLM_ENV": '{"A": hunter2}'}},
        {"environ": {"LIGHTVLLM_ENV": '{"hunter2": 1}'}},
        {"environ": {"LIGHTVLLM_ENV": "hunter 2=1"}},
        {"ours": {"env": {"A": ["hunter2"]}}},
        {"ours": {"env": {"": "hunter2"}}},
    ],
)
def test_what_workers_are_given_is_never_shown(given: Any) -> None:
    with pytest.raises(ConfigError, match="expected variables and their values as ") as error:
        load(**given)
    assert "hunter" not in str(error.value)
    chained: BaseException | None = error.value.__cause__
    assert chained is None


def test_repr_hides_the_values() -> None:
    settings = AdapterSettings(env={"HF_TOKEN": "hunter2", "A": "1"}, k8s_workers=("w0:1",))
    assert "hunter2" not in repr(settings) + str(settings)
    assert "env={'HF_TOKEN': …, 'A': …}" in repr(settings)
    assert "k8s_workers=('w0:1',)" in repr(settings)


def test_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"\['lightvllm'\] holds 'k8s_worker', which is unknown; use k8s_workers"):
        load({"k8s_worker": ["w0:1"]})
    with pytest.raises(ConfigError, match=r"holds 'zebra', which is unknown; use one of k8s_workers, .*env_include"):
        load({"zebra": 1})
    with pytest.raises(ConfigError, match="is of type list; expected an object"):
        load(["k8s_workers"])


@pytest.mark.parametrize(
    ("executor", "ours", "environ", "said"),
    [
        (
            "ray",
            None,
            {"LIGHTVLLM_K8S_WORKERS": "w0:1"},
            (
                "LIGHTVLLM_K8S_WORKERS is given, which is for KubernetesExecutor, but vLLM uses RayExecutor; "
                "leave it out, or use --distributed-executor-backend lightvllm.adapters.vllm.KubernetesExecutor"
            ),
        ),
        (
            "k8s",
            {"ray_address": "auto"},
            None,
            (
                "additional_config['lightvllm']['ray_address'] is given, which is for RayExecutor, but vLLM uses "
                "KubernetesExecutor; leave it out, or use --distributed-executor-backend "
                "lightvllm.adapters.vllm.RayExecutor"
            ),
        ),
    ],
)
def test_the_other_executors_settings(executor: Executor, ours: Any, environ: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(ours, environ, executor)
    assert str(error.value) == said


NOT_FOR_WORKERS = ("k8s_workers", "k8s_service", "k8s_pod_prefix", "k8s_transport")


@pytest.mark.parametrize("field", [field for field in K8S if field not in NOT_FOR_WORKERS])
def test_what_is_for_workers_that_are_not_named(field: str) -> None:
    value, text = K8S[field]
    said = (
        "is for k8s_workers or k8s_service, neither of which is given; name the workers in LIGHTVLLM_K8S_WORKERS or "
        "LIGHTVLLM_K8S_SERVICE, or leave it out"
    )
    with pytest.raises(ConfigError) as error:
        load({field: value})
    assert str(error.value) == f"additional_config['lightvllm'][{field!r}] {said}"
    with pytest.raises(ConfigError) as error:
        load(environ={variable_of(field): text})
    assert str(error.value) == f"{variable_of(field)} {said}"


def test_one_way_to_name_workers() -> None:
    environ = {"LIGHTVLLM_K8S_SERVICE": "llm"}
    said = r"^additional_config\['lightvllm'\]\['k8s_workers'\] and LIGHTVLLM_K8S_SERVICE are both given; keep one$"
    with pytest.raises(ConfigError, match=said):
        load({"k8s_workers": ["w:1"]}, environ)
    said = r"^LIGHTVLLM_K8S_POD_PREFIX is for k8s_service, which is not given; leave it out$"
    with pytest.raises(ConfigError, match=said):
        load(environ={"LIGHTVLLM_K8S_POD_PREFIX": "llm"})
    settings = load({"k8s_gpus_per_pod": 4, "k8s_token_file": "t"}, environ)
    assert (settings.k8s_service, settings.k8s_gpus_per_pod) == ("llm", 4)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LIGHTVLLM_K8S_WORKER", "LIGHTVLLM_K8S_WORKERS"),
        ("LIGHTVLLM_WORKERS", "LIGHTVLLM_K8S_WORKERS"),
        ("LIGHTVLLM_TOKEN_FILE", "LIGHTVLLM_K8S_TOKEN_FILE"),
        ("LIGHTVLLM_START_TIME_OUT", "LIGHTVLLM_START_TIMEOUT"),
    ],
)
def test_a_near_miss_is_warned_of(name: str, meant: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(environ={name: "1"}) == AdapterSettings()
    assert [record.getMessage() for record in caplog.records] == [
        f"the variable {name} sets nothing; did you mean {meant}?"
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("LIGHTVLLM_API_KEY", "LIGHTVLLM_CACHE", "LIGHTVLLM_DEBUG", "LIGHTVLLM_HOST_IP", "LIGHTVLLM_LOG"),
        *("LIGHTVLLM_SERVICE_HOST", "LIGHTVLLM_PORT", "LIGHTVLLM_K8S_WORKERS_SERVICE_PORT_GRPC"),
        *("LIGHTVLLM_K8S_WORKERS_PORT_50051_TCP_ADDR", "VLLM_K8S_WORKERS", "LIGHTVLLM_SOMETHING_ELSE"),
    ],
)
def test_other_variables_are_left_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load(environ={name: "1"}) == AdapterSettings()
    assert not caplog.records


# ------------------------------------------------------------------------------------------ data-parallel engines


def names(count: int) -> tuple[str, ...]:
    return tuple(f"w{i}:1" for i in range(count))


def test_one_engine_takes_the_first_workers() -> None:
    assert workers_of_engine(names(3), 2, 0, None, 1, 1) == ("w0:1", "w1:1")
    assert workers_of_engine((), 2, 0, None, 1, 1) == ()
    assert workers_of_engine(names(2), 3, 0, 0, 1, 1, gpus_per_pod=2) == ("w0:1", "w1:1")
    assert workers_of_engine(names(2), 2, 0, 0, 1, 1, gpus_per_pod=8) == ("w0:1",)


def test_pods_of_one_engine_follow_those_of_another() -> None:
    assert [first_pod_of_engine(2, engine, 1) for engine in range(3)] == [0, 2, 4]
    assert [first_pod_of_engine(8, engine, 4) for engine in range(3)] == [0, 2, 4]


@given(
    hosts=st.integers(1, 3),
    on_host=st.integers(1, 4),
    pods=st.integers(1, 3),
    gpus_per_pod=st.integers(1, 4),
    dense=st.booleans(),
)
def test_no_two_engines_share_an_address(hosts: int, on_host: int, pods: int, gpus_per_pod: int, dense: bool) -> None:
    """For each way to write the list, and whether or not vLLM tells the engines how many they are."""
    engines, world_size = hosts * on_host, pods * gpus_per_pod

    def dealt(everything: bool) -> list[tuple[str, ...]]:
        groups = []
        for rank in range(engines):
            host = rank // on_host
            every = names(engines * pods)
            listed = every if everything else every[host * on_host * pods : (host + 1) * on_host * pods]
            sizes = (1, 1) if dense else (engines, on_host)
            groups.append(workers_of_engine(listed, world_size, rank, rank % on_host, *sizes, gpus_per_pod))
        return groups

    in_order = [names(engines * pods)[i * pods : (i + 1) * pods] for i in range(engines)]
    assert dealt(everything=True) == in_order
    assert dealt(everything=False) == in_order


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            (names(1), 2, 0, None, 1, 1),
            "k8s_workers names 1 address, this layout needs 2 workers; start more with: lightvllm worker",
        ),
        (
            (names(3), 2, 0, 0, 4, 2),
            (
                "k8s_workers names 3 addresses; with 2 for each engine, name 8 workers for all 4 data-parallel "
                "engines, or 4 for the 2 on this host"
            ),
        ),
        (
            (names(3), 1, 1, 1, 2, 2, 2),
            (
                "k8s_workers names 3 addresses with 2 workers each; with 1 for each engine, name 2 workers for all 2 "
                "data-parallel engines"
            ),
        ),
        (
            (names(1), 1, 1, 1, 1, 1),
            (
                "k8s_workers names 1 address, but data-parallel engine 1 needs 1 of its own; name 1 for every engine, "
                "of all hosts or of this one"
            ),
        ),
        (
            (names(1), 1, 0, 0, 2, 2, 2),
            (
                "k8s_gpus_per_pod=2 does not divide the 1 workers of one data-parallel engine, so that two engines "
                "would share an address; start fewer workers for each address"
            ),
        ),
    ],
)
def test_lists_that_fit_no_engines(given: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        workers_of_engine(*given)
    assert str(error.value) == said

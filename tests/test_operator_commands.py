"""The options with which a pod starts our own commands are ones that they have."""

from __future__ import annotations

import re
from typing import Any

import pytest
from operator_objects import Objects, inference
from typer.main import get_command

import lightvllm.adapters.vllm as adapters
from lightvllm.adapters.vllm.settings import load_settings
from lightvllm.cli.main import app
from lightvllm.operator.planner import scripts

FULL: dict[str, Any] = {
    "tensorParallelSize": 2,
    "pipelineParallelSize": 2,
    "maxModelLen": 512,
    "maxNumSeqs": 4,
    "gpuResource": "",
    "tls": {"secretName": "t"},
}


def options(command: str) -> set[str]:
    return {name for parameter in get_command(app).commands[command].params for name in parameter.opts}  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", [{}, FULL], ids=["one pod", "all"])
def test_lightvllm_serve_and_worker_have_the_options(spec: dict[str, Any]) -> None:
    words = Objects(inference(**spec)).words
    serve = words[words.index("serve") + 1 :]
    assert {word.partition("=")[0] for word in serve[1:]} <= options("serve")
    if spec:
        script = next(word for word in words if "lightvllm worker" in word)
        worker = script[: script.index("&\n")]
        assert set(re.findall(r"--[a-z-]+", worker)) <= options("worker")


def test_vllm_finds_the_workers_by_settings_that_our_executor_takes() -> None:
    objects = Objects(inference(**FULL, engine={"name": "vllm"}))
    environ = {name: value for name, value in objects.env.items() if isinstance(value, str)}
    settings = load_settings(None, environ, "k8s")
    assert settings.k8s_service == "llama-0-headless:50051"
    assert settings.k8s_gpus_per_pod == 2
    assert settings.start_timeout == 1800
    (executor,) = [word for word in objects.words if word.startswith("--distributed-executor-backend=")]
    assert executor.rpartition(".")[2] in adapters.__all__


def test_files_that_are_named_are_mounted() -> None:
    for spec in (FULL, {**FULL, "engine": {"name": "vllm"}}):
        objects = Objects(inference(**spec))
        text = " ".join([*objects.words, *(value for value in objects.env.values() if isinstance(value, str))])
        files = re.findall(r"(/(?:etc/lightvllm|tls)[\w/.-]*)", text)
        assert len(files) >= 10
        assert {file.rpartition("/")[0] for file in files} <= set(objects.mounts)


def test_sglangs_other_nodes_are_asked_without_tls_which_they_do_not_have() -> None:
    sglang = {"engine": {"name": "sglang", "image": "s"}, "tls": {"secretName": "t"}}
    assert Objects(inference(**sglang)).container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    several = Objects(inference(**sglang, tensorParallelSize=2, gpusPerPod=1)).container
    expected = scripts.ask("/health", tls=True, workers=1, worker_port=8000)  # beyond the port, the leader alone
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert several[probe]["exec"]["command"] == expected


def test_sglang_is_started_as_images_for_leaderworkerset_expect() -> None:
    objects = Objects(inference(engine={"name": "sglang", "image": "s"}, tensorParallelSize=2, gpusPerPod=1))
    assert {
        "--tp=2",
        "--dist-init-addr=$(LWS_LEADER_ADDRESS):20000",
        "--nnodes=$(LWS_GROUP_SIZE)",
        "--node-rank=$(LWS_WORKER_INDEX)",
    } <= set(objects.words)
    order = [each["name"] for each in objects.container["env"]]
    assert order[:3] == ["LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"]
    assert objects.env["LWS_LEADER_ADDRESS"] == "llama-0-0.llama-0-headless"
    assert objects.env["LWS_GROUP_SIZE"] == "2"
    path = objects.env["LWS_WORKER_INDEX"]["fieldRef"]["fieldPath"]
    assert path == "metadata.labels['apps.kubernetes.io/pod-index']"

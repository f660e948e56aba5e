"""manifests/samples/vllm.yaml names what there is, and its numbers agree with each other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import lightvllm.adapters.vllm as adapters
from lightvllm.adapters.vllm.settings import load_settings
from lightvllm.backends.k8s.names import PORT_NAME, ServiceName
from lightvllm.cli.main import app

SAMPLE = Path(__file__).parent.parent / "manifests/samples/vllm.yaml"


@pytest.fixture(scope="module")
def objects() -> dict[tuple[str, str], Any]:
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(SAMPLE.read_text())}


@pytest.fixture(scope="module")
def container(objects: dict[tuple[str, str], Any]) -> Any:
    (container,) = objects["StatefulSet", "llm"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_script_is_a_shells_and_its_options_are_there(container: Any) -> None:
    (script,) = container["args"]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    worker = script[script.index("lightvllm worker") : script.index("&\n")]
    options = {name for parameter in get_command(app).commands["worker"].params for name in parameter.opts}  # type: ignore[attr-defined]
    assert set(re.findall(r"--[a-z-]+", worker)) <= options
    (name,) = re.findall(r"lightvllm\.adapters\.vllm\.(\w+)", script)
    assert name in adapters.__all__


def test_its_workers_are_as_many_as_the_layout_needs(objects: dict[tuple[str, str], Any], container: Any) -> None:
    (script,) = container["args"]
    number = {name: int(value) for name, value in re.findall(r"--(\S+) (\d+)\b", script)}
    environ = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    settings = load_settings(None, environ, "k8s")
    spec = objects["StatefulSet", "llm"]["spec"]
    assert settings.k8s_gpus_per_pod == number["workers"] == container["resources"]["limits"]["nvidia.com/gpu"]
    world = number["tensor-parallel-size"] * number["pipeline-parallel-size"]
    assert spec["replicas"] * settings.k8s_gpus_per_pod == world


def test_its_names_lead_to_each_other(objects: dict[tuple[str, str], Any], container: Any) -> None:
    spec = objects["StatefulSet", "llm"]["spec"]
    service = objects["Service", spec["serviceName"]]
    pods = [f"llm-{index}.{spec['serviceName']}" for index in range(spec["replicas"])]
    environ = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    named = ServiceName.parse(environ["LIGHTVLLM_K8S_SERVICE"])
    (port,) = service["spec"]["ports"]
    assert (named.text, named.port) == (spec["serviceName"], port["port"])
    assert port["name"] == PORT_NAME, "what the SRV records are found by"
    assert named.default_pod_prefix == "llm"
    assert service["spec"]["publishNotReadyAddresses"] is True
    text = SAMPLE.read_text()
    assert f"--workers {'+'.join(pods)}\n" in text
    mounted = {volume["name"]: volume["secret"]["secretName"] for volume in spec["template"]["spec"]["volumes"][:2]}
    for mount in container["volumeMounts"][:2]:
        assert f"generic {mounted[mount['name']]} " in text
        assert mount["mountPath"] in (*environ["LIGHTVLLM_K8S_TOKEN_FILE"].rsplit("/", 1), "/workers")
    labels = spec["template"]["metadata"]["labels"]
    for each in objects.values():
        if each["kind"] == "Service":
            assert labels.items() >= {k: v for k, v in each["spec"]["selector"].items() if "pod-index" not in k}.items()

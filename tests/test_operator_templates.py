"""The catalogue: each template is an LLMInference that can be planned, and fits what it is for."""

from __future__ import annotations

import re

import pytest

from lightvllm.errors import ConfigError
from lightvllm.model_config import SUPPORTED_ARCHITECTURES
from lightvllm.operator import memory, templates, text
from lightvllm.operator.planner import plan
from lightvllm.operator.planner.layout import Layout
from lightvllm.operator.templates import TEMPLATES, Template
from lightvllm.operator.types import LLMInference

each = pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)


def inference(template: Template) -> LLMInference:
    document = template.document()
    document["spec"]["allowUnauthenticated"] = True
    return text.check(document, template.name)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (templates.SMOLLM2_135M, 134_515_008),
        (templates.LLAMA_31_8B, 8_030_261_248),
        (templates.LLAMA_33_70B, 70_553_706_496),
        (templates.QWEN3_8B, 8_190_735_360),
        (templates.QWEN3_32B, 32_762_123_264),
        (templates.MISTRAL_7B, 7_248_023_552),
        (templates.MISTRAL_SMALL_24B, 23_572_403_200),
    ],
    ids=lambda value: getattr(value, "path", None),
)
def test_parameters_are_those_of_the_published_checkpoints(config: templates.ModelConfig, published: int) -> None:
    assert memory.parameters(config) == published


@each
def test_it_can_be_planned(template: Template) -> None:
    checked = inference(template)
    made = plan(checked)
    assert not made.left_out
    (group,) = [found for found in made.objects if found["kind"] == "StatefulSet"]
    assert group["spec"]["replicas"] == Layout.of(checked.spec).pods
    words = " ".join(group["spec"]["template"]["spec"]["containers"][0].get("args", []))
    words += " ".join(group["spec"]["template"]["spec"]["containers"][0]["command"])
    assert f"--max-model-len={template.spec['maxModelLen']}" in words


@each
def test_it_fits_with_room_for_several_sequences(template: Template) -> None:
    found = template.fit()
    spec = inference(template).spec
    assert (found.tensor, found.pipeline) == (spec.tensor_parallel_size, spec.pipeline_parallel_size)
    assert found.model.max_model_len == spec.max_model_len
    assert spec.max_model_len <= template.config.max_position_embeddings
    assert found.max_num_seqs == spec.max_num_seqs
    memory.check(found)
    assert found.sequences >= 2


@each
def test_its_engine_runs_the_model(template: Template) -> None:
    engine = inference(template).spec.engine.name
    assert engine == "vllm" or (engine == "lightvllm" and template.config.architecture in SUPPORTED_ARCHITECTURES)


@each
def test_its_name_says_its_layout_and_its_secrets_are_named(template: Template) -> None:
    spec = inference(template).spec
    parts = re.findall(r"-(tp|pp)(\d+)", template.name)
    assert dict.fromkeys(("tp", "pp"), "1") | dict(parts) == {
        "tp": str(spec.tensor_parallel_size),
        "pp": str(spec.pipeline_parallel_size),
    }
    asks_for_a_token = any(source.secret_ref is not None for source in spec.env_from)
    assert asks_for_a_token == any("HF_TOKEN" in note for note in template.notes)


def test_roce_is_in_its_pods() -> None:
    checked = inference(TEMPLATES["llama-3.3-70b-tp4-pp2-roce"])
    (group,) = [found for found in plan(checked).objects if found["kind"] == "StatefulSet"]
    pod = group["spec"]["template"]
    assert pod["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "roce"
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"]["rdma/hca"] == 1
    assert {"name": "NCCL_IB_GID_INDEX", "value": "3"} in container["env"]


def test_the_pod_of_the_cpu_has_the_memory_that_is_reckoned_with() -> None:
    template = TEMPLATES["smollm2-135m-cpu"]
    resources = inference(template).spec.pod.resources
    assert resources.limits == {"memory": f"{template.device.memory // memory.GIB}Gi"}
    assert f"--kv-cache-memory={template.device.cache_limit}" in inference(template).spec.engine.args
    (share,) = template.fit().shares
    assert share.cache == template.device.cache_limit


def test_documents_are_not_shared() -> None:
    template = TEMPLATES["llama-3.1-8b"]
    template.document()["spec"]["pod"]["resources"]["requests"]["cpu"] = 99
    assert template.document()["spec"]["pod"]["resources"]["requests"]["cpu"] == 4


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"no template 'llama'; use one of smollm2-135m-cpu, .*mistral-small-24b$"):
        templates.get("llama")

"""From KubeRay's manifests to LLMInferences: what is carried over, what is named, and that nothing else happens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightvllm.errors import ConfigError
from lightvllm.operator import text
from lightvllm.operator.convert import Converted, Settings, convert
from lightvllm.operator.planner import plan

MANIFESTS = sorted((Path(__file__).parent / "ray_manifests").glob("*.yaml"))
FOLDER = Path(__file__).parent / "ray_manifests"
WORKERS = ("spec", "workerGroupSpecs", 0)
HEAD = ("spec", "headGroupSpec")
CONTAINER = ("template", "spec", "containers", 0)


def load(name: str) -> dict[str, Any]:
    """The Ray object of a test manifest."""
    document: dict[str, Any] = next(yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()))
    return document


def at(value: Any, *path: str | int) -> Any:
    for part in path:
        value = value[part]
    return value


def converted(document: dict[str, Any], **settings: Any) -> Converted:
    (one,) = convert(text.dump([document]), "x.yaml", Settings(**settings))
    return one


def spec(document: dict[str, Any], **settings: Any) -> dict[str, Any]:
    (made,) = converted(document, **settings).documents
    found: dict[str, Any] = made["spec"]
    return found


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        converted(document)
    assert "\n" not in str(error.value)
    return str(error.value)


def notes(one: Converted, kind: str) -> dict[str, str]:
    return {note.path: note.why for note in one.notes if note.kind == kind}


def command(script: str, env: list[dict[str, Any]] | None = None, gpus: int = 1) -> dict[str, Any]:
    """A RayCluster whose head runs ``script``."""
    container = {
        "name": "head",
        "image": "x",
        "args": [script],
        "env": env or [],
        "resources": {"limits": {"nvidia.com/gpu": gpus}},
    }
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "x"},
        "spec": {"headGroupSpec": head},
    }


def serving(**config: Any) -> dict[str, Any]:
    """The RayService of the test manifests with fields of its only model replaced."""
    document = load("serve-llm")
    serve = yaml.safe_load(document["spec"]["serveConfigV2"])
    at(serve, "applications", 0, "args", "llm_configs", 0).update(config)
    document["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
    return document


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_comes_out_is_valid_and_can_be_planned(path: Path) -> None:
    for one in convert(path.read_text(), path.name, Settings()):
        for document in one.documents:
            inference = text.check(yaml.safe_load(text.dump([document])), "the output")
            sets = [each for each in plan(inference).objects if each["kind"] == "StatefulSet"]
            assert len(sets) == inference.spec.replicas


def mappings(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all objects in it."""
    if isinstance(value, dict):
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield from mappings(each, (*path, key))


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, (*path, key))
    elif path:
        yield path, value


def outcome(document: dict[str, Any]) -> Converted | str:
    """What it becomes, or why it is refused."""
    try:
        return converted(document)
    except ConfigError as error:
        return str(error)


def with_serve(document: dict[str, Any], serve: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    if serve is not None:
        document["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
    return document


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_field_that_nobody_knows_is_never_dropped_without_a_word(path: Path) -> None:
    """Put into every object of the input, also those inside serveConfigV2, one at a time."""
    document = next(yaml.safe_load_all(path.read_text()))
    embedded = document["spec"].get("serveConfigV2")
    serve = None if embedded is None else yaml.safe_load(embedded)
    cases = 0
    for inside, tree in ((False, document), (True, serve)):
        for place in mappings(tree):
            changed = copy.deepcopy(tree)
            at(changed, *place)["zzUnknown"] = "zz-value"
            whole = with_serve(document, changed) if inside else changed
            one = outcome(whole)
            if isinstance(one, str):
                assert "zz" in one, place
                continue
            parts = ["spec", "serveConfigV2", *place] if inside else [*place]
            named = any(note.path.endswith("zzUnknown") for note in one.notes) or any(
                covers(note.path, parts) for note in one.notes
            )
            assert (
                named or "zz-value" in text.dump(one.documents) or "--zzUnknown=zz-value" in text.dump(one.documents)
            ), f"{place} is neither carried over nor named"
            cases += 1
    assert cases > 10


SAYS_NOTHING = ("name", "groupName", "medium", "minReplicas", "maxReplicas", "kind", "apiVersion", "import_path")
"""Names of parts, and numbers that only bound what there may be; what they must be is checked elsewhere."""


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_value_counts(path: Path) -> None:
    """Each leaf is changed: then something else comes out, or it is refused, or a note says that it is of no use."""
    document = next(yaml.safe_load_all(path.read_text()))
    embedded = document["spec"].get("serveConfigV2")
    before = converted(document)
    ignored = []
    for inside, tree in ((False, document), (True, None if embedded is None else yaml.safe_load(embedded))):
        for place, value in leaves(tree):
            changed = copy.deepcopy(tree)
            at(changed, *place[:-1])[place[-1]] = not value if isinstance(value, bool) else f"{value}7"
            parts = ["spec", "serveConfigV2", *place] if inside else [*place]
            if place[-1] in SAYS_NOTHING or any(
                covers(note.path, parts) for note in before.notes if note.kind != "check"
            ):
                continue
            if outcome(with_serve(document, changed) if inside else changed) == before:
                ignored.append(".".join(map(str, parts)))
    assert not ignored, ignored


def covers(note: str, parts: list[str | int]) -> bool:
    from lightvllm.operator.convert.tracked import joined

    return any(joined(tuple(parts[:length])) == note for length in range(2, len(parts) + 1))


def test_ray_serve_llm() -> None:
    found = spec(load("serve-llm"))
    assert found["model"] == "Qwen/Qwen2.5-72B-Instruct"
    assert found["servedModelName"] == "qwen-72b"
    assert (found["tensorParallelSize"], found["pipelineParallelSize"], found["maxModelLen"]) == (4, 2, 16384)
    assert "gpusPerPod" not in found  # 4, as many as tensorParallelSize says
    assert found["engine"]["args"] == [
        "--gpu-memory-utilization=0.9",
        "--no-enable-prefix-caching",
        "--trust-remote-code",
        '--compilation-config={"mode": 3}',
    ]
    assert found["network"] == {
        "nccl": {"NCCL_IB_GID_INDEX": "3"},
        "annotations": {"k8s.v1.cni.cncf.io/networks": "roce-0,roce-1"},
        "shmSize": "32Gi",
    }
    assert found["pod"]["resources"]["limits"] == {"cpu": 32, "memory": "256Gi", "rdma/hca": 1}
    assert found["pod"]["annotations"] == {"example.com/owner": "search"}
    assert found["envFrom"] == [{"secretRef": {"name": "proxies"}}]
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    assert token in found["env"]
    assert {"name": "HF_HOME", "value": "/home/ray/.cache/huggingface"} in found["env"]


def test_other_documents_are_named_and_no_value_is_printed() -> None:
    (one,) = convert((FOLDER / "serve-llm.yaml").read_text(), "x", Settings())
    assert notes(one, "check")["Secret hf"].startswith("is not Ray's")
    assert "not-a-real-one" not in str(one)


def test_autoscaling_becomes_a_number_or_with_prometheus_autoscaling() -> None:
    one = converted(load("serve-llm"))
    assert one.documents[0]["spec"]["replicas"] == 1
    assert any("1 to 3 replicas by demand" in why for why in notes(one, "lost").values())
    assert spec(load("serve-llm"), prometheus="http://p:9090")["autoscaling"] == {
        "minReplicas": 1,
        "maxReplicas": 3,
        "prometheusAddress": "http://p:9090",
        "targetPending": 24,
    }


def test_as_many_at_least_as_at_most_are_replicas() -> None:
    document = serving(deployment_config={"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}})
    assert spec(document, prometheus="http://p:9090")["replicas"] == 2
    assert "autoscaling" not in spec(document, prometheus="http://p:9090")


def test_several_models_are_several_objects() -> None:
    document = load("serve-llm")
    serve = yaml.safe_load(document["spec"]["serveConfigV2"])
    configs = serve["applications"][0]["args"]["llm_configs"]
    configs.append({"model_loading_config": {"model_id": "Org/Small_1"}})
    document["spec"]["serveConfigV2"] = serve  # KubeRay has text here; an object is understood, too
    made = converted(document).documents
    assert [each["metadata"]["name"] for each in made] == ["chat-qwen-72b", "chat-org-small-1"]
    assert made[1]["spec"]["model"] == "Org/Small_1"


def test_a_program_of_ones_own_with_its_model_in_variables() -> None:
    one = converted(load("own-program"))
    found = one.documents[0]["spec"]
    assert (found["model"], found["tensorParallelSize"], found["replicas"]) == (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        2,
        2,
    )
    assert [each["name"] for each in found["env"]] == ["HF_TOKEN"]
    lost = notes(one, "lost")
    assert {path.rpartition(".")[2] for path in lost} == {"working_dir", "pip"}


def test_a_cluster_whose_head_serves_from_a_volume() -> None:
    one = converted(load("cluster"))
    found = one.documents[0]["spec"]
    assert (found["model"], found["servedModelName"]) == ("deepseek/r1", "r1")
    assert found["modelSource"] == {"claimName": "weights", "mountPath": "/weights"}
    assert (found["tensorParallelSize"], found["pipelineParallelSize"], found["maxModelLen"]) == (8, 2, 65536)
    assert found["apiKey"] == {"name": "keys", "key": "r1"}
    assert found["network"]["nccl"] == {"NCCL_DEBUG": "WARN"}
    assert '--override-generation-config={"temperature": 0.6}' in found["engine"]["args"]
    assert "volumes" not in found["pod"]
    assert any("--port: the API is at port 8000" in note.why for note in one.notes)
    assert any("command tee" in note.why for note in one.notes)


def test_a_job() -> None:
    one = converted(load("job"))
    found = one.documents[0]["spec"]
    assert (found["model"], found["maxNumSeqs"], found["gpuResource"]) == (
        "mistralai/Mistral-7B-Instruct-v0.3",
        64,
        "amd.com/gpu",
    )
    assert found["engine"] == {
        "name": "vllm",
        "image": "vllm/vllm-openai:v0.32.0",
        "imagePullPolicy": "Always",
        "args": ["-O3"],
    }
    assert found["env"] == [{"name": "VLLM_USE_V1", "value": "1"}]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("vllm serve org/m", {"model": "org/m"}),
        ("exec /opt/bin/vllm serve org/m -tp 2", {"model": "org/m", "tensorParallelSize": 2}),
        ("python3 -m vllm.entrypoints.openai.api_server --model=org/m", {"model": "org/m"}),
        ("vllm serve --dtype half org/m", {"model": "org/m"}),
        ("A=1 vllm serve 'org/m' --max-model-len=8k", {"model": "org/m"}),
        ("ray symmetric-run --num-gpus 2 -- vllm serve $(M)", {"model": "of-env"}),
        ("M=org/own; vllm serve ${M}", {"model": "org/own"}),
        ("vllm serve ${NONE:-org/m} # ' unused", {"model": "org/m"}),
    ],
)
def test_commands(script: str, expected: dict[str, Any]) -> None:
    found = spec(command(script, [{"name": "M", "value": "of-env"}], gpus=2))
    assert expected.items() <= found.items()


def test_a_length_that_is_no_number_is_passed_on() -> None:
    assert spec(command("vllm serve m --max-model-len -1"))["engine"]["args"] == ["--max-model-len=-1"]


def test_an_option_whose_value_is_unknown_is_named() -> None:
    one = converted(command("vllm serve m --seed $(date +%s) --dtype half"))
    assert one.documents[0]["spec"]["engine"]["args"] == ["--dtype=half"]
    assert any(note.kind == "lost" and note.why.startswith("--seed") for note in one.notes)


def test_a_key_on_the_command_line_is_not_carried_and_not_printed() -> None:
    one = converted(command("vllm serve m --api-key sk-very-secret"))
    assert "sk-very-secret" not in str(one)
    assert any("--api-key-secret" in why for why in notes(one, "lost").values())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("ray start --head --block", "runs no vLLM: neither command nor args"),
        ("vllm serve $MODEL", "the model is '$MODEL', whose value the manifest does not tell; write it out"),
        ("vllm serve m -tp $TP", "--tensor-parallel-size is '$TP', whose value the manifest does not tell"),
        ("vllm serve m -tp two", "tensor-parallel-size is 'two', expected a whole number from 1"),
        ("vllm serve m -tp", "--tensor-parallel-size has no value"),
        ("vllm serve 'm", "no shell command that could be read: No closing quotation"),
        ("vllm serve m & vllm serve n", "runs vLLM more than once; expected one server"),
        ("vllm serve --enforce-eager m", "vLLM is run without a model that could be read"),
        ("echo 'vllm serve m'", "does not run vllm serve"),
        ("vllm serve m -tp 8 -pp 2", "tensorParallelSize 8 × pipelineParallelSize 2 needs 16 GPUs, the cluster has 1"),
    ],
)
def test_commands_that_cannot_be_understood(script: str, message: str) -> None:
    assert message in refused(command(script))


def test_gpus_that_do_not_fill_pods() -> None:
    document = load("cluster")
    for group in (at(document, *HEAD), at(document, *WORKERS)):
        at(group, *CONTAINER)["resources"]["limits"]["nvidia.com/gpu"] = 6
    at(document, *WORKERS)["replicas"] = 4
    assert "does not fit pods of 6 GPUs: these must be a divisor of 8, or 8 times a divisor of 2" in refused(document)


@pytest.mark.parametrize(("gpus", "pods", "expected"), [(4, 3, 4), (16, 0, 16), (8, 1, None)])
def test_gpus_per_pod(gpus: int, pods: int, expected: int | None) -> None:
    document = load("cluster")  # 8 × 2 workers
    for group in (at(document, *HEAD), at(document, *WORKERS)):
        at(group, *CONTAINER)["resources"]["limits"]["nvidia.com/gpu"] = gpus
    at(document, *WORKERS)["replicas"] = pods
    assert spec(document).get("gpusPerPod") == expected


def test_gpus_that_are_left_over_are_named() -> None:
    one = converted(command("vllm serve m -tp 2", gpus=8))
    assert "had 8 GPUs, of which the replicas use 2" in notes(one, "check")["spec"]
    assert "gpusPerPod" not in one.documents[0]["spec"]


def test_without_gpus_the_cpu_computes() -> None:
    assert spec(command("vllm serve m", gpus=0))["gpuResource"] == ""


def test_nothing_is_left_to_look_at_where_all_is_said() -> None:
    one = converted(command("vllm serve m"), image="y", unauthenticated=True)
    assert one.is_complete
    assert one.documents[0]["spec"] == {
        "model": "m",
        "engine": {"name": "vllm", "image": "y"},
        "allowUnauthenticated": True,
    }


def test_what_differs_between_head_and_workers_is_named() -> None:
    document = load("cluster")
    at(document, *HEAD, "template", "spec")["nodeSelector"] = {"zone": "a"}
    at(document, *HEAD, *CONTAINER)["env"].append({"name": "SAME", "value": "head"})
    at(document, *WORKERS, *CONTAINER)["env"] = [{"name": "SAME", "value": "worker"}]
    one = converted(document)
    lost = notes(one, "lost")
    assert lost["spec.headGroupSpec.template.spec.nodeSelector"].startswith("all pods of a group have one template")
    assert "wins" in lost["spec.workerGroupSpecs[0].template.spec.containers[0].env[0]"]
    assert {"name": "SAME", "value": "head"} in one.documents[0]["spec"]["env"]  # vLLM was run by the head


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_loading_config": {}}, "llm_configs[0] has no model_loading_config.model_id"),
        ({"llm_engine": "SGLang"}, "llm_engine is 'SGLang', expected vLLM"),
        ({"engine_kwargs": {"tensor_parallel_size": 0}}, "tensor-parallel-size is '0', expected a whole number from 1"),
        ({"engine_kwargs": {"tensor_parallel_size": 64}}, "needs 64 GPUs, the cluster has 24"),
        ({"deployment_config": {"num_replicas": "many"}}, "num_replicas is 'many', expected a whole number from 0"),
        ({"engine_kwargs": ["x"]}, "engine_kwargs is a list, expected an object"),
    ],
)
def test_models_that_cannot_be_understood(config: dict[str, Any], message: str) -> None:
    assert message in refused(serving(**config))


def test_a_file_with_a_model_is_not_part_of_the_manifest() -> None:
    document = load("serve-llm")
    serve = yaml.safe_load(document["spec"]["serveConfigV2"])
    serve["applications"][0]["args"]["llm_configs"] = ["models/a.yaml"]
    document["spec"]["serveConfigV2"] = yaml.safe_dump(serve)
    assert "names the file 'models/a.yaml', which is not part of the manifest" in refused(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "x.yaml, line 1: no YAML"),
        ("", "x.yaml holds nothing; expected a RayService, RayCluster or RayJob of ray.io/v1"),
        ("kind: Pod", "x.yaml holds Pod; expected a RayService"),
        ("- 1", "x.yaml holds a list; expected objects of Kubernetes"),
        ("{apiVersion: ray.io/v1, kind: RayCronJob}", "RayCronJob without a name: cannot be converted"),
        ("{apiVersion: ray.io/v1, kind: RayCluster, spec: x}", "spec is a str, expected an object"),
        ("{apiVersion: ray.io/v1, kind: RayCluster, spec: {a: 1}}", "has no group with a container"),
        ("{apiVersion: ray.io/v1, kind: RayService, spec: {serveConfigV2: x}}", "rayClusterConfig is missing"),
        ("&a [*a]", "x.yaml holds a list"),
    ],
)
def test_what_is_no_manifest(content: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(content, "x.yaml", Settings())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_objects_of_one_name_are_refused() -> None:
    content = text.dump([load("job"), load("job")])
    with pytest.raises(ConfigError, match="two LLMInferences would be called mistral-job"):
        convert(content, "x.yaml", Settings())


def test_annotations_in_the_cluster_overwrite_the_command_word_by_word() -> None:
    document = command("")
    document["metadata"]["annotations"] = {"ray.io/overwrite-container-cmd": "true"}
    container = at(document, *HEAD, *CONTAINER)
    container.update(command=["vllm"], args=["serve", "m", "--override-generation-config", '{"a": 1}'])
    assert spec(document)["engine"]["args"] == ['--override-generation-config={"a": 1}']


@pytest.mark.parametrize("user", [0, 1000])
def test_pods_never_run_as_root(user: int) -> None:
    document = command("vllm serve m")
    at(document, *HEAD, *CONTAINER)["securityContext"] = {"runAsUser": user}
    one = converted(document)
    assert one.documents[0]["spec"].get("pod", {}).get("runAsUser") == (user or None)
    assert ("spec.headGroupSpec.template.spec.containers[0].securityContext.runAsUser" in notes(one, "lost")) is (
        user == 0
    )


def test_a_bucket_is_read_by_vllm_itself() -> None:
    loading = {"model_id": "mine", "model_source": {"bucket_uri": "s3://bucket/mine"}}
    found = spec(serving(model_loading_config=loading, engine_kwargs={}))
    assert (found["model"], found["servedModelName"]) == ("s3://bucket/mine", "mine")
    assert found["engine"]["args"] == ["--load-format=runai_streamer"]


def test_suspended_stays_suspended() -> None:
    document = load("job")
    document["spec"]["suspend"] = True
    assert spec(document)["suspend"] is True


def test_a_name_that_no_service_can_have_is_changed_and_named() -> None:
    document = command("vllm serve m")
    document["metadata"]["name"] = "8b.model"
    one = converted(document)
    assert one.documents[0]["metadata"]["name"] == "model-8b-model"
    assert notes(one, "check")["metadata.name"].startswith("is model-8b-model now")


def test_gpus_that_tpus_are_not() -> None:
    document = command("vllm serve m")
    at(document, *HEAD, *CONTAINER)["resources"]["limits"] = {"google.com/tpu": 4}
    assert "['google.com/tpu'] is asked for; lightvllm runs vLLM on GPUs and CPUs" in refused(document)


def test_requests_and_limits_that_differ_are_refused() -> None:
    document = command("vllm serve m")
    at(document, *HEAD, *CONTAINER)["resources"]["requests"] = {"nvidia.com/gpu": 2}
    assert "is 1, and requests say 2; they must agree" in refused(document)


def test_variables_of_a_runtime_env_are_carried_or_named_like_others() -> None:
    variables = {"RAY_X": "1", "LWS_X": "2", "NCCL_DEBUG": "INFO", "VLLM_API_KEY": "sk-secret", "A": 5}
    one = converted(serving(runtime_env={"env_vars": variables}))
    place = "spec.serveConfigV2.applications[0].args.llm_configs[0].runtime_env.env_vars"
    assert f"{place}.RAY_X" in notes(one, "replaced")
    assert {f"{place}.LWS_X", f"{place}.VLLM_API_KEY"} <= notes(one, "lost").keys()
    found = one.documents[0]["spec"]
    assert found["network"]["nccl"]["NCCL_DEBUG"] == "INFO"
    assert {"name": "A", "value": "5"} in found["env"]
    assert "sk-secret" not in str(one)


def test_no_key_where_none_is_wanted() -> None:
    found = spec(load("cluster"), unauthenticated=True)
    assert found["allowUnauthenticated"] is True
    assert "apiKey" not in found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("value", [None, {"a": 1}], ids=str)
def test_values_of_any_kind_are_refused_in_one_line_or_taken(path: Path, value: Any) -> None:
    document = next(yaml.safe_load_all(path.read_text()))
    embedded = document["spec"].get("serveConfigV2")
    refusals = 0
    for inside, tree in ((False, document), (True, None if embedded is None else yaml.safe_load(embedded))):
        for place in {leaf[:length]: None for leaf, _ in leaves(tree) for length in range(1, len(leaf) + 1)}:
            changed = copy.deepcopy(tree)
            at(changed, *place[:-1])[place[-1]] = value
            result = outcome(with_serve(document, changed) if inside else changed)
            assert not isinstance(result, str) or "\n" not in result
            refusals += isinstance(result, str)
    assert refusals

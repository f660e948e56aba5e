"""A RayService's ``serveConfigV2``: each model in it, and how many replicas it has.

Read are Ray Serve LLM (``ray.serve.llm:build_openai_app`` with ``llm_configs``), and programs of one's own that take
the model from the variables MODEL_ID, TENSOR_PARALLELISM and PIPELINE_PARALLELISM, or from arguments that are vLLM's.
"""

from __future__ import annotations

from typing import Any

import yaml

from lightvllm.operator.convert.options import Variable, Wanted, apply, apply_keyword
from lightvllm.operator.convert.tracked import Node

BUILDERS = ("ray.serve.llm:build_openai_app", "ray.serve.llm:build_pd_openai_app", "ray.llm:build_openai_app")
_OURS = "Ray Serve's own; the plan has its own probes, ends and ports"
_IN_THE_IMAGE = "runtime_env installs nothing in pods; put it into the image"


def models(text: Node, prometheus: str | None) -> list[Wanted]:
    """Everything that ``serveConfigV2`` serves."""
    try:
        parsed = yaml.safe_load(text.value) if isinstance(text.value, str) else text.value
    except yaml.YAMLError as error:
        raise text.error(f"is no YAML: {getattr(error, 'problem', None) or 'it cannot be read'}") from None
    config = text.embedded(parsed)
    config.at("proxy_location").replaced(_OURS)
    _http(config.at("http_options"))
    found: list[Wanted] = []
    for application in config.at("applications").elements():
        found += _application(application, prometheus)
    if not found:
        raise text.error("has no applications; expected one of ray.serve.llm:build_openai_app")
    return found


def environment(runtime_env: Node, env: dict[str, Variable]) -> None:
    """The variables of a ``runtime_env``, added to ``env``, which wins."""
    for name, variable in runtime_env.at("env_vars").fields():
        value = variable.take_text() or ""
        if env.setdefault(name, Variable(value, variable.reporter())).value != value:
            variable.lost("the model's own runtime_env has another value, which wins")
    for name, field in runtime_env.fields():
        if name != "env_vars":
            field.lost(_IN_THE_IMAGE)


def _http(options: Node) -> None:
    for name, option in options.fields():
        if name == "port" and option.value != 8000:
            option.lost("the API is at port 8000 of the Service")
        else:
            option.replaced(_OURS)


def _application(application: Node, prometheus: str | None) -> list[Wanted]:
    path = application.at("import_path").take_text() or ""
    application.at("name").take()
    route = application.at("route_prefix")
    if route.value == "/":
        route.take()
    else:
        route.lost("the API begins at /v1; a router or Ingress before it can add a prefix")
    shared: dict[str, Variable] = {}
    environment(application.at("runtime_env"), shared)
    configs = application.at("args", "llm_configs") if isinstance(application.at("args").value, dict) else None
    if path == BUILDERS[1]:
        raise application.at("import_path").error(
            "serves prefill and decode apart, which lightvllm does not; expected ray.serve.llm:build_openai_app"
        )
    if path in BUILDERS or configs:
        if not configs or not configs.elements():
            raise application.error("has no args.llm_configs; expected a list with a model each")
        return [_llm_config(config, shared, prometheus) for config in configs.elements()]
    return [_own_program(application, path, shared, prometheus)]


def _llm_config(config: Node, shared: dict[str, Variable], prometheus: str | None) -> Wanted:
    if isinstance(config.value, str):
        raise config.error(f"names the file {config.value!r}, which is not part of the manifest; put its content here")
    wanted = Wanted()
    loading = config.at("model_loading_config")
    name = loading.at("model_id").take_text()
    source = loading.at("model_source")
    bucket = source.at("bucket_uri") if isinstance(source.value, dict) else None
    if not name:
        raise config.error("has no model_loading_config.model_id")
    if bucket is not None:
        wanted.model = bucket.take_text()
        if not wanted.model:
            raise source.error("is an object without bucket_uri; expected that, or a model's name")
        bucket.check("Ray copied the bucket to its nodes; vLLM reads s3:// and gs:// by --load-format=runai_streamer")
    else:
        wanted.model = source.take_text() or name
    wanted.served = None if name == wanted.model else name
    if tokenizer := loading.at("tokenizer_source").take_text():
        wanted.args.append(f"--tokenizer={tokenizer}")
    _keywords(config.at("engine_kwargs"), wanted)
    if bucket is not None and not any(each.startswith("--load-format") for each in wanted.args):
        wanted.args.append("--load-format=runai_streamer")
    environment(config.at("runtime_env"), wanted.env)
    for key, value in shared.items():
        wanted.env.setdefault(key, value)
    _deployment(config.at("deployment_config"), wanted, prometheus)
    engine = config.at("llm_engine")
    if engine and str(engine.take()).lower() != "vllm":
        raise engine.error(f"is {engine.value!r}, expected vLLM")
    config.at("accelerator_type").lost("choose the nodes by spec.pod.nodeSelector, unless it is there already")
    config.at("placement_group_config").replaced("spec.topology says where pods lie")
    wanted.name = name
    return wanted


def _own_program(application: Node, path: str, env: dict[str, Variable], prometheus: str | None) -> Wanted:
    """As in KubeRay's samples of vLLM before Ray Serve LLM."""
    import_path, arguments = application.at("import_path"), application.at("args")
    wanted = Wanted()
    if isinstance(arguments.value, dict):
        _keywords(arguments, wanted)
    for name, flag in (
        ("MODEL_ID", "--model"),
        ("TENSOR_PARALLELISM", "--tensor-parallel-size"),
        ("PIPELINE_PARALLELISM", "--pipeline-parallel-size"),
    ):
        if name in env:
            where = f"{application.ledger.source}: runtime_env.env_vars.{name}"
            apply(
                wanted, flag, [env.pop(name).value], application.at("runtime_env", "env_vars", name).reporter(), where
            )
    if not wanted.model:
        raise import_path.error(
            f"is {path!r}, a program of your own that names no model in args.model or MODEL_ID; "
            "expected ray.serve.llm:build_openai_app"
        )
    import_path.check("a program of your own: it is vllm serve now, and what else the program does is gone")
    wanted.env = env
    wanted.name = application.at("name").take_text()
    deployments = application.at("deployments").elements()
    for number, deployment in enumerate(deployments):
        if number:
            deployment.lost("the model's deployment is taken to be the first")
        else:
            _deployment(deployment, wanted, prometheus)
    return wanted


def _keywords(arguments: Node, wanted: Wanted) -> None:
    for name, argument in arguments.fields():
        value = argument.take()
        where = f"{argument.ledger.source}: {name}"
        apply_keyword(wanted, name, value, argument.reporter(), where)


def _deployment(deployment: Node, wanted: Wanted, prometheus: str | None) -> None:
    _scaling(deployment, wanted, prometheus)
    grace = deployment.at("graceful_shutdown_timeout_s")
    if grace:
        wanted.fields["drain"] = {"timeoutSeconds": round(grace.take_number())}
    deployment.at("max_ongoing_requests").lost(
        "vLLM queues what it cannot run; lightvllm router --max-in-flight limits what a replica is sent"
    )
    for name in ("name", "ray_actor_options", "health_check_period_s", "health_check_timeout_s"):
        deployment.at(name).replaced(_OURS)
    deployment.at("graceful_shutdown_wait_loop_s").replaced(_OURS)


def _scaling(deployment: Node, wanted: Wanted, prometheus: str | None) -> None:
    fixed, scaling = deployment.at("num_replicas"), deployment.at("autoscaling_config")
    if fixed and fixed.value != "auto":
        wanted.fields["replicas"] = fixed.take_int()
    elif fixed:
        fixed.lost("say how many in spec.replicas, or scale by spec.autoscaling")
    if not scaling:
        return
    least = scaling.at("min_replicas").take_int()
    most = scaling.at("max_replicas").take_int(1)
    initial = scaling.at("initial_replicas").take_int()
    least, most = 1 if least is None else least, 1 if most is None else most
    replicas = initial if initial is not None else max(least, 1)
    if least == most:
        wanted.fields["replicas"] = least
        scaling.replaced("as many at least as at most: spec.replicas says how many")
    elif prometheus is None:
        wanted.fields["replicas"] = replicas
        scaling.lost(
            f"{least} to {most} replicas by demand: there are {replicas} now; --prometheus-address makes it "
            "spec.autoscaling, which needs KEDA and the router"
        )
    else:
        wanted.fields["replicas"] = min(replicas, most)
        made: dict[str, Any] = {"minReplicas": least, "maxReplicas": most, "prometheusAddress": prometheus}
        target = scaling.at("target_ongoing_requests")
        if target:
            made["targetPending"] = max(1, round(target.take_number()))
        wanted.fields["autoscaling"] = made
        for name, field in scaling.fields():
            if name not in ("min_replicas", "max_replicas", "initial_replicas", "target_ongoing_requests"):
                field.lost("spec.autoscaling has its own times")

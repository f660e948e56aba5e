"""Shared options: declared once, the same as the configuration's, and none that does nothing."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

from lightvllm.cli import options
from lightvllm.cli.options import EngineOptions, KubernetesTransport, parse_bytes, with_engine_options
from lightvllm.config import EXECUTOR_NAMES, DeviceConfig
from lightvllm.engine.llm import LLM
from lightvllm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512mib", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("3K", 3000),
        ("4Ki", 4096),
        ("100", 100),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1XB", "1 GiB more", "0.4"])
def test_no_sizes(text):
    with pytest.raises(typer.BadParameter, match="is no size; write it like 1GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("enum", "field"),
    [(options.Device, "device"), (options.AttentionBackend, "attention_backend"), (options.Kernels, "kernels")],
)
def test_choices_are_the_configurations(enum, field):
    assert tuple(enum) == get_args(get_type_hints(DeviceConfig)[field])


def test_other_choices_are_the_configurations():
    assert tuple(options.Executor) == EXECUTOR_NAMES
    assert tuple(options.DType) == get_args(get_type_hints(LLM.__init__)["dtype"])


def test_every_option_is_one_of_llms_with_its_default():
    llm = inspect.signature(LLM).parameters
    for field in fields(EngineOptions):
        assert field.name in llm
        assert (field.default or None) == (llm[field.name].default or None), field.name


def test_for_executor():
    given = EngineOptions(
        max_model_len=64,
        ray_address="auto",
        k8s_workers="a:1, b:2,",
        k8s_service="llm",
        k8s_pod_prefix="llm-x",
        k8s_token_file=Path("/token"),
        dtype=options.DType.bfloat16,
    )
    ray, k8s = given.for_executor("ray"), given.for_executor("k8s", without=("dtype",))
    assert ray["ray_address"] == "auto"
    assert not [name for name in ray if name.startswith("k8s")]
    assert (ray["dtype"], type(ray["dtype"])) == ("bfloat16", str)
    assert (k8s["k8s_workers"], k8s["k8s_token_file"]) == (("a:1", "b:2"), "/token")
    assert (k8s["k8s_service"], k8s["k8s_pod_prefix"]) == ("llm", "llm-x")
    assert "ray_address" not in k8s
    assert "dtype" not in k8s
    assert "num_kv_blocks" not in k8s, "what was not given is left to LLM"


def test_options_of_an_executor_that_is_not_used_are_refused():
    EngineOptions(ray_address="auto").refuse_unused(["uniproc", "ray"])
    with pytest.raises(ConfigError, match="--k8s-token-file is given, but executor k8s is not used"):
        EngineOptions(k8s_token_file=Path("t")).refuse_unused(["uniproc", "ray"])
    with pytest.raises(ConfigError, match="--k8s-service is given, but executor k8s is not used"):
        EngineOptions(k8s_service="llm").refuse_unused(["uniproc", "ray"])
    with pytest.raises(ConfigError, match="--k8s-gpus-per-pod is given, but executor k8s is not used"):
        EngineOptions(k8s_gpus_per_pod=2).refuse_unused(["uniproc", "ray"])
    EngineOptions(k8s_transport=KubernetesTransport.auto).refuse_unused(["uniproc", "ray"])
    with pytest.raises(ConfigError, match="--k8s-transport is given, but executor k8s is not used"):
        EngineOptions(k8s_transport=KubernetesTransport.grpc).refuse_unused(["uniproc", "ray"])


def test_the_decorator_gives_a_command_its_options_and_defaults():
    seen = {}

    @with_engine_options(threads=3)
    def command(model: str, engine: EngineOptions, more: int = 1) -> None:
        """What it does."""
        seen.update(model=model, engine=engine, more=more)

    app = typer.Typer()
    app.command()(command)
    typer.main.get_command(app).main(
        args=["m", "--more", "2", "--dtype", "float32", "--kv-cache-memory", "1KiB"], standalone_mode=False
    )
    assert seen == {
        "model": "m",
        "more": 2,
        "engine": EngineOptions(threads=3, dtype=options.DType.float32, kv_cache_memory=1024),
    }
    assert command.__doc__ == "What it does."

"""vLLM's CPU platform with asynchronous scheduling left as it was asked for. Imports vLLM.

vLLM 0.32 forces it off on CPUs ("not required"). Its CPU worker has all the same what the model runner's asynchronous
path needs: ``vllm/v1/worker/cpu/shm.py`` puts placeholders for CUDA's streams and events. ``install`` makes this module
a plugin of vLLM's.

With pipeline stages vLLM's V1 model runner is refused, for the sake of grammars alone (vllm#45014), and the V2 model
runner needs Triton, which the CPU build has not. So that refusal is taken away, too; grammars are not to be tried then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = f"{__name__}.AsyncCpuPlatform"


def plugin() -> str:
    """vLLM's entry point ``vllm.platform_plugins``: the platform's name."""
    return NAME


def install(folder: Path) -> str:
    """Have vLLM find the plugin: a distribution in ``folder``, which is to be on PYTHONPATH."""
    about = folder / "vllm_async_cpu-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-async-cpu\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[vllm.platform_plugins]\nasync_cpu = {__name__}:plugin\n")
    return str(folder)


def _refused(vllm_config: Any) -> list[str]:
    return [each for each in vllm_config._refused_before() if each != "pipeline parallelism with async scheduling"]


def __getattr__(name: str) -> Any:
    if name != "AsyncCpuPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    class AsyncCpuPlatform(CpuPlatform):  # type: ignore[misc]
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            wanted = vllm_config.scheduler_config.async_scheduling
            super().check_and_update_config(vllm_config)
            vllm_config.scheduler_config.async_scheduling = wanted
            kind = type(vllm_config)
            if not hasattr(kind, "_refused_before"):
                kind._refused_before = kind._get_v1_model_runner_unsupported_features
                kind._get_v1_model_runner_unsupported_features = _refused

    return AsyncCpuPlatform

"""vLLM's CPU platform, with Ray told to count workers as GPUs: vLLM's Ray executors refuse a platform without a device.

A plugin for ``vllm_executors.py`` alone: ``install`` makes a folder which, on PYTHONPATH, has vLLM in that process and
in Ray's workers take this platform. The GPUs are numbers that Ray counts with (``ray start --num-gpus``); none is used.
"""

from __future__ import annotations

from pathlib import Path

_NAME = Path(__file__).stem


def register() -> str:
    """What the entry point names: the platform's class."""
    return f"{_NAME}.CountedCpuPlatform"


def install(folder: Path) -> None:
    """Make ``folder`` with this module and the metadata of a distribution that holds the entry point."""
    metadata = folder / f"{_NAME}-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\n{_NAME} = {_NAME}:register\n")
    (folder / f"{_NAME}.py").symlink_to(Path(__file__).resolve())


def __getattr__(name: str) -> type:
    """The class, made when vLLM asks for it: ``register`` runs while vLLM still looks for its platform."""
    if name != "CountedCpuPlatform":
        raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")
    from vllm.platforms.cpu import CpuPlatform

    found = type(name, (CpuPlatform,), {"ray_device_key": "GPU", "__module__": _NAME})
    globals()[name] = found  # one class for the process
    return found

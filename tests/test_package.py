"""The package as it is installed: light to import, complete in its wheel, its layers and its public names."""

from __future__ import annotations

import ast
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lightvllm
from lightvllm import errors

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "ray", "vllm", "grpc", "kubernetes", "transformers", "numpy"}


def python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_public_names() -> None:
    assert sorted(lightvllm.__all__) == ["AsyncLLM", "LLM", "LightvLLM", "SamplingParams", "__version__"]
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = lightvllm.Missing


@pytest.mark.parametrize(
    "module", ["lightvllm", "lightvllm.errors", "lightvllm.config", "lightvllm.executors.factory", "lightvllm.cli.main"]
)
def test_importing_is_light(module: str) -> None:
    ran = python("-c", f"import {module}, sys; print(sorted({HEAVY!r} & set(sys.modules)))")
    assert ran.stdout.strip() == "[]", ran.stderr


def test_the_engine_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import lightvllm.engine.llm, lightvllm.executors.factory"
    assert python("-c", code).returncode == 0


def test_the_error_tree_is_all_there_is() -> None:
    public = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert all(issubclass(value, errors.LightvllmError) for value in public.values())
    assert all(name in (errors.__doc__ or "") for name in public)


def test_layers_hold() -> None:
    ran = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_contract_on_vllm_leaves_nobody_out() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (sources,) = [each["source_modules"] for each in contracts if each.get("forbidden_modules") == ["vllm"]]
    everybody = {f"lightvllm.{module.name}" for module in pkgutil.iter_modules(lightvllm.__path__)}
    assert set(sources) == everybody - {"lightvllm.adapters"}


def test_nobody_imports_the_bare_folders() -> None:
    for path in [*ROOT.glob("lightvllm/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"executors", "backends"}, path


def test_our_ray_folder_cannot_pass_for_ray() -> None:
    ran = python("-c", "import ray", cwd=ROOT / "backends")
    assert ran.returncode != 0
    assert "backends/' is on sys.path" in ran.stderr


@pytest.mark.slow
def test_the_wheel_is_complete(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".git", ".venv*", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "build"
        ),
    )
    ran = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    on_disk = {
        str(Path("lightvllm") / path.relative_to(ROOT / "lightvllm"))
        for folder in ("lightvllm", "lightvllm/executors", "lightvllm/backends")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == on_disk
    assert {"lightvllm/py.typed", "lightvllm/executors/base.py", "lightvllm/backends/ray/__init__.py"} <= packed

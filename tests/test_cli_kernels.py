"""``lightvllm kernels``: build and info."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightvllm.cli.kernels import app


def test_build_prints_the_library() -> None:
    first, second = (CliRunner().invoke(app, ["build"]) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert Path(first.output.strip()).is_file()
    assert second.output == first.output


def test_info_says_what_runs() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("kernels  compiled\n")
    assert ".so" in result.output


def test_info_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("kernels  reference\n")
    assert "no-such-compiler is not found" in result.output

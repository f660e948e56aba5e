"""The build cache: compiled once, by one process; a new key for new sources; errors in one line."""

import fcntl
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightvllm.errors import ConfigError
from lightvllm.kernels import build

SOURCE = 'extern "C" int answer() { return 42; }\n'

BUILD = """
import sys
from pathlib import Path
from lightvllm.kernels import build
build.SOURCES = Path(sys.argv[1])
print(build.build(timeout=60))
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library in place of the kernels, an empty cache, and a compiler that counts its runs."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    compiler = tmp_path / "counting-g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo run >> {tmp_path}/runs;; esac\nexec g++ "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LIGHTVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def runs(sources: Path) -> int:
    counted = sources.parent / "runs"
    return len(counted.read_text().splitlines()) if counted.exists() else 0


def test_a_second_build_finds_the_first(sources: Path) -> None:
    first = build.build()
    assert first.is_file()
    assert sources.parent / "cache" / "kernels" in first.parents
    changed = first.stat().st_mtime_ns
    assert build.build() == first
    assert first.stat().st_mtime_ns == changed
    assert runs(sources) == 1
    # Nothing half-made is left beside it.
    assert {path.name for path in first.parent.iterdir()} == {build.LIBRARY, "lock", "compiler.log"}


def test_other_sources_are_another_library(sources: Path) -> None:
    first = build.build()
    (sources / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    second = build.build()
    assert second != first
    assert runs(sources) == 2
    (sources / "answer.cpp").write_text(SOURCE)
    assert build.build() == first
    assert runs(sources) == 2


def test_another_compiler_version_is_another_library(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, description = build._compiler()
    assert command == [os.environ["CXX"]]
    assert "version" in description
    first = build._key(description)
    assert first == build._key(description)
    assert build._key(description.replace("version", "version 99")) != first
    monkeypatch.setattr(build.torch, "__version__", "2.99.0")
    assert build._key(description) != first


def test_processes_that_want_it_at_once_compile_it_once(sources: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, str(sources)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert runs(sources) == 1


def test_a_lock_that_is_held_too_long_is_an_error(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build.library_dir() / build._key(build._compiler()[1])
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as held, caplog.at_level(logging.INFO):
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"another process has been compiling the kernels for 0 s \(it holds "):
            build.build(timeout=0.2)
    assert time.monotonic() - began < 5
    assert "waiting for another process" in caplog.text
    assert runs(sources) == 0
    assert build.build().is_file()  # the lock is free again


def test_sources_that_do_not_compile(sources: Path) -> None:
    (sources / "answer.cpp").write_text("int answer( {")
    with pytest.raises(ConfigError, match="could not compile the kernels") as caught:
        build.build()
    assert "\n" not in str(caught.value)
    assert "answer.cpp:1" in str(caught.value)
    log = re.search(r"all it said is in (.*)", str(caught.value))
    assert log is not None
    assert "error" in Path(log[1]).read_text()
    assert not list(build.library_dir().rglob("*.so"))


def test_a_compiler_that_does_not_end_is_ended(sources: Path) -> None:
    compiler = Path(os.environ["CXX"])
    compiler.write_text('#!/bin/sh\ncase "$*" in *-shared*) exec sleep 100;; esac\nexec g++ "$@"\n')
    with pytest.raises(ConfigError, match="has not compiled the kernels within 0 s"):
        build.build(timeout=0.3)


def test_a_cache_that_cannot_be_written(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = sources.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("LIGHTVLLM_CACHE", str(blocked))
    with pytest.raises(ConfigError, match="set LIGHTVLLM_CACHE to a folder that can be written"):
        build.build()


def test_no_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(ConfigError, match="no-such-compiler is not found; install g"):
        build.build()


def test_verbose_shows_the_command(sources: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build.build(verbose=True)
    said = capfd.readouterr().err
    assert "-march=native" in said
    assert "answer.cpp" in said


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
def test_the_kernels_are_right_on_lesser_processors(tmp_path: Path) -> None:
    """Built without AVX-512, and without AVX at all, they pass the same tests; side by side, as a compiler is one
    thread."""
    here = Path(__file__).parent
    running = {}
    for processor in ("haswell", "x86-64"):
        folder = tmp_path / processor
        folder.mkdir()
        compiler = folder / "g++"
        compiler.write_text(
            "#!/bin/bash\n"
            f'given=("$@"); exec {shutil.which("g++")} -Wno-psabi "${{given[@]/#-march=native/-march={processor}}}"\n'
        )
        compiler.chmod(0o755)
        running[folder] = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not reference", "-p", "no:cacheprovider"]
            + [str(here / f"test_kernels_{name}.py") for name in ("linear", "pointwise", "attention")],
            cwd=here.parent,
            env=os.environ | {"CXX": str(compiler), "LIGHTVLLM_CACHE": str(folder / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        for folder, process in running.items():
            said, _ = process.communicate(timeout=280)
            assert process.returncode == 0, said
            assert " passed" in said
            log = next((folder / "cache").rglob("compiler.log"))
            assert (log.parent / build.LIBRARY).is_file()
    finally:
        for process in running.values():
            process.kill()
            process.communicate()

"""Compiles the CPU kernels for this machine, once: g++ on ``csrc/cpu``, the library kept in a cache folder.

``build()`` gives the library's path, compiling it only where the cache has none for this key. The key covers the
sources, torch's version, the compiler's, and what ``-march=native`` means here; so one cache may be shared by
different machines. Several processes that want the same library at once compile it once: the first holds a file
lock, the others wait. A library appears in the cache whole or not at all.

This module knows files and the compiler; it does not load the library (``operators.py``) and does not decide whether
to use it (``__init__.py``).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from lightvllm.cache import cache_dir, locked
from lightvllm.errors import ConfigError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc" / "cpu"
FLAGS = ("-O3", "-march=native", "-std=gnu++20", "-pthread", "-fPIC", "-shared")
COMPILE_TIMEOUT = 600.0
"""Seconds until a compiler that has not ended is ended, and until a wait for another process's build is given up."""
LIBRARY = "liblightvllm_cpu.so"


def library_dir() -> Path:
    """Where libraries are kept: ``kernels`` in the cache folder."""
    return cache_dir() / "kernels"


def build(verbose: bool = False, timeout: float = COMPILE_TIMEOUT) -> Path:
    """Return the path of the library for this machine, compiling it first where the cache lacks it.

    ``$CXX`` names another GCC than ``g++``. ``verbose`` prints the compiler's command and what it says to stderr.
    ``timeout``, seconds, bounds the compiler's run and the wait for another process that compiles the same.
    Raises ConfigError, in one line, when there is no compiler, it fails, or the cache cannot be written.
    """
    compiler, description = _compiler()
    folder = library_dir() / _key(description)
    library = folder / LIBRARY
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / "lock", timeout):
            if not library.exists():
                _compile(compiler, library, verbose, timeout)
    except OSError as failed:
        raise ConfigError(
            f"the kernels cannot be kept in {folder}: {failed}; set LIGHTVLLM_CACHE to a folder that can be written"
        ) from None
    return library


def _compiler() -> tuple[list[str], str]:
    """The compiler's command, and what it says of itself and of this machine's CPU."""
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"the CPU kernels are built on Linux only, this is {sys.platform}; use kernels='reference'")
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise ConfigError(f"the CPU kernels need a C++ compiler, and {command[0]} is not found; install g++ or set CXX")
    probe = [*command, "-march=native", "-v", "-E", "-x", "c++", "-o", os.devnull, os.devnull]
    try:
        asked = subprocess.run(probe, capture_output=True, text=True, timeout=60, env=os.environ | {"LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired) as failed:
        raise ConfigError(f"{command[0]} cannot be run: {failed}; install g++ or set CXX") from None
    if asked.returncode:
        said = _first_error(asked.stderr)
        raise ConfigError(f"{shlex.join(command)} -march=native failed ({said}); install g++ 12 or later, or set CXX")
    # The version, and the one command line that has -march=native resolved into single features.
    telling = [line.strip() for line in asked.stderr.splitlines() if " version " in line or "cc1plus" in line]
    return command, "\n".join(telling)


def _key(compiler: str) -> str:
    digest = hashlib.sha256()
    for text in (compiler, " ".join(FLAGS), torch.__version__, str(torch._C._GLIBCXX_USE_CXX11_ABI)):
        digest.update(text.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(
                locked(
                    path,
                    timeout,
                    lambda: logger.info("waiting for another process that compiles the kernels (%s)", path),
                )
            )
        except TimeoutError:
            raise ConfigError(
                f"another process has been compiling the kernels for {timeout:.0f} s (it holds {path}); "
                "end it, or use kernels='reference'"
            ) from None
        yield


def _compile(compiler: list[str], library: Path, verbose: bool, timeout: float) -> None:
    root = Path(torch.__file__).parent
    logger.info("compiling the CPU kernels into %s (once for this machine, some ten seconds)", library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        out = Path(scratch) / library.name
        command = [
            *compiler,
            *FLAGS,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-I{root / 'include'}",
            *(str(source) for source in sorted(SOURCES.glob("*.cpp"))),
            f"-L{root / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
            "-o",
            str(out),
        ]
        if verbose:
            print(shlex.join(command), file=sys.stderr)  # noqa: T201
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{compiler[0]} has not compiled the kernels within {timeout:.0f} s") from None
        log = library.parent / "compiler.log"
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if verbose and done.stderr:
            print(done.stderr, file=sys.stderr)  # noqa: T201
        if done.returncode or not out.exists():
            raise ConfigError(
                f"{compiler[0]} could not compile the kernels ({_first_error(done.stderr)}); all it said is in {log}"
            )
        out.replace(library)


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it said nothing")

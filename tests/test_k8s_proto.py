"""proto/worker.proto, the code generated from it, and what the server answers are one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

from lightvllm.backends.k8s import wire
from lightvllm.proto import worker_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent


def test_the_generated_code_is_what_the_proto_says() -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    check = subprocess.run(
        [sys.executable, str(ROOT / "proto/generate.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert (check.returncode, check.stderr) == (0, "")


def test_a_stale_file_would_be_named(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    for name in ("proto/generate.py", "proto/worker.proto", "lightvllm/proto/worker_pb2.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    stub = (ROOT / "lightvllm/proto/worker_pb2.pyi").read_text()
    (tmp_path / "lightvllm/proto/worker_pb2.pyi").write_text(stub.replace("payload", "pay_load"))
    check = subprocess.run(
        [sys.executable, str(tmp_path / "proto/generate.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert check.returncode == 1
    assert check.stderr.startswith("worker_pb2.pyi does not match proto/worker.proto")


def test_every_declared_method_is_served() -> None:
    service = pb.DESCRIPTOR.services_by_name["LLMWorker"]
    handlers = wire.handlers(dict.fromkeys(wire.METHODS, lambda *_: None))

    class Details:
        def __init__(self, method: str) -> None:
            self.method = method

    assert service.methods
    assert {method.name for method in service.methods} - set(wire.METHODS) == {"PushTensors"}  # transfer/push.py's
    for method in service.methods:
        if method.name == "PushTensors":
            continue
        handler = handlers.service(Details(f"/{service.full_name}/{method.name}"))
        assert handler is not None, method.name
        assert (handler.request_streaming, handler.response_streaming) == (
            method.client_streaming,
            method.server_streaming,
        )

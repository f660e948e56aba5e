"""Server reflection: what it tells, and that a worker server tells it only when asked to, and only with the token."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="the k8s extra is not installed")

import grpc
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from k8s_servers import worker_command, write_token
from waiting import LIMIT

from lightvllm.backends.k8s import reflection, wire
from lightvllm.backends.k8s.security import Token
from lightvllm.proto import worker_pb2

SERVICES = {wire.SERVICE, health.SERVICE_NAME, "grpc.reflection.v1alpha.ServerReflection"}


def ask(channel: Any, metadata: Any = (), **question: Any) -> Any:
    """One question to reflection; its answer."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    questions = iter([reflection_pb2.ServerReflectionRequest(**question)])
    (answer,) = stub.ServerReflectionInfo(questions, metadata=metadata, timeout=LIMIT)
    return answer


def services(answer: Any) -> set[str]:
    return {service.name for service in answer.list_services_response.service}


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Any]:
    """To a plain server that has nothing but reflection."""
    server = grpc.server(ThreadPoolExecutor(1))
    reflection.enable(server)
    server.add_insecure_port(f"unix:{tmp_path}/socket")
    server.start()
    with grpc.insecure_channel(f"unix:{tmp_path}/socket") as channel:
        yield channel
    server.stop(None).wait(LIMIT)


def test_it_names_the_services(channel: Any) -> None:
    assert services(ask(channel, list_services="")) == SERVICES


def test_it_describes_every_method_of_the_protocol(channel: Any) -> None:
    answer = ask(channel, file_containing_symbol=wire.SERVICE)
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(file)
        for file in answer.file_descriptor_response.file_descriptor_proto
    ]
    told = {method.name for file in files for service in file.service for method in service.method}
    assert told == {*worker_pb2.DESCRIPTOR.services_by_name["LLMWorker"].methods_by_name} >= {"InitWorker", "Session"}


def test_without_the_package_the_install_command_is_said(tmp_path: Path) -> None:
    code = "import sys; sys.modules['grpc_reflection'] = None; from lightvllm.cli.main import run; run()"
    options = ["worker", "--listen", "127.0.0.1:0", "--token-file", write_token(tmp_path), "--reflection"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: --reflection needs the package 'grpcio-reflection', which is not installed; "
        "run: pip install 'lightvllm[k8s]'\n"
    )


def test_a_worker_server_tells_it_to_those_who_show_the_token(tmp_path: Path) -> None:
    token_file = write_token(tmp_path)
    options = ("--listen", "127.0.0.1:0", "--token-file", token_file, "--reflection")
    with worker_command(*options) as command, grpc.insecure_channel(command.address()) as channel:
        assert services(ask(channel, Token.read(token_file).metadata(), list_services="")) == SERVICES
        for metadata in ((), Token.new().metadata()):
            with pytest.raises(grpc.RpcError) as refused:
                ask(channel, metadata, list_services="")
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_worker_server_does_not_tell_it_unasked(tmp_path: Path) -> None:
    token_file = write_token(tmp_path)
    with (
        worker_command("--listen", "127.0.0.1:0", "--token-file", token_file) as command,
        grpc.insecure_channel(command.address()) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        ask(channel, Token.read(token_file).metadata(), list_services="")
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED

"""What the pages in docs/ say of the code: the RPCs and who answers them, names, files, options, what is missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from lightvllm.cli.main import app

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/ray-to-lightvllm.md"
CLASSES = {
    "Placement": "lightvllm.backends.base",
    "WorkerRef": "lightvllm.backends.base",
    "Backend": "lightvllm.backends.base",
    "DistributedExecutor": "lightvllm.executors.distributed",
    "InProcessBackend": "lightvllm.backends.inprocess",
    "RayBackend": "lightvllm.backends.ray.backend",
    "KubernetesBackend": "lightvllm.backends.k8s.backend",
    "InitWorkerRequest": "lightvllm.proto.worker_pb2",
    "InitWorkerReply": "lightvllm.proto.worker_pb2",
}


def table(heading: str) -> list[list[str]]:
    """The rows, without the first two, of the table below a heading of the page."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def exists(name: str) -> bool:
    """Whether the class or message has the attribute, or there is such a file, or a folder with files in it."""
    class_name, _, attribute = name.partition(".")
    if class_name in CLASSES:
        named: Any = getattr(importlib.import_module(CLASSES[class_name]), class_name)
        fields = named.DESCRIPTOR.fields_by_name if hasattr(named, "DESCRIPTOR") else ()
        return hasattr(named, attribute) or attribute in fields
    path = ROOT / name
    return any(path.rglob("*.*")) if path.is_dir() else path.exists()


def declared() -> list[str]:
    from lightvllm.proto import worker_pb2

    return [method.name for method in worker_pb2.DESCRIPTOR.services_by_name["LLMWorker"].methods]


def test_every_rpc_has_its_row() -> None:
    pytest.importorskip("google.protobuf", reason="the k8s extra is not installed")
    assert [row[0].strip("`") for row in table("RPCs")] == declared()


def test_the_worker_server_answers_the_rpcs_that_the_page_says(tmp_path: Path) -> None:
    """Asks a real one; a method that it does not have is 'Method not found!'."""
    grpc = pytest.importorskip("grpc", reason="the k8s extra is not installed")
    from k8s_servers import worker_command, write_token
    from waiting import LIMIT

    from lightvllm.backends.k8s.security import Token
    from lightvllm.backends.k8s.wire import SERVICE

    token_file = write_token(tmp_path)

    def has(channel: Any, method: str) -> bool:
        call = channel.stream_stream(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as answer:  # no driver has a session, so that none of them can succeed
            list(call(iter([b""]), metadata=Token.read(token_file).metadata(), timeout=LIMIT))
        assert answer.value.code() is not grpc.StatusCode.UNAUTHENTICATED
        return "Method not found" not in answer.value.details()

    with (
        worker_command("--listen", "127.0.0.1:0", "--token-file", token_file) as command,
        grpc.insecure_channel(command.address()) as channel,
    ):
        assert not has(channel, "NoSuchMethod")
        answered = [method for method in declared() if has(channel, method)]
    said = [row[0].strip("`") for row in table("RPCs") if row[2].startswith("worker server")]
    assert said == answered, f"change the table of RPCs in {PAGE}"


def test_tensors_are_pushed_to_a_stage_as_soon_as_workers_do_so() -> None:
    (row,) = [row for row in table("RPCs") if row[0] == "`PushTensors`"]
    pushed = any("lightvllm.transfer" in path.read_text() for path in (ROOT / "lightvllm/worker").glob("*.py"))
    assert (row[2] != "nobody yet") is pushed, f"change the table of RPCs in {PAGE}"


@pytest.mark.parametrize(("name", "state"), table("Not there yet†"))
def test_what_is_not_there_yet(name: str, state: str) -> None:
    assert state in ("yes", "no")
    assert exists(name.strip("`")) is (state == "yes"), f"change the table at the end of {PAGE}"


@pytest.mark.parametrize("page", [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"], ids=lambda path: path.name)
def test_names_files_links_and_options_are_real(page: Path) -> None:
    text = page.read_text()
    missing = [str(row[0].strip("`")) for row in table("Not there yet†") if row[1] == "no"]
    spans = re.findall(r"`([^`\n]+)`", text)
    names = [span for span in spans if re.fullmatch(rf"(?:{'|'.join(CLASSES)})\.\w+", span)]
    files = [span for span in spans if re.fullmatch(r"[\w-]+(?:/[\w-]+)+\.(?:py|proto|md|toml)", span)]
    files += [str((page.parent / link).relative_to(ROOT)) for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    for name in [*names, *files]:
        assert name in missing or exists(name) or exists(f"lightvllm/{name}"), f"{page.name} names {name}"
    known = {option for command in commands(typer.main.get_command(app)) for option in command}
    used = {option for span in spans for option in re.findall(r"(?<!\S)(--[a-z0-9-]+)", span)}
    used -= {"--distributed-executor-backend", "--nnodes", "--numa-bind"}  # vLLM's
    assert used <= known, f"{page.name} names options that no command has"


def commands(command: Any) -> list[list[str]]:
    """The option names of a command and of those below it."""
    own = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
    return [own, *(options for below in getattr(command, "commands", {}).values() for options in commands(below))]

"""A planned group of two pods, run: its pods find each other by DNS, serve, come back after a death, and drain."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import yaml

from lightvllm.cli.main import main

HERE = Path(__file__).parent
NAMESPACES = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "--net",
    "--pid",
    "--fork",
    "--mount-proc",
    "--kill-child",
]


def possible() -> bool:
    if any(shutil.which(command) is None for command in ("unshare", "nsenter", "ip", "pgrep")):
        return False
    return (
        subprocess.run(
            [*NAMESPACES, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, timeout=60, check=False
        ).returncode
        == 0
    )


@pytest.mark.slow
def test_a_group_of_two_pods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("dns", "grpc", "cryptography"):
        pytest.importorskip(module, reason="the k8s extra is not installed")
    if not possible():
        pytest.skip("network namespaces cannot be made here")
    spec = {
        "model": str(tiny_llama.build(tmp_path / "tiny", max_position_embeddings=4096)),
        "servedModelName": "tiny",
        "pipelineParallelSize": 2,
        "gpuResource": "",
        "allowUnauthenticated": True,
        "drain": {"pauseSeconds": 0, "timeoutSeconds": 40},
        "engine": {"args": ["--num-kv-blocks=300"]},
    }
    document = {"apiVersion": "lightvllm.io/v1", "kind": "LLMInference", "metadata": {"name": "tiny"}, "spec": spec}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(document))
    capsys.readouterr()
    assert main(["manifest", str(tmp_path / "tiny.yaml"), "--plan"]) == 0
    (tmp_path / "plan").write_text(capsys.readouterr().out)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [*NAMESPACES, sys.executable, str(HERE / "pods_in_namespaces.py"), str(tmp_path / "plan"), str(tmp_path)]
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    logs = "".join(f"\n{log.name}:\n{log.read_text()[-3000:]}" for log in sorted(tmp_path.glob("*.log")))
    assert ran.returncode == 0, ran.stderr[-3000:] + logs
    seen = json.loads(ran.stdout)
    assert seen["worker is ready without the leader"]
    assert seen["leader's status"] not in (0, 143), "the kubelet must see that its container failed"
    assert seen["pod 1 went on"]
    assert seen["after"] == seen["before"] != ""
    assert seen["pods that had ended before the last token"] == []
    assert seen["statuses"] == [143, 143]
    assert "finishing 1 requests" in logs

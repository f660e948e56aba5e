"""``lightvllm worker`` servers for vLLM's workers: TCP on loopback, mutual TLS with what ``lightvllm certs`` makes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from k8s_servers import WorkerCommand, worker_command

from lightvllm.cli.main import main

OWN = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""All that these servers have of what vLLM needs here: the rest must come from the driver."""

ENDED = 128 + signal.SIGTERM
"""The exit status of a ``lightvllm worker`` that was told to end, and did so in order."""


class Remote:
    """Servers that are ready.

    Attributes:
        servers: in the order of ranks.
        addresses: where they listen, ``host:port``.
        settings: what leads a driver to them, as our settings in vLLM's ``additional_config``.
        env: the same as variables.
    """

    def __init__(self, servers: list[WorkerCommand], group: Path) -> None:
        self.servers = servers
        self.addresses = [each.address() for each in servers]
        files = group / "drivers" / "driver"
        self.settings = {
            "k8s_workers": self.addresses,
            "k8s_token_file": str(files / "token"),
            "k8s_tls_cert": str(files / "cert.pem"),
            "k8s_tls_key": str(files / "key.pem"),
            "k8s_tls_ca": str(files / "ca.pem"),
        }
        self.env = {
            f"LIGHTVLLM_{name.upper()}": value if isinstance(value, str) else ",".join(value)
            for name, value in self.settings.items()
        }


@contextlib.contextmanager
def remote_workers(group: Path, count: int, **env: str) -> Iterator[Remote]:
    """``count`` servers, each ready for one driver after the other; ``env`` is added to their environment.

    At the end each is told to leave, and must. A PYTHONPATH goes before the present one.
    """
    if path := env.get("PYTHONPATH"):
        env["PYTHONPATH"] = os.pathsep.join([path, os.environ["PYTHONPATH"]])
    assert main(["certs", str(group), "--workers", "127.0.0.1"]) == 0
    files = group / "workers" / "127.0.0.1"
    options = ["--listen", "127.0.0.1:0", "--token-file", str(files / "token")]
    options += ["--tls-cert", str(files / "cert.pem"), "--tls-key", str(files / "key.pem")]
    options += ["--tls-ca", str(files / "ca.pem")]
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(worker_command(*options, env=os.environ | OWN | env)) for _ in range(count)]
        yield Remote(servers, group)
        for each in servers:
            assert each.end() == ENDED, each.lines

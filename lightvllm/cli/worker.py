"""``lightvllm worker``: a worker server for drivers that are started elsewhere with ``--k8s-workers``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightvllm.backends.k8s.process import MAX_MESSAGE_BYTES


def worker(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one and prints it.")
    ],
    token_file: Annotated[
        Path, typer.Option(help="File with the token that drivers must show; readable by its owner only.")
    ],
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate of this server, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of that certificate, PEM.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="CA that drivers' certificates are signed by, PEM.")] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Servers, such as one for each GPU of this machine or pod: at as many consecutive ports from PORT on.",
        ),
    ] = 1,
    max_message_mib: Annotated[
        int, typer.Option(min=1, help="Largest payload of a call or reply, MiB.")
    ] = MAX_MESSAGE_BYTES // 2**20,
    reflection: Annotated[
        bool,
        typer.Option(
            "--reflection", help="Tell those who show the token what the protocol is, for tools like grpcurl."
        ),
    ] = False,
) -> None:
    """Serve one driver after another, each with a fresh worker process, until Ctrl-C or SIGTERM.

    With --workers N drivers are told --k8s-gpus-per-pod N. An address that is not loopback needs mutual TLS.
    """
    from lightvllm.backends.k8s.security import Tls, Token
    from lightvllm.backends.k8s.supervisor import supervise

    tls = Tls.from_options(*(None if path is None else str(path) for path in (tls_cert, tls_key, tls_ca)))
    supervise(
        listen,
        Token.read(token_file),
        tls,
        max_message_mib * 2**20,
        typer.echo,
        workers=workers,
        reflection=reflection,
    )

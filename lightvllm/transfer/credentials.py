"""What the workers of a group prove themselves with to each other: made by the driver, handed out in ``WorkerInit``.

Knows no torch and no gRPC, so that the driver's side may import it.
"""

from __future__ import annotations

import secrets

from lightvllm.config import ParallelConfig
from lightvllm.messages import StageCredentials

VALID_DAYS = 1.0
"""Certificates are shown once, when the stages connect. The connection outlives them."""


def host_name(rank: int) -> str:
    """The name in a worker's certificate."""
    return f"rank-{rank}"


def make_credentials(parallel: ParallelConfig, local: bool) -> list[StageCredentials | None]:
    """One for each rank; None for all where stages need none.

    ``local``: all workers are on one host. Else, with ``pp_transport="grpc"``, each rank gets a certificate and key of
    its own, signed by a CA that is forgotten at once; MissingExtra if the package for that is not installed.
    """
    ranks = range(parallel.world_size)
    if parallel.pipeline_parallel_size == 1:
        return [None for _ in ranks]
    group, token = secrets.token_hex(8), secrets.token_urlsafe(32)
    if local or parallel.pp_transport != "grpc":
        return [StageCredentials(group=group, token=token) for _ in ranks]
    from lightvllm.certs import Authority

    authority = Authority.new(days=2 * VALID_DAYS)
    issued = [authority.issue(host_name(rank), "peer", [host_name(rank)], VALID_DAYS) for rank in ranks]
    return [StageCredentials(group=group, token=token, cert=one.cert, key=one.key, ca=authority.cert) for one in issued]

"""The Secrets by which the pods of a group know each other: the files of ``lightvllm certs``, made elsewhere.

Nothing is issued here: a plan made twice is the same twice, and what is random is not. Who has no ``Credentials`` makes
the Secrets by hand; ``Needed`` says how.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightvllm.operator.planner.layout import Layout
from lightvllm.operator.planner.names import Names
from lightvllm.operator.types import LLMInference

DRIVER = "driver"


@dataclass(frozen=True)
class Credentials:
    """Of one group. Keys and token are shown by no ``repr``.

    Attributes:
        token: what drivers show, one line.
        ca: the certificate that all trust, PEM.
        worker: the workers' certificate and key, PEM, for the names ``hosts`` says.
        driver: the driver's.
    """

    token: bytes = field(repr=False)
    ca: bytes
    worker: tuple[bytes, bytes] = field(repr=False)
    driver: tuple[bytes, bytes] = field(repr=False)


@dataclass(frozen=True)
class Needed:
    """A Secret that the pods mount and the plan does not hold.

    Attributes:
        name: of the Secret.
        what: is in it, a few words.
        commands: which make it, each a line for a shell; words in capitals are the user's to fill in.
    """

    name: str
    what: str
    commands: tuple[str, ...]


def hosts(inference: LLMInference, group: int) -> list[str]:
    """The names that the workers' certificate of a group must be for."""
    names = Names(inference)
    return [names.host(group, pod) for pod in range(Layout.of(inference.spec).pods)]


def group_secrets(inference: LLMInference, group: int, credentials: Credentials) -> list[dict[str, Any]]:
    """The workers' Secret and the driver's."""
    names = Names(inference)
    common = {"token": credentials.token, "ca.pem": credentials.ca}
    return [
        _secret(names.metadata(name, group), {**common, "cert.pem": cert, "key.pem": key})
        for name, (cert, key) in (
            (names.workers_secret(group), credentials.worker),
            (names.driver_secret(group), credentials.driver),
        )
    ]


def needed(inference: LLMInference, group: int) -> list[Needed]:
    """The same two, to be made by hand."""
    names = Names(inference)
    folder, known = names.group(group), hosts(inference, group)
    certs = shlex.join(["lightvllm", "certs", folder, "--workers", "+".join(known)])

    def command(secret: str, part: str) -> str:
        return _create(inference, "generic", secret, f"--from-file={folder}/{part}")

    workers, driver = names.workers_secret(group), names.driver_secret(group)
    return [
        Needed(workers, "token and certificate of the workers", (certs, command(workers, f"workers/{known[0]}"))),
        Needed(driver, "token and certificate of the leader", (command(driver, f"drivers/{DRIVER}"),)),
    ]


def named(inference: LLMInference) -> list[Needed]:
    """Those that the spec names by a field of its own."""
    key, tls = inference.spec.api_key, inference.spec.tls
    found = []
    if key is not None:
        command = _create(inference, "generic", key.name, f"--from-literal={key.key}=KEY")
        found.append(Needed(key.name, "the key that requests must bring", (command,)))
    if tls is not None:
        command = _create(inference, "tls", tls.secret_name, "--cert=FILE", "--key=FILE")
        found.append(Needed(tls.secret_name, "the API's certificate", (command,)))
    return found


def _create(inference: LLMInference, kind: str, name: str, *sources: str) -> str:
    namespace = inference.metadata.namespace
    where = ["-n", namespace] if namespace is not None else []
    return shlex.join(["kubectl", "create", "secret", kind, *where, name, *sources])


def _secret(metadata: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    data = {name: base64.b64encode(content).decode() for name, content in sorted(files.items())}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}

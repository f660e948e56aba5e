"""Server reflection: lets tools such as grpcurl ask a worker server what its services and messages are.

Off unless ``lightvllm worker --reflection`` asks for it, and behind the token like every call but health: it is an
ordinary service of the server, so the server's interceptor sees it. Imports the package ``grpcio-reflection`` when it
is used.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from lightvllm.errors import MissingExtra


def require() -> None:
    """Raise MissingExtra unless the package is installed; imports neither it nor grpc."""
    if importlib.util.find_spec("grpc_reflection") is None:
        raise MissingExtra("grpcio-reflection", "k8s", "--reflection")


def enable(server: Any) -> None:
    """Have ``server``, a ``grpc.Server`` that has not been started, tell of LLMWorker, health and reflection itself.

    Raises MissingExtra.
    """
    require()
    from grpc_health.v1 import health
    from grpc_reflection.v1alpha import reflection

    from lightvllm.backends.k8s import wire

    reflection.enable_server_reflection((wire.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

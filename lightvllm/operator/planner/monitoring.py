"""A ServiceMonitor, by which the Prometheus operator finds the leaders' metrics."""

from __future__ import annotations

from typing import Any

from lightvllm.backends.k8s.labels import HTTP_PORT_NAME
from lightvllm.operator.planner.names import Names
from lightvllm.operator.types import LLMInference, Monitoring


def service_monitor(inference: LLMInference, monitoring: Monitoring) -> dict[str, Any]:
    names, spec = Names(inference), inference.spec
    endpoint: dict[str, Any] = {
        "port": HTTP_PORT_NAME,
        "path": "/metrics",
        "interval": f"{monitoring.interval_seconds}s",
        "scheme": "http" if spec.tls is None else "https",
    }
    if spec.tls is not None:
        namespace = inference.metadata.namespace
        host = names.service if namespace is None else f"{names.service}.{namespace}.svc"
        endpoint["tlsConfig"] = {"ca": {"secret": {"name": spec.tls.secret_name, "key": "ca.crt"}}, "serverName": host}
    if spec.api_key is not None:
        endpoint["authorization"] = {"credentials": {"name": spec.api_key.name, "key": spec.api_key.key}}
    metadata = names.metadata(names.inference)
    metadata["labels"] = {**monitoring.labels, **metadata["labels"]}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": metadata,
        "spec": {"selector": {"matchLabels": names.selector}, "endpoints": [endpoint]},
    }

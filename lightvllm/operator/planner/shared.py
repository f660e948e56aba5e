"""The objects that all groups of an LLMInference share."""

from __future__ import annotations

from typing import Any

from lightvllm.backends.k8s.labels import HTTP_PORT, HTTP_PORT_NAME
from lightvllm.operator.planner.names import Names
from lightvllm.operator.types import LLMInference


def settings(inference: LLMInference) -> dict[str, str]:
    """What the ConfigMap holds: the variables by which every process of every pod may know its group's settings."""
    spec = inference.spec
    values = {
        "MODEL_NAME": inference.served_model_name,
        "TENSOR_PARALLEL_SIZE": spec.tensor_parallel_size,
        "PIPELINE_PARALLEL_SIZE": spec.pipeline_parallel_size,
        "BLOCK_SIZE": spec.block_size,
        "MAX_NUM_SEQS": spec.max_num_seqs,
        "MAX_MODEL_LEN": spec.max_model_len,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def service_account(inference: LLMInference) -> dict[str, Any]:
    """Of the pods. It may do nothing: they find each other by DNS."""
    names = Names(inference)
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": names.metadata(names.service_account),
        "automountServiceAccountToken": False,
    }


def config_map(inference: LLMInference) -> dict[str, Any]:
    names = Names(inference)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": names.metadata(names.config_map),
        "data": settings(inference),
    }


def client_service(inference: LLMInference) -> dict[str, Any]:
    """Where the API is reached: the ready leaders."""
    names = Names(inference)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": names.metadata(names.service),
        "spec": {
            "selector": names.leaders,
            "ports": [{"name": HTTP_PORT_NAME, "port": HTTP_PORT, "targetPort": HTTP_PORT_NAME}],
        },
    }


def api_policy(inference: LLMInference) -> dict[str, Any]:
    """Who reaches the leaders' API; ``group`` lets nobody else in."""
    names = Names(inference)
    clients = inference.spec.network.clients
    ingress = {"ports": [{"port": HTTP_PORT, "protocol": "TCP"}], **({"from": clients} if clients else {})}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": names.metadata(names.api_policy),
        "spec": {"podSelector": {"matchLabels": names.leaders}, "policyTypes": ["Ingress"], "ingress": [ingress]},
    }


def disruption_budget(inference: LLMInference) -> dict[str, Any]:
    """Nodes are drained one pod at a time: losing a pod is losing its group until it is back.

    Pods that are not ready do not hold up a drain: nobody is served by them.
    """
    names = Names(inference)
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": names.metadata(names.inference),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": names.selector},
        },
    }

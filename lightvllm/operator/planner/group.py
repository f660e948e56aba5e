"""The objects of one group: its StatefulSet, the headless Service that names its pods, the NetworkPolicy around it."""

from __future__ import annotations

from typing import Any

from lightvllm.backends.k8s.labels import GROUP
from lightvllm.operator.planner.layout import Layout
from lightvllm.operator.planner.names import Names
from lightvllm.operator.planner.pod import template
from lightvllm.operator.planner.scripts import WORKER_PORT
from lightvllm.operator.types import LLMInference

RANKS_ANNOTATION = f"{GROUP}/ranks"
"""Which ranks and stages each pod has, for people."""


def headless_service(inference: LLMInference, group: int) -> dict[str, Any]:
    """Gives each pod a name, before it is ready: leader and workers look for each other while nobody is."""
    names = Names(inference)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": names.metadata(names.headless(group), group),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": names.group_selector(group),
            "ports": [{"name": "grpc", "port": WORKER_PORT}],
        },
    }


def stateful_set(inference: LLMInference, group: int, settings: dict[str, str]) -> dict[str, Any]:
    """Leader and workers. All pods are made at once: none becomes ready without the others."""
    names, layout = Names(inference), Layout.of(inference.spec)
    metadata = names.metadata(names.group(group), group)
    ranks = "; ".join(
        f"pod {pod}: ranks {_span(layout.ranks(pod))}, stages {_span(layout.stages(pod))}" for pod in range(layout.pods)
    )
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {**metadata, "annotations": {RANKS_ANNOTATION: ranks}},
        "spec": {
            "serviceName": names.headless(group),
            "replicas": 0 if inference.spec.suspend else layout.pods,
            "podManagementPolicy": "Parallel",
            # Pods of an old and a new template cannot form a group: where the cluster can, it replaces all at once.
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
            "selector": {"matchLabels": names.group_selector(group)},
            "template": template(inference, group, settings),
        },
    }


def network_policy(inference: LLMInference, group: int) -> dict[str, Any]:
    """Only the group's own pods reach its pods, on any port. Who else reaches its leader's API: ``shared``."""
    names = Names(inference)
    own = {"matchLabels": names.group_selector(group)}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": names.metadata(names.group(group), group),
        "spec": {"podSelector": own, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": own}]}]},
    }


def _span(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])

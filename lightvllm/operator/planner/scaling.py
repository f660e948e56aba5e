"""What scales an LLMInference by its scale subresource: a ScaledObject of KEDA, or a HorizontalPodAutoscaler.

Both look at the router's ``lightvllm_router_pending_requests``: requests held and running, by model. One replica is
wanted for every ``targetPending`` of them.
"""

from __future__ import annotations

from typing import Any

from lightvllm.operator.planner.names import Names
from lightvllm.operator.types import API_VERSION, Autoscaling, LLMInference

METRIC = "lightvllm_router_pending_requests"


def scaled_object(inference: LLMInference, autoscaling: Autoscaling) -> dict[str, Any]:
    names = Names(inference)
    model = inference.served_model_name.replace("\\", "\\\\").replace('"', '\\"')
    trigger = {
        "type": "prometheus",
        "metadata": {
            "serverAddress": autoscaling.prometheus_address,
            "query": f'sum({METRIC}{{model="{model}"}})',
            "threshold": str(autoscaling.target_pending),
            "activationThreshold": "0",
        },
    }
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": names.metadata(names.inference),
        "spec": {
            "scaleTargetRef": _target(inference),
            "minReplicaCount": autoscaling.min_replicas,
            "maxReplicaCount": autoscaling.max_replicas,
            "pollingInterval": autoscaling.polling_seconds,
            "cooldownPeriod": autoscaling.cooldown_seconds,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behaviour(autoscaling)}},
            "triggers": [trigger],
        },
    }


def pod_autoscaler(inference: LLMInference, autoscaling: Autoscaling) -> dict[str, Any]:
    names = Names(inference)
    metric = {"name": METRIC, "selector": {"matchLabels": {"model": inference.served_model_name}}}
    target = {"type": "AverageValue", "averageValue": str(autoscaling.target_pending)}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": names.metadata(names.inference),
        "spec": {
            "scaleTargetRef": _target(inference),
            "minReplicas": autoscaling.min_replicas,
            "maxReplicas": autoscaling.max_replicas,
            "metrics": [{"type": "External", "external": {"metric": metric, "target": target}}],
            "behavior": _behaviour(autoscaling),
        },
    }


def _behaviour(autoscaling: Autoscaling) -> dict[str, Any]:
    """Replicas come at once and go late: a model takes minutes to load."""
    return {"scaleDown": {"stabilizationWindowSeconds": autoscaling.cooldown_seconds}}


def _target(inference: LLMInference) -> dict[str, str]:
    return {"apiVersion": API_VERSION, "kind": inference.kind, "name": inference.metadata.name}

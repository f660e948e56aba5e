"""What an LLMInference becomes in a cluster: ``plan``, pure, the same for the same input, in a fixed order.

| module | its part |
|---|---|
| ``layout`` | how workers fill pods |
| ``names`` | names, labels, owners |
| ``group``, ``pod``, ``placement`` | a group: StatefulSet, pods, where they lie |
| ``commands``, ``scripts`` | what a pod runs, per engine |
| ``shared`` | Service, ConfigMap, ServiceAccount, policies, budget |
| ``secrets`` | token and certificates of a group |
| ``scaling``, ``monitoring`` | scalers, ServiceMonitor |

Applying it is somebody else's: ``kubectl apply``, or the operator. Objects that are no longer planned, such as a group
that went with a scale-down, are for them to delete; ``names.Names.selector`` finds all there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lightvllm.operator.planner import group, monitoring, scaling, secrets, shared
from lightvllm.operator.planner.commands import needs_group_files
from lightvllm.operator.planner.secrets import Credentials as Credentials
from lightvllm.operator.planner.secrets import Needed as Needed
from lightvllm.operator.types import LLMInference

SCALED_OBJECT = "scaledobjects.keda.sh"
SERVICE_MONITOR = "servicemonitors.monitoring.coreos.com"
OPTIONAL_KINDS = frozenset({SCALED_OBJECT, SERVICE_MONITOR})
"""Kinds that not every cluster has, by the names of their definitions."""


@dataclass(frozen=True)
class Plan:
    """What is to be there.

    Attributes:
        objects: ready for YAML or the API, in the order in which they may be applied.
        needed: Secrets that the pods mount and that are not among them.
        left_out: what was asked for and cannot be, one line each, with the reason.
    """

    objects: list[dict[str, Any]]
    needed: list[Needed]
    left_out: list[str]


def plan(
    inference: LLMInference,
    known_kinds: Collection[str] = (),
    credentials: Mapping[int, Credentials] | None = None,
) -> Plan:
    """The objects that ``inference`` becomes.

    Args:
        inference: with its uid, once it is in a cluster, so that it owns them.
        known_kinds: those of ``OPTIONAL_KINDS`` that the cluster has.
        credentials: of groups, by their number; of others the Secrets are ``needed``.
    """
    spec = inference.spec
    settings = shared.settings(inference)
    objects = [
        shared.service_account(inference),
        shared.config_map(inference),
        shared.client_service(inference),
        shared.disruption_budget(inference),
    ]
    if spec.network.policy:
        objects.append(shared.api_policy(inference))
    missing = secrets.named(inference)
    for number in range(spec.replicas):
        if needs_group_files(spec):
            if credentials is not None and number in credentials:
                objects += secrets.group_secrets(inference, number, credentials[number])
            else:
                missing += secrets.needed(inference, number)
        if spec.network.policy:
            objects.append(group.network_policy(inference, number))
        objects.append(group.headless_service(inference, number))
        objects.append(group.stateful_set(inference, number, settings))
    optional, left_out = _optional(inference, known_kinds)
    return Plan(objects + optional, missing, left_out)


def _optional(inference: LLMInference, known_kinds: Collection[str]) -> tuple[list[dict[str, Any]], list[str]]:
    spec = inference.spec
    objects, left_out = [], []
    # A scaler would start again what is suspended.
    if spec.autoscaling is not None and not spec.suspend:
        if spec.autoscaling.kind == "HPA":
            objects.append(scaling.pod_autoscaler(inference, spec.autoscaling))
        elif SCALED_OBJECT in known_kinds:
            objects.append(scaling.scaled_object(inference, spec.autoscaling))
        else:
            left_out.append(f"autoscaling: the cluster does not have {SCALED_OBJECT}; install KEDA, or use kind HPA")
    if spec.monitoring is not None:
        if SERVICE_MONITOR in known_kinds:
            objects.append(monitoring.service_monitor(inference, spec.monitoring))
        else:
            left_out.append(f"monitoring: the cluster does not have {SERVICE_MONITOR}; install the Prometheus operator")
    return objects, left_out

"""What the objects of one LLMInference are called, and the labels that they have and are found by.

    NAME                            ServiceAccount, the clients' Service, PodDisruptionBudget, scaler, ServiceMonitor
    NAME-config                     ConfigMap
    NAME-G                          StatefulSet of group G = 0 … replicas − 1, and its NetworkPolicy
    NAME-G-I                        pod I of it; I = 0 is the leader
    NAME-G-headless                 its headless Service: pod I is NAME-G-I.NAME-G-headless
    NAME-G-workers, NAME-G-driver   Secrets with token and certificates
    NAME-api                        NetworkPolicy of the leaders' API

Labels are those of ``backends/k8s/labels.py``.
"""

from __future__ import annotations

from typing import Any

from lightvllm.backends.k8s.labels import GROUP_LABEL, INFERENCE_LABEL, POD_INDEX_LABEL
from lightvllm.operator.types import API_VERSION, LLMInference


class Names:
    """Of one LLMInference."""

    def __init__(self, inference: LLMInference) -> None:
        self._metadata = inference.metadata
        self._kind = inference.kind
        self.inference = self.service_account = self.service = inference.metadata.name
        self.config_map = f"{self.inference}-config"
        self.api_policy = f"{self.inference}-api"

    def group(self, group: int) -> str:
        """The StatefulSet, and what its pods' names begin with."""
        return f"{self.inference}-{group}"

    def headless(self, group: int) -> str:
        return f"{self.group(group)}-headless"

    def host(self, group: int, pod: int) -> str:
        """A pod's name for other pods of the namespace; what its certificate is for."""
        return f"{self.group(group)}-{pod}.{self.headless(group)}"

    def workers_secret(self, group: int) -> str:
        return f"{self.group(group)}-workers"

    def driver_secret(self, group: int) -> str:
        return f"{self.group(group)}-driver"

    @property
    def selector(self) -> dict[str, str]:
        """All pods."""
        return {INFERENCE_LABEL: self.inference}

    @property
    def leaders(self) -> dict[str, str]:
        """The pods that serve the API."""
        return {**self.selector, POD_INDEX_LABEL: "0"}

    def group_selector(self, group: int) -> dict[str, str]:
        """The pods of a group."""
        return {**self.selector, GROUP_LABEL: str(group)}

    def labels(self, group: int | None = None) -> dict[str, str]:
        """Of every object; ``group`` for those of one group."""
        return {
            "app.kubernetes.io/name": "lightvllm",
            "app.kubernetes.io/instance": self.inference,
            "app.kubernetes.io/managed-by": "lightvllm",
            **(self.selector if group is None else self.group_selector(group)),
        }

    def metadata(self, name: str, group: int | None = None) -> dict[str, Any]:
        """Of an object, owned by the LLMInference if that is in a cluster, so that it goes with it."""
        result: dict[str, Any] = {"name": name}
        if self._metadata.namespace is not None:
            result["namespace"] = self._metadata.namespace
        result["labels"] = self.labels(group)
        if self._metadata.uid is not None:
            result["ownerReferences"] = [
                {
                    "apiVersion": API_VERSION,
                    "kind": self._kind,
                    "name": self.inference,
                    "uid": self._metadata.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ]
        return result

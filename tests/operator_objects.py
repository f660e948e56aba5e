"""For tests of the planner: an LLMInference from its spec, and where to look in what it becomes."""

from __future__ import annotations

from typing import Any

from lightvllm.operator.planner import OPTIONAL_KINDS, plan
from lightvllm.operator.types import LLMInference

MINIMAL: dict[str, Any] = {"model": "smollm2-135m", "allowUnauthenticated": True}


def inference(name: str = "llama", namespace: str | None = None, uid: str | None = None, **spec: Any) -> LLMInference:
    """Fields that are None are left out."""
    document = {
        "apiVersion": "lightvllm.io/v1",
        "kind": "LLMInference",
        "metadata": {"name": name, "namespace": namespace, "uid": uid},
        "spec": {key: value for key, value in {**MINIMAL, **spec}.items() if value is not None},
    }
    return LLMInference.model_validate(document)


class Objects:
    """What an LLMInference becomes where every kind is known."""

    def __init__(self, inference: LLMInference) -> None:
        self.plan = plan(inference, OPTIONAL_KINDS)
        self.all = self.plan.objects

    def of(self, kind: str) -> list[Any]:
        return [each for each in self.all if each["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Any:
        (found,) = [each for each in self.of(kind) if name is None or each["metadata"]["name"] == name]
        return found

    @property
    def template(self) -> Any:
        """Of the first group's pods."""
        return self.of("StatefulSet")[0]["spec"]["template"]

    @property
    def pod(self) -> Any:
        return self.template["spec"]

    @property
    def container(self) -> Any:
        (container,) = self.pod["containers"]
        return container

    @property
    def words(self) -> list[str]:
        """Command and arguments."""
        return [*self.container.get("command", []), *self.container.get("args", [])]

    @property
    def env(self) -> dict[str, Any]:
        """Each variable's value, or where it is from."""
        return {each["name"]: each.get("value", each.get("valueFrom")) for each in self.container["env"]}

    @property
    def mounts(self) -> dict[str, Any]:
        """The volume that is mounted at each path."""
        volumes = {each["name"]: each for each in self.pod["volumes"]}
        return {each["mountPath"]: volumes[each["name"]] for each in self.container["volumeMounts"]}

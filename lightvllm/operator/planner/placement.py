"""Affinity of a group's pods: what a placement group is in Ray.

A StatefulSet has one template, so its pods' terms are the same. With S = "the pods of this group":

* pods that hold whole stages (gpusPerPod is a multiple of tensorParallelSize): each prefers a node without S. The
  tensor-parallel group is inside a pod, therefore on a node.
* pods that hold a share of the only stage: each requires a node with S.
* pods that hold a share of one of several stages: each prefers a node with S. Which stage a pod is of, no term can say.
* ``groupKey``: each requires a value that S has. ``replicasKey``: each prefers a value that no other group has.

Kubernetes lets the first pod of a group through a required term that only its own group could fulfil.
"""

from __future__ import annotations

from typing import Any

from lightvllm.backends.k8s.labels import GROUP_LABEL
from lightvllm.operator.planner.layout import Layout
from lightvllm.operator.planner.names import Names
from lightvllm.operator.types import Spec

_WEIGHT = 100
_LESS = 50
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def affinity(spec: Spec, layout: Layout, names: Names, group: int) -> dict[str, Any]:
    """The pods' ``affinity``, to which the user's terms have been added; empty if there are none."""
    own = {"matchLabels": names.group_selector(group)}
    others = {
        "matchLabels": names.selector,
        "matchExpressions": [{"key": GROUP_LABEL, "operator": "NotIn", "values": [str(group)]}],
    }
    topology = spec.topology
    together: dict[str, list[Any]] = {REQUIRED: [], PREFERRED: []}
    apart: dict[str, list[Any]] = {REQUIRED: [], PREFERRED: []}
    if layout.pods > 1:
        if topology.stages == "Spread" and layout.whole_stages:
            apart[PREFERRED].append(_preferred(_WEIGHT, own, topology.node_key))
        elif topology.stages == "Spread" and layout.pipeline == 1:
            together[REQUIRED].append(_term(own, topology.node_key))
        elif topology.stages == "Spread":
            together[PREFERRED].append(_preferred(_WEIGHT, own, topology.node_key))
        if topology.group_key is not None:
            together[REQUIRED].append(_term(own, topology.group_key))
    if topology.replicas_key is not None:
        apart[PREFERRED].append(_preferred(_LESS, others, topology.replicas_key))
    return _merged({"podAffinity": together, "podAntiAffinity": apart}, spec.pod.affinity or {})


def _term(selector: dict[str, Any], key: str) -> dict[str, Any]:
    return {"labelSelector": selector, "topologyKey": key}


def _preferred(weight: int, selector: dict[str, Any], key: str) -> dict[str, Any]:
    return {"weight": weight, "podAffinityTerm": _term(selector, key)}


def _merged(ours: dict[str, dict[str, list[Any]]], given: dict[str, Any]) -> dict[str, Any]:
    """Lists of terms are joined; all else, such as nodeAffinity, is the user's."""
    result = {kind: terms for kind, terms in given.items() if kind not in ours}
    for kind, lists in ours.items():
        theirs = given.get(kind) or {}
        joined = {when: [*terms, *theirs.get(when, ())] for when, terms in lists.items()}
        rest = {when: terms for when, terms in theirs.items() if when not in lists}
        kept = {**{when: terms for when, terms in joined.items() if terms}, **rest}
        if kept:
            result[kind] = kept
    return result

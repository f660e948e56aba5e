"""Names of Kubernetes objects, labels and fields that lightvllm agrees upon with itself. Each is defined here alone.

The operator sets them, the router finds leaders by them. Imports nothing.

The object is an ``LLMInference`` (``lightvllm.io/v1``). Each of its replicas is a group of pods, one of which, the
leader, serves HTTP. Of such a pod:

* label ``lightvllm.io/llminference``: the name of its LLMInference, which is in the same namespace;
* label ``lightvllm.io/group``: which replica it is a pod of, from 0;
* label ``lightvllm.io/role``: ``leader``, or ``worker`` for the others of the group;
* the container port named ``http`` is where the API is served;
* the condition ``Ready`` says whether it may be sent requests.
"""

GROUP = "lightvllm.io"
VERSION = "v1"
PLURAL = "llminferences"
KIND = "LLMInference"

INFERENCE_LABEL = f"{GROUP}/llminference"
GROUP_LABEL = f"{GROUP}/group"
ROLE_LABEL = f"{GROUP}/role"
LEADER, WORKER = "leader", "worker"

POD_INDEX_LABEL = "apps.kubernetes.io/pod-index"
"""Kubernetes' own, on each pod of a StatefulSet; the leader's is 0."""

HTTP_PORT_NAME = "http"
HTTP_PORT = 8000
"""Port of a leader that names none."""

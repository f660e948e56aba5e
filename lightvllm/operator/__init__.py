"""``LLMInference``: what it is (``types``, ``rules``, ``crd``), and the objects that it becomes (``planner``).

All of it is pure: it talks to no cluster, starts nothing and imports neither engine nor worker. What applies the plan
and looks after it, the operator's own process, is not written yet: see docs/kubernetes.md.
"""

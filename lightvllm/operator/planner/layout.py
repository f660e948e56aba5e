"""How the workers of one group fill its pods.

    world  = tensorParallelSize × pipelineParallelSize
    pods   = world / gpusPerPod                            gpusPerPod: tensorParallelSize, if it is not given
    pod i  holds the ranks i × gpusPerPod … (i + 1) × gpusPerPod − 1
    rank r is of the stage r ÷ tensorParallelSize          (lightvllm/config.py, ParallelConfig)

Pure arithmetic; what does not come out even has been refused by the rules of ``types.Spec``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightvllm.operator.types import Spec


@dataclass(frozen=True)
class Layout:
    """Of one group.

    Attributes:
        tensor, pipeline: the parallel sizes.
        per_pod: workers of one pod.
    """

    tensor: int
    pipeline: int
    per_pod: int

    @classmethod
    def of(cls, spec: Spec) -> Layout:
        tensor = spec.tensor_parallel_size
        return cls(tensor, spec.pipeline_parallel_size, tensor if spec.gpus_per_pod is None else spec.gpus_per_pod)

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline

    @property
    def pods(self) -> int:
        return self.world // self.per_pod

    @property
    def whole_stages(self) -> bool:
        """Whether each pod holds whole stages, so that no tensor-parallel group crosses pods."""
        return self.per_pod % self.tensor == 0

    def ranks(self, pod: int) -> range:
        """Of the workers of a pod, in the order of their ports."""
        return range(pod * self.per_pod, (pod + 1) * self.per_pod)

    def stages(self, pod: int) -> range:
        """That a pod has a part in."""
        ranks = self.ranks(pod)
        return range(ranks[0] // self.tensor, ranks[-1] // self.tensor + 1)

"""Which process has which stages of which copy of the model, and the process groups that follow from it.

rank = replica * workers + worker          devices = workers x replicas
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_distopt.strategies.process_group import ProcessGroupStrategy

__all__ = ["StageGroups"]


class StageGroups(ProcessGroupStrategy):
    """Places stages on processes; a subclass says ``placement``.

    Args:
        **process_group: see :class:`ProcessGroupStrategy`.
    """

    def __init__(self, **process_group: Any) -> None:
        super().__init__(**process_group)
        self._pipe: dist.ProcessGroup | None = None
        self._siblings: dist.ProcessGroup | None = None
        self._messages: dist.ProcessGroup | None = None

    @property
    def placement(self) -> tuple[int, ...]:
        """Worker of each stage, known once processes are."""
        raise NotImplementedError

    @property
    def workers(self) -> int:
        """Processes that share one copy of the model."""
        return max(self.placement) + 1

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.placement)

    @property
    def worker(self) -> int:
        """Return this process's place in its pipeline."""
        return self.global_rank % self.workers

    @property
    def replica(self) -> int:
        """Which copy of the model this process belongs to."""
        return self.global_rank // self.workers

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.world_size // self.workers

    @property
    def logs_alike(self) -> bool:
        """Whether every process sees the same figures in evaluation; else they are averaged over processes."""
        return self.replicas == 1

    def rank_of(self, stage: int) -> int:
        """Return the global rank of the process that has a stage of this replica."""
        return self.replica * self.workers + self.placement[stage]

    def setup_environment(self) -> None:
        super().setup_environment()
        workers = self.workers
        if self.world_size % workers:
            raise ValueError(
                f"`devices` must be a multiple of the devices of one pipeline: got {self.world_size} for {workers}. Use "
                f"`devices={workers}`, or another number of stages."
            )
        self._pipe = self._siblings = self._messages = None
        if dist.get_backend() != "gloo":
            messages: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
            self._messages = messages
        if self.replicas > 1:  # every process takes part in making every group
            pipes: list[Any] = [
                dist.new_group(list(range(r * workers, (r + 1) * workers))) for r in range(self.replicas)
            ]
            places: list[Any] = [dist.new_group(list(range(w, self.world_size, workers))) for w in range(workers)]
            self._pipe, self._siblings = pipes[self.replica], places[self.worker]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.replicas, "rank": self.replica}

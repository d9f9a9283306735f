"""A launcher, a process group and the collectives that Lightning asks of a strategy: what is not particular to a method."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lightning_distopt.strategies.checks import choice, positive
from lightning_distopt.strategies.compat import connect_processes, launcher_for

__all__ = ["ProcessGroupStrategy", "StartMethod"]

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
_T = TypeVar("_T")


class ProcessGroupStrategy(ParallelStrategy):
    """One process a device, connected by a process group.

    Args:
        start_method: "popen" (the script is run again for each device), "spawn", "fork" or "forkserver".
        timeout: seconds that a process waits for another one, above 0.
        process_group_backend: of ``torch.distributed``; ``None`` is "gloo" on CPUs and "nccl" on CUDA devices.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: who knows the ranks; detected if ``None``.
        checkpoint_io: how files are written; Lightning's if ``None``.
        precision_plugin: set by the Trainer.
    """

    def __init__(
        self,
        start_method: StartMethod = "popen",
        timeout: float = 1800.0,
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self.start_method: StartMethod = choice("start_method", start_method, StartMethod)
        self.timeout = positive("timeout", timeout)
        self.process_group_backend = process_group_backend
        self._machines = 1

    @property
    def is_distributed(self) -> bool:
        """Lightning gives samplers by replica only to strategies that say so."""
        return True

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._machines

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._machines = num_nodes

    @property
    def num_processes(self) -> int:
        """Number of processes on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    def _configure_launcher(self) -> None:
        self._launcher = launcher_for(self, self.start_method)

    def setup_environment(self) -> None:
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        connect_processes(
            self.cluster_environment, self.process_group_backend, self.root_device, timedelta(seconds=self.timeout)
        )

    def set_world_ranks(self) -> None:
        """Tell the cluster environment this process's rank."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if not dist.is_initialized():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce(self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any = "mean") -> Tensor | Any:
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        mean = reduce_op is None or str(reduce_op).lower() in ("mean", "avg", "reduceop.avg", "redoptype.avg")
        op = dist.ReduceOp.SUM if mean or str(reduce_op).lower() == "sum" else reduce_op
        total = tensor.clone()
        dist.all_reduce(total, op=op, group=group)
        if not mean:
            return total
        return total / dist.get_world_size(group)

"""A launcher, a process group and the collectives that Lightning asks of a strategy: what is not particular to a method."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lightning_distopt.errors import CheckpointError
from lightning_distopt.exchange import network_failures, roll_call
from lightning_distopt.strategies import files
from lightning_distopt.strategies.checks import choice, positive
from lightning_distopt.strategies.compat import begin_next_epoch, connect_processes, is_interrupted, launcher_for
from lightning_distopt.strategies.watch import Watch, watched
from lightning_distopt.strategies.whole import read_safely

__all__ = ["ProcessGroupStrategy", "StartMethod"]

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
_T = TypeVar("_T")


class ProcessGroupStrategy(ParallelStrategy):
    """One process a device, connected by a process group; a failure of one ends the others with an error that names it.

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
        self.watch = Watch(self)

    _watched: ClassVar[dict[str, bool]] = {
        "setup": False,
        "training_step": False,
        "validation_step": False,
        "test_step": False,
        "predict_step": False,
        "backward": False,
        "optimizer_step": False,
        "lightning_module_state_dict": True,
        "optimizer_state": True,
        "save_checkpoint": True,
        "on_train_end": True,
    }
    """What Lightning calls while ranks depend on each other, and whether it does nothing but talk to them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, waiting in cls._watched.items():
            if name in vars(cls):
                setattr(cls, name, watched(vars(cls)[name], waiting))

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
        self.watch.begin()

    def set_world_ranks(self) -> None:
        """Tell the cluster environment this process's rank."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    # ---- when a rank fails ------------------------------------------------------------------------------------------

    @property
    def round(self) -> int:
        """Number of the step that this rank is in."""
        trainer = self._attached
        return 0 if trainer is None else int(trainer.global_step)

    @property
    def is_ending(self) -> bool:
        """Whether an exception is ending what the trainer does, so that other ranks may be anywhere."""
        trainer = self._attached
        return trainer is not None and is_interrupted(trainer)

    @property
    def _attached(self) -> pl.Trainer | None:
        """The trainer, once the module knows it."""
        with suppress(RuntimeError):
            return None if self.lightning_module is None else self.lightning_module.trainer
        return None

    @property
    def torn(self) -> bool:
        """Whether an exchange failed in the middle of a step, so that stages may not fit together."""
        return self.watch.torn

    def on_train_start(self) -> None:
        super().on_train_start()
        self.watch.guard_signals()
        assert self.lightning_module is not None
        begin_next_epoch(self.lightning_module.trainer)

    def on_exception(self, exception: BaseException) -> None:
        roll_call.leave_last_words(f"{type(exception).__name__}: {exception}")
        super().on_exception(exception)

    def teardown(self) -> None:
        self.watch.end()
        super().teardown()

    # ---- collectives of Lightning's ---------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        if not dist.is_initialized() or self.torn or self.is_ending:
            return  # the others are elsewhere
        with network_failures(self.global_rank, self.round, doing="meet at a barrier"):
            dist.barrier()

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if not dist.is_initialized():
            return obj
        objects = [obj]
        self.broadcast_objects(objects, src)
        return objects[0]

    def broadcast_objects(
        self, objects: list[Any], src: int, group: dist.ProcessGroup | None = None, doing: str = "broadcast an object"
    ) -> None:
        """Give all processes of a group the objects that one has; pickled, since ranks trust one another.

        Raises:
            ExchangeError: if it failed or timed out.
        """
        with network_failures(self.global_rank, self.round, doing=doing):
            dist.broadcast_object_list(objects, src, group=group)

    def reduce(self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any = "mean") -> Tensor | Any:
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        mean = reduce_op is None or str(reduce_op).lower() in ("mean", "avg", "reduceop.avg", "redoptype.avg")
        op = dist.ReduceOp.SUM if mean or str(reduce_op).lower() == "sum" else reduce_op
        total = tensor.clone()
        with network_failures(self.global_rank, self.round, doing="reduce a value"):
            dist.all_reduce(total, op=op, group=group)
        if not mean:
            return total
        return total / dist.get_world_size(group)

    # ---- files ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the file on rank 0, whole or not at all.

        Raises:
            CheckpointError: on all ranks, naming the path, if it could not be written; training can go on.
        """
        path, said = os.fspath(filepath), [""]
        if self.is_global_zero:
            write = partial(super().save_checkpoint, checkpoint, filepath, storage_options)
            try:
                files.save_checkpoint(checkpoint, path, self.checkpoint_io, write)
            except CheckpointError as error:
                said = [str(error)]
        if dist.is_initialized():
            self.broadcast_objects(said, 0)
        if said[0]:
            raise CheckpointError(said[0], path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # From the network, too, nothing is loaded that could run code, unless asked for.
        load = partial(super().load_checkpoint, checkpoint_path, weights_only=weights_only is not False)
        return read_safely(str(checkpoint_path), load)

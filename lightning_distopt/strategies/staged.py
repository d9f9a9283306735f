"""What all pipelines share beside the model's stages: data, replicas, averages, evaluation, ordinary checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_distopt.compressors import Compressor, Specification
from lightning_distopt.compressors.text import as_compressor
from lightning_distopt.exchange import Meter
from lightning_distopt.model_parallel.layered import batch_size_of, loss_of
from lightning_distopt.model_parallel.passage import Passage
from lightning_distopt.model_parallel.replicas import ReplicaFeedback, ReplicaMean
from lightning_distopt.model_parallel.structure import map_tensors
from lightning_distopt.resumable_loader import ResumableLoader
from lightning_distopt.strategies.announcements import Announced, Announcements
from lightning_distopt.strategies.named_optimizer import (
    load_state,
    merge_states,
    own_state,
)
from lightning_distopt.strategies.no_data import NO_BATCH, NoData, has_length
from lightning_distopt.strategies.progress import end_unless_inside, places_of, with_places
from lightning_distopt.strategies.random_states import collect_random_states, restore_random_states
from lightning_distopt.strategies.replica_state import check_added, merge_parts, state_for
from lightning_distopt.strategies.stage_averages import StageAverages
from lightning_distopt.strategies.staged_checks import checked_feedback, refuse_what_pipelines_cannot
from lightning_distopt.strategies.staged_model import StagedModel

__all__ = ["KEY", "StagedStrategy"]

KEY = "lightning_distopt_pipeline"
"""Of what pipelines add to a checkpoint."""


class StagedStrategy(StagedModel):
    """Base class of the pipelines; see its subclasses.

    Args:
        compressor: of gradients between replicas, as in ``CompressedDDPStrategy``; ``None`` sends them as they are.
        error_feedback: between replicas, "gradient" or "none"; ``None`` is "gradient" where the compressor needs it.
        **options: ``cuts``, ``balance``, ``memory_limit_mb`` of :class:`StagedModel`, and those of :class:`ProcessGroupStrategy`.
    """

    handles_window: ClassVar[bool] = False  # whether Lightning's accumulation of gradients applies
    updates_with_batches: ClassVar[bool] = False  # whether all stages update where Lightning counts a step

    def __init__(
        self,
        compressor: Compressor | Specification | str | None = None,
        error_feedback: ReplicaFeedback | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.compressor = None if compressor is None else as_compressor(compressor)
        self.error_feedback = checked_feedback(self.compressor, error_feedback)
        self._passage: Passage | None = None
        self.averages: list[StageAverages] = []
        self._seed = 0
        self._mean: ReplicaMean | None = None

    # ---- lifecycle --------------------------------------------------------------------------------------------------

    def _start_replicas(self) -> None:
        """Let all replicas of a stage start with the weights of the first."""
        self._mean = None
        if self._siblings is None:
            return
        for block in self.blocks.values():
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.numel():
                    dist.broadcast(tensor.detach(), self.worker, group=self._siblings)
        shared = self._seed - self.replica  # what replicas draw together must not depend on the replica
        own = {parameter: self._names[parameter] for parameter in self._own()}
        self._mean = ReplicaMean(own, self._siblings, self.meter, self.compressor, self.error_feedback, shared)

    def _start_averages(self, trainer: pl.Trainer) -> None:
        """Take over the averaging of weights from Lightning's callbacks."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.averages = [
            StageAverages(callback, self.blocks, self._every, alone=not self.updates_with_batches)
            for callback in callbacks
            if isinstance(callback, WeightAveraging)
        ]

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        refuse_what_pipelines_cannot(self, trainer, self.handles_window)
        module = self._module
        fitting = trainer.state.fn == TrainerFn.FITTING
        self.precision_plugin.convert_module(module)
        self.meter = Meter()
        self._seed = self.broadcast(int(os.environ.get("PL_GLOBAL_SEED", "0"))) + self.replica
        self._cut(module)
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        if fitting:
            self.setup_optimizers(trainer)
        self.model_to_device()
        if fitting:
            self._start_replicas()
            self._start_averages(trainer)
        ranks = [self.rank_of(stage) for stage in range(self.stages)]
        self._passage = Passage(self.blocks, ranks, self.global_rank, self.meter, self.timeout, self.root_device)
        self.setup_precision_plugin()

    def teardown(self) -> None:
        self._passage, self._mean, self.averages = None, None, []
        super().teardown()

    # ---- data -------------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: object) -> object:
        """Rank 0 of each pipeline reads data; the other ranks count batches, or hear of them where nobody can count."""
        reads = self.placement[0] == self.worker
        if self.workers == 1 or has_length(dataloader):
            return dataloader if reads else NoData(dataloader)
        reader = self.rank_of(0)
        first = self.replica * self.workers
        others = [rank for rank in range(first, first + self.workers) if rank != reader]
        words = Announcements(reader, others, self.global_rank, self.root_device)
        return Announced(dataloader, words) if reads else NoData(dataloader, words.hear)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch if batch is NO_BATCH else super().batch_to_device(batch, device, dataloader_idx)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def from_all(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures of all processes of this pipeline; each has names of its own."""
        parts: list[Any] = [figures] * self.workers
        if self.workers > 1:
            with self._failures("share figures"):
                dist.all_gather_object(parts, figures, group=self._pipe)
        return {name: value for part in parts for name, value in part.items()}

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._evaluate("val", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._evaluate("test", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            batch = args[0]
            x = None
            if batch is not NO_BATCH:
                x = self._module.split_batch(batch)[0] if isinstance(batch, (tuple, list)) else batch
            output, _ = self._passed(x, None)
            return self._from_last(output)

    def _evaluate(self, name: str, batch: Any, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        x, target = (None, None) if batch is NO_BATCH else module.split_batch(batch)
        output, target = self._passed(x, target)
        found = None
        if self.stages - 1 in self.blocks:
            found = {"loss": loss_of(module, output, target), **module.metrics(output, target)}, batch_size_of(output)
        figures, size = self._from_last(found)
        module.log_figures(name, figures, size)
        return figures["loss"]

    def _passed(self, x: Any, target: Any) -> tuple[Any, Any]:
        assert self._passage is not None
        return self._passage.run(x, target)

    def _from_last(self, found: Any) -> Any:
        if self.workers == 1:
            return found
        objects = [map_tensors(lambda t: t.detach().cpu(), found) if self.stages - 1 in self.blocks else None]
        with self._failures("share what came out of the last stage"):
            self.broadcast_objects(objects, self.rank_of(self.stages - 1), self._pipe)
        return map_tensors(lambda t: t.to(self.root_device), objects[0])

    def _begin_evaluation(self) -> None:
        assert self._passage is not None
        self._passage.forget()

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._begin_evaluation()

    def on_test_start(self) -> None:
        super().on_test_start()
        self._begin_evaluation()

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._begin_evaluation()

    # ---- the whole model --------------------------------------------------------------------------------------------

    def share_averages(self) -> None:
        """Let every process have the averages of the whole model, for Lightning's callbacks."""
        for averages in self.averages:
            averages.settle()
            if self.workers > 1:
                self._share(averages.every)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.share_weights()
        self.share_averages()
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        inner = getattr(optimizer, "optimizer", optimizer)
        part = own_state(inner, self._names)
        parts: list[Any] = [None] * self.workers
        if self.workers == 1:
            parts = [part]
        else:
            with self._failures("gather the optimizer's state"):
                dist.all_gather_object(parts, part, group=self._pipe)
        return merge_states(parts, self.layout)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if "optimizer_states" in checkpoint and self.blocks:
            end_unless_inside(checkpoint)
            parts: list[Any] = [(self.replica, self._own_part(checkpoint))]
            if self.world_size > 1:
                gathered: list[Any] = [None] * self.world_size
                with self._failures("gather the state of the replicas"):
                    dist.gather_object(parts[0], gathered if self.is_global_zero else None)
                parts = gathered
            if self.is_global_zero:
                checkpoint.setdefault(KEY, {})["replicas"] = merge_parts(parts, self.replicas)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _own_part(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return what this process has of the state of its replica, on the CPU."""
        part: dict[str, Any] = {} if self._mean is None else self._mean.state_dict()
        part = {**part, "random": {str(self.worker): collect_random_states()}}
        if 0 in self.blocks:  # it reads the data
            part = {**part, "loaders": list(places_of(checkpoint))}
        return map_tensors(Tensor.cpu, part)  # type: ignore[no-any-return]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        check_added(checkpoint.get(KEY, {}), str(checkpoint_path))
        saved = checkpoint.get(KEY, {}).get("replicas", [])
        if not saved:
            return checkpoint
        if len(saved) == self.replicas:
            return with_places(checkpoint, saved[self.replica].get("loaders", []))
        rank_zero_warn(
            f"`{checkpoint_path}` was written by {len(saved)} replicas and this run has {self.replicas}: residuals were merged "
            f"so that their mean is kept, and an epoch that was not over is drawn anew. Resume with {len(saved)} replicas for an "
            "exact continuation."
        )
        return with_places(checkpoint, [ResumableLoader.at_end(place) for place in places_of(checkpoint)])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_state(optimizer, saved, self._names, self.layout)
        mine = self._part_of(checkpoint)
        if self._mean is not None:
            self._mean.load_state_dict(mine)
        random = mine.get("random", {}).get(str(self.worker))
        if random is not None:
            restore_random_states(random)

    def _part_of(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint has for this replica."""
        return state_for(checkpoint.get(KEY, {}).get("replicas", []), self.replica, self.replicas)

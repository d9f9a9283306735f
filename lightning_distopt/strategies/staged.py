"""What all pipelines share: a layered model cut into stages, evaluation as a collective, ordinary checkpoints.

Every process builds the whole model on the CPU and keeps it there; only its own stages go to the device and are trained. At
checkpoints and at the end of a fit the owners broadcast their layers, so that files and processes hold the whole model
under its own names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.compressors import Compressor, Specification
from lightning_distopt.compressors.text import as_compressor
from lightning_distopt.exchange import Meter
from lightning_distopt.model_parallel.block import Block
from lightning_distopt.model_parallel.layered import LayeredModule, batch_size_of, checked_layers, loss_of
from lightning_distopt.model_parallel.partition import LayerCost, Partition, balance, costs_by_parameters, measure
from lightning_distopt.model_parallel.passage import Passage
from lightning_distopt.model_parallel.replicas import ReplicaFeedback, ReplicaMean
from lightning_distopt.model_parallel.structure import map_tensors
from lightning_distopt.resumable_loader import ResumableLoader
from lightning_distopt.strategies.checks import choice, positive
from lightning_distopt.strategies.loader_places import end_unless_inside, places_of, with_places
from lightning_distopt.strategies.named_optimizer import (
    Layout,
    keep_only,
    layout_of,
    load_state,
    merge_states,
    own_state,
)
from lightning_distopt.strategies.no_data import NO_BATCH, NoData
from lightning_distopt.strategies.random_states import collect_random_states, restore_random_states
from lightning_distopt.strategies.replica_state import check_added, merge_parts, state_for
from lightning_distopt.strategies.stage_averages import StageAverages
from lightning_distopt.strategies.stage_groups import StageGroups
from lightning_distopt.strategies.staged_checks import checked_feedback, refuse_what_pipelines_cannot

__all__ = ["KEY", "Balance", "StagedStrategy"]

KEY = "lightning_distopt_pipeline"
"""Of what pipelines add to a checkpoint."""
Balance = Literal["auto", "time", "parameters", "layers"]


class StagedStrategy(StageGroups):
    """Base class of the pipelines; see its subclasses.

    Args:
        cuts: index of the first layer of every stage but the first; ``None`` balances.
        balance: by what: measured "time" (needs ``example_input_array``), number of "parameters", number of "layers"; "auto" is
            "time" where there is an example, else "parameters".
        memory_limit_mb: most megabytes of parameters in one stage; ``None`` is no limit.
        compressor: of gradients between replicas, as in ``CompressedDDPStrategy``; ``None`` sends them as they are.
        error_feedback: between replicas, "gradient" or "none"; ``None`` is "gradient" where the compressor needs it.
        **process_group: see :class:`ProcessGroupStrategy`.
    """

    handles_window: ClassVar[bool] = False  # whether Lightning's accumulation of gradients applies
    updates_with_batches: ClassVar[bool] = False  # whether all stages update where Lightning counts a step

    def __init__(
        self,
        cuts: Sequence[int] | None = None,
        balance: Balance = "auto",
        memory_limit_mb: float | None = None,
        compressor: Compressor | Specification | str | None = None,
        error_feedback: ReplicaFeedback | None = None,
        **process_group: Any,
    ) -> None:
        super().__init__(**process_group)
        self.compressor = None if compressor is None else as_compressor(compressor)
        self.error_feedback = checked_feedback(self.compressor, error_feedback)
        self.cuts = None if cuts is None else tuple(cuts)
        self.balance: Balance = choice("balance", balance, Balance)
        self.memory_limit_mb = None if memory_limit_mb is None else positive("memory_limit_mb", memory_limit_mb)
        self.meter = Meter()
        self.partition: Partition | None = None
        self.blocks: dict[int, Block] = {}
        self.layout: Layout = []
        self._names: dict[nn.Parameter, str] = {}
        self._passage: Passage | None = None
        self.averages: list[StageAverages] = []
        self._seed = 0
        self._mean: ReplicaMean | None = None

    # ---- checks -----------------------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        scaled = getattr(precision_plugin, "scaler", None) is not None
        if scaled or getattr(precision_plugin, "precision", "") == "16-mixed":
            raise MisconfigurationException(
                f"`{type(self).__name__}` does not support `precision='16-mixed'`: a loss scale shared by all stages would be a "
                "lock between them. Use `precision='bf16-mixed'` or `'32-true'`."
            )
        self._precision_plugin = precision_plugin

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

    def _cut(self, module: LayeredModule) -> None:
        layers = checked_layers(module)
        names = tuple(layers)
        if self.cuts is not None and len(self.cuts) != self.stages - 1:
            raise ValueError(
                f"`cuts` must have one entry less than stages: got {list(self.cuts)} for {self.stages} stages. Write for example "
                f"{[len(names) * k // self.stages for k in range(1, self.stages)]}."
            )
        if len(names) < self.stages:
            most = max(1, len(names) * self.workers // self.stages)
            raise ValueError(
                f"`devices` must leave every stage a layer: got {self.stages} stages on {self.workers} devices for {len(names)} "
                f"layers. Use at most {most} of them for a copy of the model, or split `self.layers` finer."
            )
        found: Any = None
        if self.global_rank == 0:
            try:
                found = (
                    self._balanced(module, layers) if self.cuts is None else (self.cuts, costs_by_parameters(layers))
                )
            except (ValueError, MisconfigurationException) as error:
                found = error.with_traceback(None)
        found = self.broadcast(found)
        if isinstance(found, Exception):
            raise found  # on all ranks
        cuts, costs = found
        self.partition = Partition(names, tuple(cuts), costs)
        loss = module.loss if isinstance(module.loss, nn.Module) else None
        every = {
            k: Block({n: layers[n] for n in self.partition.names(k)}, loss if k == self.stages - 1 else None)
            for k in range(self.stages)
        }
        inside = {id(p) for block in every.values() for p in block.parameters()}
        outside = [name for name, p in module.named_parameters() if id(p) not in inside]
        if outside:
            raise MisconfigurationException(
                f"Every parameter must belong to `layers` or `loss`: got {outside} elsewhere. Move them into a layer."
            )
        self._check_shared(list(every.values()))
        self.blocks = {k: block for k, block in every.items() if self.placement[k] == self.worker}
        self._every = every
        rank_zero_info(f"{type(self).__name__}: {self.stages} stages\n{self.partition.table()}")

    def _balanced(self, module: LayeredModule, layers: Mapping[str, nn.Module]) -> tuple[tuple[int, ...], Any]:
        by_time = self._by_time(module)
        costs = self._measured(module, layers) if by_time else costs_by_parameters(layers)
        weights = [c.milliseconds for c in costs] if by_time else [float(c.parameters) for c in costs]
        if self.balance == "layers":
            weights = [1.0] * len(costs)
        memory = [float(sum(p.nbytes for p in layer.parameters())) for layer in layers.values()]
        limit = None if self.memory_limit_mb is None else self.memory_limit_mb * 2**20
        return balance(weights, self.stages, memory, limit), costs

    def _measured(self, module: LayeredModule, layers: Mapping[str, nn.Module]) -> tuple[LayerCost, ...]:
        return measure(layers, module.example_input_array, device=self.root_device)

    def _by_time(self, module: LayeredModule) -> bool:
        """Whether layers are balanced by measured time.

        Raises:
            MisconfigurationException: if that was asked for and there is nothing to measure with.
        """
        example = module.example_input_array
        if self.balance == "time" and example is None:
            raise MisconfigurationException(
                "`balance='time'` needs an input to measure with: got no `example_input_array`. Set it in the module, or use "
                "`balance='parameters'`."
            )
        return self.balance == "time" or (self.balance == "auto" and example is not None)

    def _check_shared(self, blocks: Sequence[Block]) -> None:
        """Refuse, or prepare for, parameters that several stages share."""
        raise NotImplementedError

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) != 1:
            raise MisconfigurationException(
                f"`{type(self).__name__}` needs one optimizer: got {len(self.optimizers)}. Use parameter groups."
            )
        optimizer = self.optimizers[0]
        try:
            self.layout = layout_of(optimizer, self._names)
        except KeyError:
            raise MisconfigurationException(
                "`configure_optimizers` must step parameters of the module: got others among them. Register them "
                "in `layers` or `loss`."
            ) from None
        keep_only(optimizer, self._own())

    def _own(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(p for block in self.blocks.values() for p in block.parameters()))

    def model_to_device(self) -> None:
        if self.root_device.type == "cpu":
            return
        with self._only_own():
            self._module.to(self.root_device)

    @contextmanager
    def _only_own(self) -> Iterator[None]:
        """Take the layers of other processes out of the module for a moment."""
        layers = self._module.layers
        kept = {name: layer for block in self.blocks.values() for name, layer in block.layers.items()}
        foreign = {name: layer for name, layer in layers.named_children() if name not in kept}
        loss = (
            self._module.loss
            if isinstance(self._module.loss, nn.Module) and self.stages - 1 not in self.blocks
            else None
        )
        for name in foreign:
            setattr(layers, name, nn.Identity())
        if loss is not None:
            self._module.loss = nn.Identity()
        try:
            yield
        finally:
            for name, layer in foreign.items():
                setattr(layers, name, layer)
            if loss is not None:
                self._module.loss = loss

    @property
    def _module(self) -> LayeredModule:
        assert isinstance(self.lightning_module, LayeredModule)
        return self.lightning_module

    def teardown(self) -> None:
        self._passage, self._mean, self.averages = None, None, []
        super().teardown()

    # ---- data -------------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: object) -> object:
        """Rank 0 of each pipeline reads data; the other ranks count batches."""
        return dataloader if self.placement[0] == self.worker else NoData(dataloader)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch if batch is NO_BATCH else super().batch_to_device(batch, device, dataloader_idx)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def from_all(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the figures of all processes of this pipeline; each has names of its own."""
        parts: list[Any] = [figures] * self.workers
        if self.workers > 1:
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

    def share_weights(self) -> None:
        """Let every process have the whole model: owners broadcast their layers."""
        if self.workers > 1 and self.blocks:
            self._share(self._every)

    def _share(self, every: Mapping[int, Block]) -> None:
        sent: set[int] = set()
        for stage, block in every.items():
            tensors = [t for t in (*block.parameters(), *block.buffers()) if t.numel() and id(t) not in sent]
            sent.update(map(id, tensors))  # what several stages share is the same parameter in each process
            for tensor in tensors:
                value = tensor.detach().to(self.root_device).contiguous()
                dist.broadcast(value, self.rank_of(stage), group=self._pipe)
                if stage not in self.blocks:
                    with torch.no_grad():
                        tensor.copy_(value)

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
            dist.all_gather_object(parts, part, group=self._pipe)
        return merge_states(parts, self.layout)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if "optimizer_states" in checkpoint and self.blocks:
            end_unless_inside(checkpoint)
            parts: list[Any] = [(self.replica, self._own_part(checkpoint))]
            if self.world_size > 1:
                gathered: list[Any] = [None] * self.world_size
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

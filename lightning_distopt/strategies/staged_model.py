"""A layered model cut into stages, one or several a process, which all know the whole of it.

Every process builds the whole model on the CPU and keeps it there; only its own stages go to the device and are trained. At
checkpoints and at the end of a fit the owners broadcast their layers, so that files and processes hold the whole model
under its own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_distopt.exchange import Meter, network_failures
from lightning_distopt.model_parallel.block import Block
from lightning_distopt.model_parallel.layered import LayeredModule, checked_layers
from lightning_distopt.model_parallel.partition import (
    LayerCost,
    Partition,
    balance,
    costs_by_parameters,
    measure,
    megabytes,
)
from lightning_distopt.strategies.checks import choice, positive
from lightning_distopt.strategies.named_optimizer import Layout, keep_only, layout_of
from lightning_distopt.strategies.stage_groups import StageGroups
from lightning_distopt.strategies.staged_checks import checked_cuts

__all__ = ["Balance", "StagedModel"]

Balance = Literal["auto", "time", "parameters", "layers"]


class StagedModel(StageGroups):
    """Gives each process its stages of the model.

    Args:
        cuts: index of the first layer of every stage but the first; ``None`` balances.
        balance: by what: measured "time" (needs ``example_input_array``), number of "parameters", number of "layers"; "auto" is
            "time" where there is an example, else "parameters".
        memory_limit_mb: most megabytes of parameters in one stage; ``None`` is no limit.
        **process_group: see :class:`ProcessGroupStrategy`.

    Attributes:
        partition: which layers belong to which stage.
        blocks: the stages of this process.
        layout: names of the parameters in each group of the optimizer.
        meter: counts what travels.
    """

    def __init__(
        self,
        cuts: Sequence[int] | None = None,
        balance: Balance = "auto",
        memory_limit_mb: float | None = None,
        **process_group: Any,
    ) -> None:
        super().__init__(**process_group)
        self.cuts = None if cuts is None else checked_cuts(cuts)
        self.balance: Balance = choice("balance", balance, Balance)
        self.memory_limit_mb = None if memory_limit_mb is None else positive("memory_limit_mb", memory_limit_mb)
        self.meter = Meter()
        self.partition: Partition | None = None
        self.blocks: dict[int, Block] = {}
        self.layout: Layout = []
        self._every: dict[int, Block] = {}
        self._names: dict[nn.Parameter, str] = {}

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

    # ---- stages -----------------------------------------------------------------------------------------------------

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
        return balance(weights, self.stages, megabytes(layers), self.memory_limit_mb), costs

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

    def _failures(self, doing: str, *, only: bool = True) -> AbstractContextManager[None]:
        """Give errors of collectives a type, the rank, the step and what was being done."""
        return network_failures(self.global_rank, self._module.trainer.global_step, doing=doing, only=only)

    @property
    def _module(self) -> LayeredModule:
        assert isinstance(self.lightning_module, LayeredModule)
        return self.lightning_module

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
                with self._failures(f"share the weights of stage {stage}"):
                    dist.broadcast(value, self.rank_of(stage), group=self._pipe)
                if stage not in self.blocks:
                    with torch.no_grad():
                        tensor.copy_(value)

"""Pipelines with stale gradients as Lightning strategies: one training batch is one tick of every worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange.meter import ring_all_reduce_bytes
from lightning_distopt.model_parallel.connect import connect, settle
from lightning_distopt.model_parallel.layered import batch_size_of, loss_of
from lightning_distopt.model_parallel.stage import BnUpdate, Stage
from lightning_distopt.model_parallel.staleness import StalenessPlan
from lightning_distopt.model_parallel.structure import map_tensors
from lightning_distopt.model_parallel.trace import Trace, chrome_trace
from lightning_distopt.model_parallel.worker import Worker, deposit, finite
from lightning_distopt.strategies.checks import choice, count, flag, positive
from lightning_distopt.strategies.compat import silence_sigterm_broadcast
from lightning_distopt.strategies.no_data import NO_BATCH
from lightning_distopt.strategies.pipeline_monitor import PipelineMonitor
from lightning_distopt.strategies.planned import PlannedStrategy
from lightning_distopt.strategies.progress import epochs_over
from lightning_distopt.strategies.schedule_clock import ScheduleClock
from lightning_distopt.strategies.stage_update import nothing_to_clip, rescaled
from lightning_distopt.strategies.staged import KEY

__all__ = ["NonFinite", "StalePipelineStrategy"]

NonFinite = Literal["skip", "raise"]


class StalePipelineStrategy(PlannedStrategy):
    """Train the layers of a model in a pipeline that is never flushed: gradients are some batches old, and no device waits.

    Each device has a block of layers. In every training batch ("tick") it forwards one batch, back-propagates an earlier one
    and updates its own weights, all devices at once; it waits for nothing but the message it needs next. What is learned
    is exactly what ``lightning_distopt.model_parallel.simulate`` learns in one process with the same plan.

    The model must be a ``LayeredModule``. Rank 0 alone reads data. Gradient clipping is per device (a common norm would mix
    batches). Optimizer and schedulers act by each device's own count of updates, and not before its first gradient;
    schedulers with ``interval="epoch"`` step when the last batch of the epoch is learned from. ``trainer.global_step`` counts
    batches. Before validation, checkpoints and the end of the fit the pipeline is drained: all batches that entered are
    learned from. Losses are logged when they come back, some batches late.

    Memory a device: its layers, their optimizer state, the stored inputs (or graphs) and weight versions of the plan's
    table. Each process also holds the whole model in host memory.

    Args:
        plan: a ``StalenessPlan``, or its name: "naive", "ddg", "features_replay", "pipedream", "pipedream_2bw", "dsp",
            "ouroboros", "dsp(p;m)".
        stages: of a plan given by its name; ``None`` is as many as devices. With fewer there are ``devices / stages`` replicas of
            each stage, which average their gradients; samplers share out the data among them.
        accumulate: batches whose mean gradient makes one update, >= 1; ``None`` leaves it to the plan. Fewer updates mean fewer
            weight versions between a batch's forward and its backward.
        timetable: "free", or "barrier" to reproduce the locking of older papers; ``None`` leaves it to the plan.
        drain_every_epoch: let the pipeline run empty at the end of each epoch, at the cost of filling it again.
        bn_update: whose run updates running statistics where a forward is run twice: "forward", "backward" or "both".
        lr_rescale_steps: PipeMare's learning-rate rescheduling: stage k begins at ``lr / max(1, m_k / accumulate)`` and reaches
            ``lr`` after this many updates; 0 is off.
        non_finite: what a stage does whose gradient is not finite: "skip" its own update (counted in ``skipped``) or "raise".
        trace: keep the times of all work of the fit, for ``strategy.save_trace(path)``.
        latency_ms: delay added to every message, for experiments, in milliseconds.
        **options: of all pipelines: ``cuts``, ``balance``, ``memory_limit_mb``, ``compressor``, ``error_feedback``,
            ``start_method``, ``timeout`` (seconds a stage waits for its neighbour), ``process_group_backend``; see
            ``StagedStrategy``.

    Raises:
        ValueError: for values that cannot work, with the cure.

    Source: ``docs/pipeline.md`` names the paper of each plan and the differences.
    """

    strategy_name: ClassVar[str] = "stale_pipeline"
    counts_bytes: ClassVar[bool] = True  # all that is sent in a fit is in ``meter``

    def __init__(
        self,
        plan: StalenessPlan | str = "dsp",
        stages: int | None = None,
        accumulate: int | None = None,
        timetable: Literal["free", "barrier"] | None = None,
        drain_every_epoch: bool = True,
        bn_update: BnUpdate = "forward",
        lr_rescale_steps: int = 0,
        non_finite: NonFinite = "skip",
        trace: bool = False,
        latency_ms: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(plan, stages, accumulate, timetable, **options)
        self.drain_every_epoch = flag("drain_every_epoch", drain_every_epoch)
        self.bn_update: BnUpdate = choice("bn_update", bn_update, BnUpdate)
        self.lr_rescale_steps = count("lr_rescale_steps", lr_rescale_steps, 0)
        self.non_finite: NonFinite = choice("non_finite", non_finite, NonFinite)
        self.latency_ms = positive("latency_ms", latency_ms) if latency_ms else 0.0
        self.trace = Trace() if trace else None
        self.skipped = 0
        self.clock = ScheduleClock()
        self.engine: Worker | None = None
        self.figures: dict[int, dict[str, Tensor]] = {}
        self.batch_size = 1
        self._deposits: dict[nn.Parameter, Tensor] | None = None
        self._loss = torch.zeros(())
        self._epoch_is_over = False
        self._ended: dict[str, int] | None = None
        self._dense_bytes = 0
        self._modes: dict[nn.Module, bool] = {}

    # ---- lifecycle --------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._build()
            silence_sigterm_broadcast(trainer)
            if not any(isinstance(callback, PipelineMonitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                trainer.callbacks.insert(0, PipelineMonitor())  # type: ignore[attr-defined]

    def _build(self) -> None:
        plan, module, last = self.plan, self._module, self.stages - 1
        hops = connect(
            plan,
            [self.rank_of(stage) for stage in range(self.stages)],
            self.global_rank,
            self.meter,
            self.timeout,
            self.root_device,
            latency=self.latency_ms * 1e-3,
        )

        def finish(output: Any, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss = loss_of(module, output, target)
            with torch.no_grad():
                return loss, dict(module.metrics(output, target))

        stages = {
            k: Stage(k, plan, block, finish if k == last else None, self._seed, self.bn_update, self.root_device)
            for k, block in self.blocks.items()
        }
        record = self.trace.add if self.trace is not None else None
        self.engine = Worker(plan, stages, hops, self.precision_plugin.train_step_context, record)
        self.skipped = 0
        self.figures = {}

        trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        self._dense_bytes = ring_all_reduce_bytes(trained, self.world_size)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        self.clock = ScheduleClock(self.lr_scheduler_configs)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.drain()
        if self.engine is not None:
            settle(self.engine.hops)
        self.share_weights()

    def teardown(self) -> None:
        self._ended, self.engine = self._counts, None
        super().teardown()

    # ---- one tick ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int = 0, *args: Any, **kwargs: Any) -> Tensor:
        assert self.engine is not None
        trainer = self._module.trainer
        self._epoch_is_over = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        if self._epoch_is_over:
            last = self.engine.batches + self.engine.tick
            self.clock.epoch_ends_with(last)
            for averages in self.averages:
                averages.epoch_ends_with(last)
        if self.engine.tick == 0 or batch_idx == 0:
            self._modes = {module: module.training for block in self.blocks.values() for module in block.modules()}
        if batch_idx == 0:
            self.engine.forget()
        pair = None
        if batch is not NO_BATCH:
            pair = self._module.split_batch(batch)
            self.batch_size = batch_size_of(pair[0])
        self._tick(pair)
        return self._loss

    def _tick(self, pair: tuple[Any, Any] | None) -> None:
        assert self.engine is not None
        self._deposits = self._take(self.engine.run_tick(pair))
        if self.plan.timetable == "barrier":
            dist.barrier(self._pipe)

    def _take(self, tick: Any) -> dict[nn.Parameter, Tensor] | None:
        self.figures.update(tick.figures)
        if tick.figures:
            self._loss = tick.figures[max(tick.figures)]["loss"].detach()
        return self._averaged(tick.updates)

    def _averaged(self, updates: dict[nn.Parameter, Tensor] | None) -> dict[nn.Parameter, Tensor] | None:
        return updates if updates is None or self._mean is None else self._mean.average(updates)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Hand over the gradients that this tick made; nothing happens while the pipeline fills."""
        if self._deposits is None:
            return closure_loss
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        deposit(self._deposits)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self._module)
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(
        self, optimizer: Optimizer, closure: Any, model: pl.LightningModule | nn.Module | None = None, **kwargs: Any
    ) -> Any:
        output = closure()
        self._update(optimizer, **kwargs)
        trainer = self._module.trainer
        ends = (
            -1 < trainer.max_steps <= trainer.global_step + 1
        )  # what comes back after the last batch would not be logged
        if (self._epoch_is_over and self.drain_every_epoch) or ends:
            self.drain()
        return output

    def _update(self, optimizer: Optimizer, **kwargs: Any) -> None:
        deposits, self._deposits = self._deposits, None
        if deposits is None:
            return
        assert self.engine is not None
        if finite(deposits):
            with rescaled(optimizer, self.rate_factor), nothing_to_clip(not deposits):
                self.precision_plugin.optimizer_step(
                    optimizer, model=self._module, closure=lambda: self._loss, **kwargs
                )
        else:
            self._not_finite()
        optimizer.zero_grad()
        self.engine.updated()
        learned = self.engine.learned()
        if self.engine.newest_updated:
            self.meter.step(self._dense_bytes)
        self.clock.updated(
            max(learned.values(), default=-1),
            lambda scheduler: self._module.lr_scheduler_step(scheduler, None),
            counts=self.engine.newest_updated,
        )
        for averages in self.averages:
            averages.updated({stage: learned[stage] for stage in self.engine.brought})

    def _not_finite(self) -> None:
        self.skipped += 1
        where = (
            f"Stage {'/'.join(map(str, self.blocks))} on rank {self.global_rank} got a gradient that is not "
            f"finite in its update {self.updates}"
        )
        if self.non_finite == "raise":
            raise NonFiniteError(f"{where}. Lower the learning rate, clip, or use `non_finite='skip'`.")
        if self.skipped == 1:
            rank_zero_warn(f"{where}, and skips such updates; the other stages go on. `pipeline/skipped` counts them.")

    @property
    def updates(self) -> int:
        """Updates of this device so far; of its least stale stage, where it has several."""
        return self.clock.updates

    @property
    def rate_factor(self) -> float:
        """What this worker's learning rate is multiplied by in the next update; 1 without rescheduling."""
        if not self.lr_rescale_steps:
            return 1.0
        late = max(self.plan.staleness[k] for k in self.blocks)
        tau = max(1.0, late / self.plan.accumulate)
        return float(tau ** -(1.0 - min(self.updates / self.lr_rescale_steps, 1.0)))

    @property
    def non_finite_steps(self) -> int:
        """Updates that this device skipped, under the name that all strategies have for it."""
        return self.skipped

    # ---- drain ------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Learn from all batches that have entered; every rank must call it after the same batch."""
        engine = self.engine
        if engine is None or not engine.in_flight:
            return
        optimizer = self.optimizers[0]
        # Validation, whose hook may call this, runs in eval and inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            modes = self._set_modes(self._modes)
            for _ in range(engine.drain_ticks()):
                self._tick(None)
                self._drained_update(optimizer)
            self._deposits = self._averaged(engine.take_rest())
            self._drained_update(optimizer)
            self._set_modes(modes)
        engine.restart()

    @staticmethod
    def _set_modes(modes: Mapping[nn.Module, bool]) -> dict[nn.Module, bool]:
        """Set train or eval mode of each module by itself; return the modes before."""
        before = {module: module.training for module in modes}
        for module, mode in modes.items():
            module.training = mode
        return before

    def _drained_update(self, optimizer: Optimizer) -> None:
        if self._deposits is not None:
            self.backward(self._loss, optimizer)
            self._update(optimizer)

    def on_validation_start(self) -> None:
        self.drain()
        super().on_validation_start()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.drain()
        return super().lightning_module_state_dict()

    def save_trace(self, path: str | Path) -> None:
        """Write what all workers did when, as a file for Perfetto; every rank must call it, with ``trace=True``.

        Raises:
            ValueError: without ``trace=True``.
        """
        if self.trace is None:
            raise ValueError("`save_trace` needs `trace=True` in the strategy: got False. Pass it.")
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, (self.global_rank, self.trace.work))
        if self.is_global_zero:
            Path(path).write_text(json.dumps(chrome_trace(parts)))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._counts is not None and "optimizer_states" in checkpoint:
            checkpoint[KEY] = dict(self._counts)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @property
    def _counts(self) -> dict[str, int] | None:
        """What this device has done; after a fit what it had done at its end."""
        if self.engine is None:
            return self._ended
        return {"batches": self.engine.batches, "updates": self.updates, "epochs": self.clock.epochs}

    def _own_part(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        part = super()._own_part(checkpoint)
        if self.engine is None or self._epoch_is_over:  # the next epoch begins with none
            return part
        states = {name: state for stage in self.engine.stages.values() for name, state in stage.states.items()}
        return {**part, "states": map_tensors(Tensor.cpu, states)}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        assert self.engine is not None
        # Where another strategy has saved it, each of its steps was an update of all stages.
        counts = {"batches": 0, "updates": checkpoint["global_step"], "epochs": epochs_over(checkpoint)}
        counts.update(checkpoint.get(KEY, {}))
        self.engine.batches = counts["batches"]
        self.clock.updates, self.clock.epochs = counts["updates"], counts["epochs"]
        for averages in self.averages:
            averages.begin(counts["updates"], counts["epochs"])
        self.engine.restart()
        saved = self._part_of(checkpoint).get("states", {})
        for stage in self.engine.stages.values():
            mine = {name: saved[name] for name in stage.block.layers if name in saved}
            stage.states = map_tensors(lambda t: t.to(self.root_device), mine)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        from lightning_distopt.strategies.registry import register

        register(strategy_registry)

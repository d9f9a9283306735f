"""A NaN in one rank's gradient: all ranks do the same in the same step, and nothing of it stays anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_distopt.callbacks import CommunicationMonitor
from tests.strategies.everything import assert_same
from tests.strategies.faulty import Fault, LayeredFaulty
from tests.strategies.fits import Agree, distance, fit, gathered
from tests.strategies.models import Net
from tests.strategies.rows import PIPELINES, build, crossed, kind, rows_and

pytestmark = pytest.mark.timeout(100)
BAD = 3  # the step


class Bad(Net):
    """Rank 1's loss is multiplied by something in one step.

    Args:
        factor: of that loss.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        bad = self.trainer.global_step == BAD and self.global_rank == 1
        return loss * self.factor if bad else loss  # type: ignore[operator]


class Watching(Callback):
    """The skipped step leaves everything as it was; at the end, everything is finite and all ranks have counted alike."""

    def __init__(self, skips: bool) -> None:
        self.skips = skips
        self.before: Any = None

    def state(self, trainer: Trainer, module: Any) -> Any:
        strategy = trainer.strategy
        engine = (strategy.update_sync or strategy.gradient_sync).state_dict()
        momentum = trainer.optimizers[0].state_dict()["state"]
        kept = {key: engine.get(key, {}) for key in ("residuals", "server", "shards", "mean")}
        held = {"weights": dict(module.named_parameters()), "engine": kept, "momentum": momentum}
        return torch.utils._pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, held)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.before = self.state(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if self.skips and trainer.global_step == BAD + 1:
            assert trainer.strategy.non_finite_steps == 1
            assert_same(self.before, self.state(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        tensors = [t for t in torch.utils._pytree.tree_leaves(self.state(trainer, pl_module)) if torch.is_tensor(t)]
        assert all(bool(t.isfinite().all()) for t in tensors)
        assert gathered(torch.tensor(trainer.strategy.non_finite_steps)) == [torch.tensor(1)] * trainer.world_size


@crossed({"skip": "skip", "zero": "zero"})
def test_training_goes_on_and_nothing_of_it_stays(row: str, case: str) -> None:
    hooks = [Agree(), Watching(case == "skip")]
    bad = fit(Bad(float("nan")), build(row, non_finite=case), 8, callbacks=hooks)
    if case == "zero":
        assert distance(bad, fit(Bad(0.0), build(row), 8)) == 0, "as if the gradient had been zero"


class WatchingStages(Watching):
    """The same on a device of a synchronous pipeline."""

    def state(self, trainer: Trainer, module: Any) -> Any:
        names = {name: p.detach().clone() for name, p in module.named_parameters() if p in set(trainer.strategy._own())}
        momentum = trainer.optimizers[0].state_dict()["state"]
        held = {"weights": names, "momentum": momentum}
        return torch.utils._pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, held)


@pytest.mark.parametrize("policy", ["skip", "zero"])
@rows_and(normal=("pipeline",), rows=[row for row in PIPELINES if kind(row) == "synchronous"])
def test_devices_of_a_synchronous_pipeline_agree(row: str, policy: str, tmp_path: Path) -> None:
    """One device's gradient, and what it sends to those before it, is bad in one step; ``test_faults.py`` has "raise"."""
    hooks = [WatchingStages(policy == "skip")]
    fit(LayeredFaulty(Fault("nan", tmp_path)), build(row, non_finite=policy), 8, callbacks=hooks)


def test_without_a_nan_the_policy_changes_nothing() -> None:
    for row, policy in (("compressed_ddp", "skip"), ("compressed_ddp_topk", "zero")):
        assert distance(fit(Net(), build(row, non_finite=policy), 4), fit(Net(), build(row), 4)) == 0


def test_inside_a_round_and_while_accumulating_all_ranks_skip_together() -> None:
    for arguments, loop in (({"sync_every": 2}, {}), ({}, {"accumulate_grad_batches": 2})):
        hooks = [Watching(False)]
        fit(Bad(float("inf")), build("compressed_ddp", non_finite="skip", **arguments), 6, callbacks=hooks, **loop)


def test_the_steps_are_logged(tmp_path: Path) -> None:
    class Logged(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            assert trainer.callback_metrics["feedback/non_finite_steps"] == 1

    settings = {"log_every_n_steps": 1, "logger": CSVLogger(tmp_path)}
    hooks = [CommunicationMonitor(table=False), Logged()]
    fit(Bad(float("nan")), build("compressed_ddp", non_finite="skip"), 8, callbacks=hooks, **settings)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="`non_finite` must be one of 'raise', 'skip', 'zero': got 'ignore'"):
        build("compressed_ddp", non_finite="ignore")

"""Fits in which gradients are compressed inside backward: every name, with what Lightning does around it."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_distopt.callbacks import CommunicationMonitor
from tests.strategies.fits import Agree, At, Failures, compressed, distance, fit
from tests.strategies.models import Manual, Net

GRADIENT = {"error_feedback": "gradient"}


class Falling(Net):
    """The loss of the last batches is below that of the first."""

    def on_train_start(self) -> None:
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def on_train_end(self) -> None:
        assert sum(self.losses[-5:]) < 0.9 * sum(self.losses[:5])


@pytest.mark.parametrize("name", ["topk", "sign", "bingrad", "orq", "powersgd", "bf16"])
def test_a_fit_by_name_learns_and_all_ranks_agree(name: str) -> None:
    fit(Falling(), f"compressed_ddp_{name}_fork", 40, callbacks=[Agree()])


def test_a_fit_with_the_majoritys_sign_learns() -> None:
    strategy = compressed(compressor="signsgd", error_feedback="none")
    module = Falling(optimizer=lambda params: torch.optim.SGD(params, lr=0.005))
    fit(module, strategy, 40, callbacks=[Agree()])


def test_uncompressed_it_is_ddp() -> None:
    """Residuals are 0 then, whatever the learning rate does."""
    module = {"step_size": 3}
    ddp = fit(Net(**module), "ddp_fork")
    assert distance(fit(Net(**module), compressed(compressor="fp32", **GRADIENT)), ddp) == 0


@pytest.mark.parametrize("compressor", ["topk:0.1", "powersgd:1"])
def test_learning_rates_are_those_of_the_steps_own_groups(compressor: str) -> None:
    class TwoGroups(Net):
        def configure_optimizers(self) -> Any:
            weights, biases = [[p for p in self.parameters() if (p.dim() > 1) is wide] for wide in (True, False)]
            optimizer = torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.01}], lr=0.08)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]

    def check(trainer: Trainer, module: Net) -> None:
        rates = trainer.strategy.gradient_sync.memory.rates
        for name, p in module.named_parameters():
            first = 0.08 if p.dim() > 1 else 0.01
            assert rates[name] == pytest.approx(first * 0.5 ** (trainer.global_step - 1))

    fit(TwoGroups(), compressed(compressor=compressor, **GRADIENT), 4, callbacks=[At(train_batch_end=check)])


class Partial(Net):
    """Every third batch leaves a branch out, on rank 0 only or on both."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        out = self(inputs)
        if batch_idx % 3 == 0 or (batch_idx % 3 == 1 and self.global_rank == 1):
            out = out + self.branch(inputs)
        return nn.functional.mse_loss(out, targets)


@pytest.mark.parametrize("compressor", ["sign", "powersgd:1"])
@pytest.mark.parametrize("settings", [{"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
def test_unused_parameters_and_views_of_buckets(compressor: str, settings: Any) -> None:
    module = Partial() if "find_unused_parameters" in settings else Net()
    fit(module, compressed(compressor=compressor, **GRADIENT, **settings), 9, callbacks=[Agree()])


def test_a_parameter_that_no_rank_uses_keeps_its_residual() -> None:
    def check(trainer: Trainer, module: Partial) -> None:
        e = trainer.strategy.gradient_sync.state_dict()["residuals"]["branch.weight"].clone()
        if trainer.global_step == 3:
            assert torch.equal(e, module.before)
            assert bool(e.any())
            assert torch.equal(module.branch.weight, module.weight)
        module.before, module.weight = e, module.branch.weight.detach().clone()

    strategy = compressed(compressor="topk:0.1", find_unused_parameters=True, **GRADIENT)
    fit(Partial(), strategy, 4, callbacks=[Agree(), At(train_batch_end=check)])


def test_accumulation_averages_once_a_step() -> None:
    def check(trainer: Trainer, module: Net) -> None:
        assert trainer.strategy.gradient_sync.rounds == trainer.global_step

    settings = {"accumulate_grad_batches": 3, "callbacks": [Agree(), At(train_batch_end=check)]}
    fit(Net(batches=9), compressed(compressor="topk:0.1", **GRADIENT), 3, **settings)


class ManualSteps(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization() -> None:
    fit(ManualSteps(), compressed(compressor="powersgd:1", **GRADIENT), 8, callbacks=[Agree()])


class BrokenGradient(Net):
    """In step 3, rank 1's gradient of one parameter holds a NaN."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 3 and self.global_rank == 1:
            self.net[3].weight.register_hook(lambda gradient: gradient * float("nan"))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("compressor", ["sign", "powersgd:1"])
def test_all_ranks_stop_promptly_and_name_the_culprit(tmp_path: Path, compressor: str) -> None:
    notes = Failures(tmp_path).fit(BrokenGradient(), compressed(compressor=compressor, **GRADIENT), callbacks=[Agree()])
    assert len(notes) == 2
    for note in notes:
        assert re.match(r"NonFiniteError: In step 3 the gradient of `net\.3\.weight` holds a NaN .* on rank 1", note)


class Stalling(Net):
    """In step 3, rank 1 takes longer than the others wait; DDP's broadcast of buffers may notice first."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 3 and self.global_rank == 1:
            time.sleep(8)
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize("error_feedback", ["step_ahead", "gradient"])
def test_a_rank_that_stalls_ends_the_others_with_a_typed_error(tmp_path: Path, error_feedback: str) -> None:
    strategy = compressed(error_feedback=error_feedback, timeout=timedelta(seconds=5))
    notes = Failures(tmp_path).fit(Stalling(), strategy)
    assert len(notes) == 2
    for rank, note in enumerate(notes):
        assert note.startswith(f"ExchangeError: In step 3 rank {rank} could not ")


def test_the_monitor_shows_the_norm_of_the_residuals() -> None:
    def check(trainer: Trainer, module: Net) -> None:
        norm = float(trainer.callback_metrics["feedback/residual_norm"])
        assert norm == pytest.approx(trainer.strategy.gradient_sync.residual_norm(), rel=1e-6)
        assert norm > 0
        assert "feedback/mismatch" not in trainer.callback_metrics

    callbacks = [CommunicationMonitor(mismatch_every=1, table=False), At(train_batch_end=check)]
    fit(Net(), compressed(compressor="topk:0.1", **GRADIENT), 4, callbacks=callbacks, log_every_n_steps=1)

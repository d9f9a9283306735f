"""What Lightning's loops offer works with the strategy: clipping, precision, closures, evaluation, odd step functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.data import DistributedSampler

from tests.strategies.fits import (
    Agree,
    At,
    assert_same_on_all_ranks,
    compressed,
    distance,
    fit,
    flat,
    gathered,
    trainer,
)
from tests.strategies.models import Net

# --- gradient clipping ----------------------------------------------------------------------------------------------


def gradients(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.double().reshape(-1) for p in module.parameters() if p.grad is not None])


class Stepped(Net):
    """Plain SGD; asserts that the common model moved by the mean of the local gradients as clipping left them."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda params: SGD(params, lr=0.1))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.before = flat(self)

    def on_train_batch_end(self, *args: Any) -> None:
        local = gathered(gradients(self))
        assert not torch.equal(*local)
        torch.testing.assert_close(flat(self), self.before - 0.1 * sum(local) / 2, rtol=0, atol=1e-6)
        if self.trainer.gradient_clip_algorithm == "value":
            assert all(gradient.abs().max() <= 0.011 for gradient in local)
        elif self.trainer.gradient_clip_val:
            assert all(gradient.norm() <= 0.011 for gradient in local)


@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_clipping_acts_on_local_gradients_before_the_exchange(algorithm: str | None) -> None:
    clip = 0.01 if algorithm else None
    fit(Stepped(), compressed(compressor="fp32"), gradient_clip_val=clip, gradient_clip_algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_acts_on_averages_without_error_feedback(algorithm: str) -> None:
    arguments = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    ours = fit(Net(), compressed(compressor="fp32", error_feedback="none"), **arguments)
    assert distance(ours, fit(Net(), "ddp_fork", **arguments)) < 1e-6


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_bf16_mixed_computes_in_bfloat16_and_exchanges_float32(error_feedback: str) -> None:
    class Mixed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            assert self.net[0](batch[0]).dtype is torch.bfloat16
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args: Any) -> None:
            assert all(p.dtype is torch.float32 for p in self.parameters())

    strategy = compressed(compressor="fp32", error_feedback=error_feedback)
    ours = fit(Mixed(), strategy, precision="bf16-mixed", callbacks=[Agree()])
    # weights that differ by float32's rounding may round to neighbours in bfloat16
    assert distance(ours, fit(Net(), "ddp_fork", precision="bf16-mixed")) < 1e-2


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_parameters_of_another_dtype_agree(precision: str, dtype: torch.dtype) -> None:
    def check(trainer: Trainer, module: Net) -> None:
        assert all(p.dtype is dtype for p in module.parameters())

    fit(Net(), compressed(), precision=precision, callbacks=[Agree(), At(train_batch_end=check)])


# --- closures and step functions ------------------------------------------------------------------------------------


def test_lbfgs_calls_its_closure_several_times_and_exchanges_once() -> None:
    calls: list[Tensor] = []

    class Closures(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(flat(self))
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args: Any) -> None:
            assert len(calls) > 2
            assert not torch.equal(calls[0], calls[1])
            calls.clear()
            assert self.trainer.strategy.meter.steps == self.trainer.global_step

    def lbfgs(params: Any) -> Optimizer:
        return LBFGS(params, lr=0.1, max_iter=4)

    fit(Closures(optimizer=lbfgs), compressed(), 4, callbacks=[Agree()])


@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_a_step_function_that_steps_every_second_batch_equals_ddp(error_feedback: str) -> None:
    class Skipping(Net):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
        ) -> None:
            if batch_idx % 2:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    ours = fit(Skipping(), compressed(compressor="fp32", error_feedback=error_feedback), callbacks=[Agree()])
    assert distance(ours, fit(Skipping(), "ddp_fork")) < 1e-6
    fit(Skipping(), compressed(), callbacks=[Agree()])


def test_an_optimizer_stepped_past_lightning_in_the_step_function_is_exchanged() -> None:
    class Bare(Net):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
        ) -> None:
            optimizer.optimizer.step(closure=optimizer_closure)

    assert distance(fit(Bare(), compressed(), callbacks=[Agree()]), fit(Net(), compressed())) == 0


@pytest.mark.parametrize("past_lightning", [False, True])
def test_a_step_function_that_steps_after_the_closure_equals_ddp(past_lightning: bool) -> None:
    class Separate(Net):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
        ) -> None:
            optimizer_closure()
            (optimizer.optimizer if past_lightning else optimizer).step()

    arguments = {"steps": -1, "max_epochs": 2}  # steps past Lightning do not count
    ours = fit(Separate(), compressed(compressor="fp32"), callbacks=[Agree()], **arguments)
    assert distance(ours, fit(Separate(), "ddp_fork", **arguments)) < 1e-6
    assert distance(fit(Separate(), compressed(), callbacks=[Agree()], **arguments), fit(Net(), compressed())) == 0


def test_an_accumulation_schedule_equals_ddp() -> None:
    def schedule() -> list[Any]:
        return [GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})]

    ours = fit(Net(), compressed(compressor="fp32"), 12, callbacks=[*schedule(), Agree()])
    assert distance(ours, fit(Net(), "ddp_fork", 12, callbacks=schedule())) < 1e-6


def test_the_learning_rate_finder_leaves_no_trace() -> None:
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-2, num_training_steps=5, update_attr=False)

    def untouched(trainer: Trainer, module: Net) -> None:
        assert len(finder.optimal_lr.results["lr"]) == 5
        assert trainer.global_step == 0
        assert trainer.strategy.update_sync.residual_norm() == 0

    class Found(Net):
        lr = 0.1

    arguments = {"enable_checkpointing": True, "callbacks": [finder, At(train_epoch_start=untouched)]}
    assert distance(fit(Found(), compressed(), 5, **arguments), fit(Net(), compressed(), 5)) == 0


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_validate_and_test_see_what_ddp_sees() -> None:
    results = {}
    for strategy in ("compressed_ddp_fork", "ddp_fork"):
        (validated,) = trainer(strategy, limit_val_batches=1).validate(Net(), verbose=False)
        (tested,) = trainer(strategy).test(Net(), verbose=False)
        results[strategy] = (validated, tested)
    assert results["compressed_ddp_fork"] == results["ddp_fork"]


def test_predict_runs_on_every_rank(tmp_path: Path) -> None:
    def leave_a_trace(trainer: Trainer, module: Net) -> None:
        (tmp_path / str(trainer.global_rank)).touch()

    predictor = trainer("compressed_ddp_fork", callbacks=[At(predict_epoch_end=leave_a_trace)])
    predictor.predict(Net(), return_predictions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_the_model_that_comes_back_from_a_fit_is_the_common_one(tmp_path: Path) -> None:
    def keep(trainer: Trainer, module: Net) -> None:
        if trainer.is_global_zero:
            torch.save(module.state_dict(), tmp_path / "state.pt")

    ours = fit(Net(), compressed(), callbacks=[At(train_end=keep)])
    assert distance(ours, torch.load(tmp_path / "state.pt")) == 0


# --- data and devices -----------------------------------------------------------------------------------------------


def test_loaders_get_a_distributed_sampler() -> None:
    def check(trainer: Trainer, module: Net) -> None:
        sampler = trainer.train_dataloader.sampler
        assert isinstance(sampler, DistributedSampler)
        assert (sampler.num_replicas, sampler.rank) == (2, trainer.global_rank)

    fit(Net(), compressed(), 2, use_distributed_sampler=True, callbacks=[At(train_start=check)])


def test_seeded_runs_repeat() -> None:
    runs = [fit(Net(dropout=0.5), compressed(compressor="random_block:0.3"), 6) for _ in range(2)]
    assert distance(*runs) == 0


def test_fast_dev_run() -> None:
    fit(Net(), compressed(), steps=-1, fast_dev_run=2, callbacks=[Agree()])


def test_a_metric_is_reduced_over_the_ranks() -> None:
    def check(trainer: Trainer, module: Net) -> None:
        assert_same_on_all_ranks(trainer.callback_metrics["val_loss"])

    fit(Net(), compressed(), 5, limit_val_batches=1, callbacks=[At(validation_end=check)])


class OwnSeed(Net):
    """Every rank seeds itself, as is usual under ``ddp``."""

    def setup(self, stage: str) -> None:
        seed_everything(7 + self.trainer.global_rank, verbose=False)


@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_ranks_with_seeds_of_their_own_draw_alike_what_they_share(error_feedback: str) -> None:
    strategy = compressed(compressor="random_block:0.3", error_feedback=error_feedback)
    fit(OwnSeed(), strategy, 4, callbacks=[Agree()])

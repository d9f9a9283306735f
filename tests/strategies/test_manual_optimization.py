"""Manual optimization: several optimizers, several steps a batch, steps in odd places; for SGD all equal to `ddp`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import SGD

from tests.strategies.fits import Agree, At, Failures, State, compressed, distance, fit, flat, gathered, warnings_to
from tests.strategies.models import Manual

DDP = "ddp_fork_find_unused_parameters_true"  # each loss uses a part of the parameters


class Gan(Manual):
    """Two players in turn; the discriminator steps three times in one ``training_step``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.judge = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self) -> Any:
        players = self.net, self.judge
        return [SGD(player.parameters(), lr=0.005, momentum=0.9, weight_decay=0.01) for player in players]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        making, judging = self.optimizers()
        self.toggle_optimizer(judging)
        for _ in range(3):
            loss = self.judge(self.net(inputs).detach()).mean() - self.judge(targets).tanh().mean()
            judging.zero_grad()
            self.manual_backward(loss)
            judging.step()
        self.untoggle_optimizer(judging)
        self.toggle_optimizer(making)
        making.zero_grad()
        self.manual_backward(-self.judge(self.net(inputs)).tanh().mean())
        making.step()
        self.untoggle_optimizer(making)


class Accumulating(Manual):
    """Steps after every third ``training_step``."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 3)
        if (batch_idx + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()


class Shared(Manual):
    """The first layer belongs to both optimizers."""

    def configure_optimizers(self) -> Any:
        first, *_, last = self.net
        return [
            SGD([*layers.parameters(), *first.parameters()], lr=0.05, momentum=0.9) for layers in (self.net[1], last)
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class Bare(Manual):
    """Steps the optimizer itself, past Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Late(Manual):
    """Steps when the batch is over."""

    past_lightning = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.loss(batch))

    def on_train_batch_end(self, *args: Any) -> None:
        self.optimizers(use_pl_optimizer=not self.past_lightning).step()


class LateAndBare(Late):
    past_lightning = True


class Closure(Manual):
    """Gives the optimizer a closure."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


EVERY = [Gan, Accumulating, Shared, Bare, Late, LateAndBare, Closure]


def run(module: type[Manual], strategy: Any, epochs: int = 4, **arguments: Any) -> State:
    """Fit for some epochs: steps past Lightning do not count as steps."""
    return fit(module(batches=6), strategy, -1, max_epochs=epochs, **arguments)


@cache
def by_ddp(module: type[Manual]) -> State:
    return run(module, DDP)


@pytest.mark.parametrize("module", EVERY)
def test_float32_equals_ddp(module: type[Manual]) -> None:
    ours = run(module, compressed(compressor="fp32"), callbacks=[Agree()])
    assert distance(ours, by_ddp(module)) < 1e-6


@pytest.mark.parametrize("module", [Gan, Accumulating])
def test_float32_equals_ddp_without_error_feedback(module: type[Manual]) -> None:
    strategy = compressed(compressor="fp32", error_feedback="none", find_unused_parameters=True)
    ours = run(module, strategy, callbacks=[Agree()])
    assert distance(ours, by_ddp(module)) < 1e-6


@pytest.mark.parametrize("module", EVERY)
def test_compressed_every_rank_holds_the_same_model_after_every_batch(module: type[Manual]) -> None:
    run(module, compressed(compressor="topk:0.2", averaging_period=3), 2, callbacks=[Agree()])


@pytest.mark.parametrize("module", [Gan, Shared, Late])
def test_every_loss_is_taken_at_y(module: type[Manual]) -> None:
    class Watched(module):
        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self.trainer.global_step > 3:
                for player in self.children():  # those stepped before in the same batch, too
                    mine, theirs = gathered(flat(player))
                    assert not torch.equal(mine, theirs)
            super().manual_backward(loss, *args, **kwargs)

    run(Watched, compressed(), 2, callbacks=[Agree()])


def test_one_y_serves_a_window_of_several_training_steps() -> None:
    class Watched(Accumulating):
        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx % 3:
                assert torch.equal(flat(self), self.y)
            self.y = flat(self)
            super().manual_backward(loss, *args, **kwargs)

    run(Watched, compressed(), callbacks=[Agree()])


def test_each_optimizer_step_is_one_exchange_of_its_parameters() -> None:
    def check(trainer: Trainer, module: Gan) -> None:
        making, judging = trainer.strategy.update_sync._groups
        assert judging.rounds == 3 * making.rounds
        assert trainer.strategy.meter.steps == trainer.global_step

    run(Gan, compressed(), 1, callbacks=[At(train_batch_end=check)])


def test_several_local_steps_of_two_optimizers_agree_at_the_end_of_their_rounds() -> None:
    run(Gan, compressed(sync_every=3), 2, callbacks=[At(fit_end=Agree().on_train_batch_end)])


def test_parameters_changed_after_a_step_are_mentioned(tmp_path: Path) -> None:
    class Clipped(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            for weight in self.judge.parameters():
                weight.data.clamp_(-0.05, 0.05)

    with warnings_to(tmp_path / "warnings"):
        run(Clipped, compressed(), 1)
    said = (tmp_path / "warnings").read_text()
    assert said.count("`training_step` changed parameters, and no optimizer's step followed") == 1
    assert "`on_train_batch_end`" in said


def test_a_step_by_hand_is_mentioned(tmp_path: Path) -> None:
    class ByHand(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None

    with warnings_to(tmp_path / "warnings"):
        run(ByHand, compressed(), 1)
    said = (tmp_path / "warnings").read_text()
    assert said.count("`training_step` changed parameters, and no optimizer's step followed") == 1
    assert "let an optimizer make the change" in said


class SharpnessAware(SGD):
    """Steps an optimizer of its own, at weights that it has moved and moved back (SAM)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05)
        self.inner = SGD(self.param_groups, lr=0.05)

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["before"] = p.clone()
                p.add_(p.grad, alpha=0.01)
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["before"])
        self.inner.step()
        self.zero_grad()


class SharpnessAwareModule(Manual):
    def configure_optimizers(self) -> Any:
        return SharpnessAware(self.net.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.loss(batch))
        optimizer.climb()
        self.manual_backward(self.loss(batch))
        optimizer.descend()


def test_an_optimizer_that_steps_another_one_trains_as_under_ddp() -> None:
    # with one step a batch of a linear optimizer, the average of the steps is the step of the average, but for the climb
    assert distance(run(SharpnessAwareModule, compressed(compressor="fp32")), run(SharpnessAwareModule, DDP)) < 0.01
    run(SharpnessAwareModule, compressed(), callbacks=[Agree()])


class OwnOptimizer(Manual):
    """Hides its optimizer from Lightning."""

    def configure_optimizers(self) -> Any:
        self.own = SGD(self.net.parameters(), lr=0.05)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.own.step()
        self.own.zero_grad()


class OneOfTwo(OwnOptimizer):
    """Returns an optimizer of the last layer, and hides that of the first."""

    def configure_optimizers(self) -> Any:
        self.own = SGD(self.net[0].parameters(), lr=0.05)
        return SGD(self.net[-1].parameters(), lr=0.05)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("module", [OwnOptimizer, OneOfTwo])
def test_an_optimizer_that_lightning_does_not_know_is_refused(module: type[Manual], tmp_path: Path) -> None:
    for note in Failures(tmp_path).fit(module(), compressed()):
        assert "SGD steps `net.0.weight` and was not returned from `configure_optimizers`" in note
        assert "`error_feedback='none'`" in note


def test_parameters_changed_between_batches_stay_changed() -> None:
    class Clipped(Gan):
        def on_train_batch_end(self, *args: Any) -> None:
            for weight in self.judge.parameters():
                weight.data.clamp_(-0.05, 0.05)

    ours = run(Clipped, compressed(compressor="fp32"), callbacks=[Agree()])
    assert distance(ours, run(Clipped, DDP)) < 1e-6
    assert float(ours["judge.0.weight"].abs().max()) <= 0.05


def test_an_optimizer_of_nobody_is_refused() -> None:
    class Stray(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.trainer.strategy.optimizer_step(SGD(self.parameters(), lr=0.1), lambda: None)

    with pytest.raises(Exception, match=r"none of the strategy's 1 optimizers\. Return every optimizer"):
        run(Stray, compressed(), 1)


def test_buffers_are_broadcast_once_a_batch() -> None:
    sent: list[int] = []

    def check(trainer: Trainer, module: Gan) -> None:
        sent.append(trainer.strategy.meter.sent["buffers"])

    def constant(trainer: Trainer, module: Gan) -> None:
        if trainer.is_global_zero:
            once = sum(buffer.nbytes for buffer in module.buffers())
            assert sent == [once * batches for batches in range(1, 7)]

    run(Gan, compressed(), 1, callbacks=[At(train_batch_end=check, train_end=constant)])

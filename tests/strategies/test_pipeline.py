"""Synchronous pipelines on real processes: what one device learns, to rounding."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_distopt import PipelineStrategy
from tests.model_parallel.models import batches_of
from tests.strategies.fits import At, Failures, distance, trainer
from tests.strategies.pipelines import Chain, Predicts, fit_pipeline

SCHEDULE = partial(torch.optim.lr_scheduler.StepLR, step_size=7, gamma=0.7)
CHAIN = partial(Chain, 4, norm=False, dropout=0.0, schedule=SCHEDULE)


def piped(schedule: Any = "1f1b", **options: Any) -> PipelineStrategy:
    settings = {"start_method": "fork", "timeout": 20, "balance": "layers", "microbatches": 4}
    return PipelineStrategy(schedule=schedule, **{**settings, **options})


def chain(size: int = 8, last: int | None = None, batches: int = 10) -> Chain:
    made = CHAIN()
    made.data = list(batches_of(batches, size))
    if last is not None:
        x, y = made.data[-1]
        made.data[-1] = x[:last], y[:last]
    return made


class Tied(Chain):
    """The first and the last of four layers share their weight."""

    def __init__(self) -> None:
        super().__init__(4, norm=False, dropout=0.0)
        layer = nn.Linear(6, 6).double()
        layer.load_state_dict(self.layers[0][0].state_dict())
        self.layers[2][0] = layer
        self.layers[2][0].weight = self.layers[0][0].weight
        self.data = list(batches_of(10, 8))


@pytest.mark.parametrize(
    ("schedule", "devices", "arguments", "last", "epochs"),
    [
        ("1f1b", 2, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3}, 3, 5),
        ("1f1b", 3, {}, 6, 1),
        ("gpipe", 2, {}, None, 1),
        ("interleaved", 2, {"gradient_clip_val": 0.3}, None, 1),
        ("zero_bubble", 2, {}, None, 1),
    ],
)
def test_steps_are_those_of_one_device(
    schedule: str, devices: int, arguments: dict[str, Any], last: int | None, epochs: int
) -> None:
    """Momentum, weight decay, a schedule; accumulation, clipping by the common norm, a short last batch; 50 and 10 steps."""
    alone, together = chain(last=last), chain(last=last)
    expected = fit_pipeline(alone, "auto", 1, max_epochs=epochs, **arguments)
    found = fit_pipeline(together, piped(schedule), devices, max_epochs=epochs, **arguments)
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("schedule", "devices", "clip"), [("1f1b", 4, None), ("1f1b", 4, 0.3), ("interleaved", 2, 0.3)]
)
def test_shared_weights_are_summed_and_counted_once(schedule: str, devices: int, clip: float | None) -> None:
    """On different devices, and in two stages of one."""
    alone, together = Tied(), Tied()
    expected = fit_pipeline(alone, "auto", 1, gradient_clip_val=clip)
    found = fit_pipeline(together, piped(schedule), devices, gradient_clip_val=clip)
    assert distance(found, expected) < 1e-12


def test_losses_evaluation_and_optimizer_state() -> None:
    alone, together = chain(), chain()
    losses: list[Any] = []

    def check(trainer: Trainer, module: Any) -> None:
        assert module.seen["train"] == pytest.approx(losses, rel=1e-12)
        assert "train/accuracy" in trainer.callback_metrics
        assert "val/loss" in trainer.callback_metrics
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])
        assert list(state["state"]) == list(range(8))

    alone.validation = together.validation = 3
    fit_pipeline(alone, "auto", 1, limit_val_batches=3)
    losses += alone.seen["train"]
    fit_pipeline(together, piped(), 2, limit_val_batches=3, callbacks=[At(train_end=check)])
    with torch.no_grad():
        wanted = [alone(x) for x, _ in alone.data]
    together.load_state_dict(alone.state_dict())
    trainer(piped(), devices=2, callbacks=[Predicts(wanted, 1e-12)]).predict(together, return_predictions=False)


def test_arguments_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match=r"schedule.*'dsp'"):
        PipelineStrategy(schedule="dsp")
    with pytest.raises(ValueError, match="2 for 3 stages"):
        PipelineStrategy(stages=3, microbatches=2)
    with pytest.raises(ValueError, match=r"chunks_per_device.*3"):
        PipelineStrategy(schedule="zero_bubble", chunks_per_device=3)
    with pytest.raises(Exception, match=r"multiple.*2 for 3"):
        fit_pipeline(chain(), piped(stages=3), 2)


@pytest.mark.slow
def test_a_hanging_neighbour_is_a_typed_error(tmp_path: Path) -> None:
    class Hanging(nn.Module):
        calls = 0

        def forward(self, x: Any) -> Any:
            Hanging.calls += torch.is_grad_enabled()
            if Hanging.calls == 9:
                time.sleep(5)
            return x

    module = chain()
    module.layers = nn.Sequential(*module.layers[:-1], nn.Sequential(Hanging(), module.layers[-1]))
    errors = Failures(tmp_path).fit(module, PipelineStrategy(start_method="fork", timeout=2, balance="layers"))
    assert len(errors) == 2
    assert re.match(
        r"ExchangeError: In step \d rank 0 could not pass batch \d through stage 0 with .*`timeout`", errors[0]
    )

"""Averaged weights in pipelines: what one device averages, or, with stale gradients, what each stage of the simulation does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn

from lightning_distopt import PipelineStrategy, StalePipelineStrategy
from lightning_distopt.model_parallel import StalenessPlan
from tests.model_parallel.models import batches_of
from tests.strategies.fits import At, State, distance, trainer
from tests.strategies.pipelines import MOMENTUM, Chain, equal, fit_pipeline, simulated

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
FORKED: dict[str, Any] = {"start_method": "fork", "timeout": 20, "balance": "layers"}
DECAY = 0.7


def ema(**options: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=DECAY, **options)


class Averages:
    """An optimizer for the simulation that averages what it has stepped, after each of its steps from ``start`` on.

    Args:
        start: index of the first step that counts.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.of: dict[Tensor, Tensor] = {}
        self.steps: dict[Tensor, int] = {}

    def make(self, parameters: Any) -> torch.optim.Optimizer:
        optimizer = MOMENTUM(list(parameters))
        optimizer.register_step_post_hook(lambda made, *_: [self.take(p) for p in made.param_groups[0]["params"]])
        return optimizer

    def take(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        step = self.steps[parameter] = self.steps.get(parameter, -1) + 1
        if step >= self.start:
            now = parameter.detach()
            old = self.of.get(parameter)
            self.of[parameter] = now.clone() if old is None else DECAY * old + (1 - DECAY) * now

    def show(self, module: nn.Module) -> State:
        """Return the averages by name; weights that were not averaged as they are."""
        return {name: self.of.get(p, p.detach()) for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("plan", "devices", "options", "start"),
    [
        ("dsp", 3, {}, 0),
        ("pipedream", 2, {"drain_every_epoch": False}, 4),
        ("ddg", 2, {"accumulate": 3}, 0),
        ("ouroboros", 2, {}, 2),
    ],
)
def test_each_stage_averages_by_its_own_updates(plan: str, devices: int, options: dict[str, Any], start: int) -> None:
    """Nothing is averaged in the fill, and all updates of a drain are; the end leaves the averages in the model."""
    epochs, averages = 2, Averages(start)
    module = partial(Chain, 3, batches=7, norm=False)
    plain, accumulate = module(), options.get("accumulate", 1)
    stages = 3 if plan == "ouroboros" else devices
    cuts = {2: [1], 3: [1, 2]}[stages]
    made = StalenessPlan.preset(plan, stages, accumulate=accumulate)
    drained = options.get("drain_every_epoch", True)
    if not drained:
        plain.data = plain.data * epochs
    plain.make = averages.make
    simulated(plain, made, epochs=epochs if drained else 1, cuts=cuts)
    strategy = StalePipelineStrategy(plan, cuts=cuts, **FORKED, **options)
    callback = ema(update_starting_at_step=start)
    found = fit_pipeline(module(), strategy, devices, max_epochs=epochs, callbacks=[callback])
    assert distance(found, averages.show(plain)) < 1e-15


def test_validation_sees_the_average_and_training_goes_on_without_it() -> None:
    averages = Averages()
    plan = StalenessPlan.preset("dsp", 2)
    from lightning_distopt.model_parallel.simulate import Simulation

    module = Chain(2, batches=6, norm=False, dropout=0.0)
    simulation = Simulation(list(module.layers), nn.functional.cross_entropy, plan, averages.make)
    wanted = []
    for half in (module.data[:3], module.data[3:]):
        simulation.run(half)
        with torch.no_grad():
            outputs = [torch.func.functional_call(module, averages.show(module), (x,)) for x, _ in module.data[:2]]
            wanted += [float(module.loss(o, y)) for o, (_, y) in zip(outputs, module.data, strict=False)]

    def check(trainer: Trainer, module: Any) -> None:
        assert module.seen["val"] == pytest.approx(wanted, rel=1e-12)

    found = fit_pipeline(
        Chain(2, batches=6, norm=False, dropout=0.0, validation=2),
        StalePipelineStrategy("dsp", **FORKED),
        2,
        val_check_interval=3,
        limit_val_batches=2,
        callbacks=[ema(), At(train_end=check)],
    )
    assert distance(found, averages.show(module)) < 1e-15


@pytest.mark.parametrize("strategy", ["stale", "synchronous"])
def test_a_resumed_average_goes_on_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    """A checkpoint holds the average as its weights, and those of training beside them, of all stages."""

    def made() -> Any:
        return StalePipelineStrategy("dsp", **FORKED) if strategy == "stale" else PipelineStrategy(**FORKED)

    chain = partial(Chain, 2, batches=5, dropout=0.0, norm=strategy == "stale")
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    whole = fit_pipeline(chain(), made(), 2, callbacks=[ema(), saver], **options)
    last = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert equal(last["state_dict"], whole)
    assert int(last["averaging_state"]["n_averaged"]) == 15
    assert not equal(last["current_model_state"], whole)
    resumed = chain()
    trainer(made(), -1, 2, max_epochs=3, callbacks=[ema()]).fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert equal(dict(resumed.state_dict()), whole)
    alone = chain()
    trainer("auto", -1, 1, max_epochs=2, callbacks=[ema()]).fit(alone, ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.mark.parametrize(
    ("schedule", "callback"), [("1f1b", ema), pytest.param("interleaved", WeightAveraging, marks=pytest.mark.slow)]
)
def test_a_synchronous_pipeline_averages_as_one_device(schedule: Any, callback: Any) -> None:
    def module() -> Chain:
        made = Chain(4, norm=False, dropout=0.0, validation=2)
        made.data = list(batches_of(6, 4))
        return made

    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 2}
    alone = fit_pipeline(module(), "auto", 1, callbacks=[callback()], **options)
    strategy = PipelineStrategy(schedule=schedule, microbatches=4, **FORKED)
    assert distance(fit_pipeline(module(), strategy, 2, callbacks=[callback()], **options), alone) < 1e-12

"""A layered model, fits of it in a pipeline, and what the simulator says about them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distopt import LayeredModule
from lightning_distopt.model_parallel import StalenessPlan
from lightning_distopt.model_parallel.simulate import Simulation
from tests.model_parallel.models import batches_of, layers
from tests.strategies.fits import State, trainer

MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


class Chain(LayeredModule):
    """A few layers; nothing in it knows about pipelines."""

    def __init__(
        self,
        count: int = 3,
        batches: int = 8,
        make: Callable[..., Any] = MOMENTUM,
        schedule: Callable[..., Any] | None = None,
        interval: str = "step",
        dropout: float = 0.3,
        norm: bool = True,
        last: int | None = None,
        validation: int = 0,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers(count, dropout, norm))
        self.data = list(batches_of(batches))
        if last is not None:  # a short last batch
            x, y = self.data[-1]
            self.data[-1] = x[:last], y[:last]
        self.make, self.schedule, self.interval, self.validation = make, schedule, interval, validation
        self.seen: dict[str, list[float]] = {}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(1) == target).double().mean()}

    def log_figures(self, stage: str, figures: dict[str, Any], size: int) -> None:
        self.seen.setdefault(stage, []).append(float(figures["loss"].detach()))
        super().log_figures(stage, figures, size)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": self.interval},
        }

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(self.data[: self.validation], batch_size=None) if self.validation else []

    def test_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=None)

    predict_dataloader = test_dataloader


def fit_pipeline(module: LayeredModule, strategy: Any, devices: int = 3, **arguments: Any) -> State:
    """Fit and return the state that the module has afterwards."""
    trainer(strategy, -1, devices, **{"max_epochs": 1, **arguments}).fit(module)
    return {name: value.clone() for name, value in module.state_dict().items()}


def simulated(
    module: Chain, plan: StalenessPlan, epochs: int = 1, cuts: list[int] | None = None, **options: Any
) -> tuple[State, list[float]]:
    """Train a fresh copy of the chain in one process, drained after each epoch."""
    edges = [0, *(cuts or range(1, plan.stages)), len(module.layers)]
    blocks = [module.layers[a:b] for a, b in itertools.pairwise(edges)]
    simulation = Simulation(blocks, nn.functional.cross_entropy, plan, module.make, **options)
    losses = [loss for _ in range(epochs) for loss in simulation.run(module.data)]
    return {name: value.clone() for name, value in module.state_dict().items()}, losses


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Predicts(Callback):
    """Asserts in every process that predictions are these, to a tolerance."""

    def __init__(self, wanted: list[Tensor], tolerance: float = 0.0) -> None:
        self.wanted, self.tolerance = wanted, tolerance

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        assert float((outputs - self.wanted[batch_idx]).abs().max()) <= self.tolerance

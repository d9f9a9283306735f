"""Small modules whose batches are fixed by rank, so that two strategies can be compared number by number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import LayeredModule

BATCH = 16
FEATURES = 6


def data(rank: int, batches: int, features: int = FEATURES, size: int = BATCH) -> TensorDataset:
    """Return ``batches`` batches that no other rank has."""
    generator = torch.Generator().manual_seed(100 + rank)
    inputs = torch.randn(batches * size, features, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].sin() + 0.1 * rank)


def network(dropout: float = 0.0) -> nn.Sequential:
    """Return a network with a buffer of every kind, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers[:3], *([nn.Dropout(dropout)] if dropout else []), layers[3])


def sgd(params: Any) -> Optimizer:
    """Return SGD with everything that DDP and a linear exchange have in common."""
    return SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)


class Net(pl.LightningModule):
    """Regression by the network above, in automatic optimization.

    Args:
        batches: a rank, an epoch.
        optimizer: made from the trainable parameters.
        step_size: of a schedule that halves the rate every this many steps; 0: none.
        dropout: after the activation.
        shuffle: the order of the batches, by torch's global generator.
    """

    def __init__(
        self,
        batches: int = 5,
        optimizer: Callable[[Any], Optimizer] = sgd,
        step_size: int = 0,
        dropout: float = 0.0,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.batches = batches
        self.make_optimizer = optimizer
        self.step_size = step_size
        self.shuffle = shuffle
        self.net = network(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val_loss", nn.functional.mse_loss(self(inputs), targets), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if not self.step_size:
            return optimizer
        scheduler = {"scheduler": StepLR(optimizer, self.step_size, 0.5), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(self.global_rank, self.batches), batch_size=BATCH, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(10 + self.global_rank, 1), batch_size=BATCH)

    test_dataloader = predict_dataloader = val_dataloader


class Layered(LayeredModule):
    """The same regression in eight layers, for pipelines, whose first process reads all data.

    Its batches of 24 can be cut into as many micro-batches as 2, 3 and 4 devices want.

    Args:
        batches: an epoch.
        optimizer: made from the parameters.
        step_size: of a schedule that halves the rate every this many steps; 0: none.
        dropout: after the activations.
        shuffle: the order of the batches, by torch's global generator.
    """

    def __init__(
        self,
        batches: int = 5,
        optimizer: Callable[[Any], Optimizer] = sgd,
        step_size: int = 0,
        dropout: float = 0.0,
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        self.batches, self.make_optimizer, self.step_size, self.shuffle = batches, optimizer, step_size, shuffle
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            widths = [FEATURES, *[8] * 7]
            made = [[nn.Linear(a, b), nn.BatchNorm1d(b), nn.Tanh()] for a, b in itertools.pairwise(widths)]
            made.append([nn.Linear(8, 3)])
        self.layers = nn.Sequential(*(nn.Sequential(*parts, *self.after(dropout)) for parts in made))

    def after(self, dropout: float) -> list[nn.Module]:
        """Return what follows each layer."""
        return [nn.Dropout(dropout)] if dropout else []

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    configure_optimizers = Net.configure_optimizers

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(0, self.batches, size=24), batch_size=24, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(10, 1, size=24), batch_size=24)

    test_dataloader = predict_dataloader = val_dataloader


class Manual(Net):
    """The same in manual optimization; ``training_step`` is left to subclasses.

    Args:
        **kwargs: of :class:`Net`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs), targets)

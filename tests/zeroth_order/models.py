"""A small black box for the Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_distopt.optimizers.proximal import L1
from lightning_distopt.zeroth_order import BlackBoxModule, StepLoader

N = 40


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, 0].sin())


def loader(steps: int = 3) -> StepLoader:
    return StepLoader(dataset(), steps)


class Regression(BlackBoxModule):
    """A network with dropout and BatchNorm, which must both be still inside of a query."""

    def __init__(self, dropout: float = 0.5, **arguments: Any) -> None:
        super().__init__(**{"proximal": L1(1e-4), "batch_size": 8, "inner_steps": 2, "evaluate_every": 2, **arguments})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1)]
        self.net = nn.Sequential(*layers).double()

    def query(self, batch: Any) -> Tensor:
        inputs, targets = batch
        assert not torch.is_grad_enabled()
        assert not self.net.training
        return (self.net(inputs).squeeze(1) - targets).square()

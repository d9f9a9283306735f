"""States of stateful layers: whose they are, and when they begin anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distopt import LayeredModule, StalePipelineStrategy
from tests.strategies.fits import State, trainer
from tests.strategies.pipelines import equal


class Remembers(nn.Linear):
    """Adds its last input."""

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + state).tanh(), x


class Chain(LayeredModule):
    """Two layers with memories; ten batches an epoch, validation inside of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(Remembers(3, 3).double(), Remembers(3, 3).double())
        self.data = list(torch.randn(10, 4, 3, dtype=torch.float64))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader([(x, x.roll(1, -1)) for x in self.data], batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader([(x.flip(-1), x) for x in self.data[:3]], batch_size=None)


def fitted(strategy: Any, devices: int, **arguments: Any) -> State:
    module = Chain()
    trainer(strategy, -1, devices, max_epochs=2, **arguments).fit(module)
    return module.state_dict()


@pytest.mark.parametrize("drain", [True, False])
def test_memories_begin_anew_with_an_epoch_and_not_with_a_validation(drain: bool) -> None:
    """On one device and in a pipeline alike, whether or not that is drained between epochs."""
    validated = {"val_check_interval": 4, "limit_val_batches": 3}
    alone = fitted("auto", 1, **validated)
    assert equal(alone, fitted("auto", 1))
    strategy = StalePipelineStrategy("naive", drain_every_epoch=drain, start_method="fork")
    piped = fitted(strategy, 2, **(validated if drain else {}))
    assert equal(alone, piped)


class Expects(nn.Module):
    """Passes numbered batches on, and wants to remember the number before, or nothing at the start of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.full_like(x, -1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            assert torch.equal(state.round(), x.round() - 1), (state, x)
        return x * self.weight, x


class Numbered(Chain):
    """Batches 0, 1, 2, 3 in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Expects(), Expects())
        self.data = [torch.full((2,), float(number)) for number in range(4)]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_in_a_queue_over_the_end_of_an_epoch_each_stage_begins_anew_with_its_first_batch() -> None:
    strategy = StalePipelineStrategy("dsp", drain_every_epoch=False, start_method="fork")
    trainer(strategy, -1, 2, max_epochs=3).fit(Numbered())

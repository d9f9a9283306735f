"""Stages times replicas, 2 x 2: the mean over replicas is what one pipeline learns from both their batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_distopt import PipelineStrategy, StalePipelineStrategy
from lightning_distopt.model_parallel import StalenessPlan
from tests.model_parallel.models import batches_of
from tests.strategies.fits import At, assert_same_on_all_ranks, distance
from tests.strategies.pipelines import Chain, fit_pipeline, simulated

QUIET = {"norm": False, "dropout": 0.0}
FORKED = {"start_method": "fork", "timeout": 20, "balance": "layers"}


class Halves(Chain):
    """Each replica reads every second batch of 4; together they are batches of 8."""

    def __init__(self) -> None:
        super().__init__(2, **QUIET)
        self.data = list(batches_of(12, 4))

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        replica = self.trainer.strategy.replica
        return torch.utils.data.DataLoader(self.data[replica::2], batch_size=None) if replica is not None else loader


def wholes() -> Chain:
    made = Chain(2, **QUIET)
    parts = list(batches_of(12, 4))
    made.data = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return made


def test_four_processes_are_two_stages_twice() -> None:
    def check(trainer: Trainer, module: Any) -> None:
        assert trainer.strategy.distributed_sampler_kwargs == {"num_replicas": 2, "rank": trainer.global_rank // 2}
        strategy = trainer.strategy
        own = torch.cat([p.detach().reshape(-1) for p in strategy._own()])
        others: list[Any] = [None] * 4
        torch.distributed.all_gather_object(others, own)
        assert torch.equal(others[strategy.worker], others[strategy.worker + 2])
        assert strategy.meter.sent["replicas"] > 0

    expected, _ = simulated(wholes(), StalenessPlan.preset("dsp", 2))
    strategy = StalePipelineStrategy("dsp", stages=2, **FORKED)
    found = fit_pipeline(Halves(), strategy, 4, callbacks=[At(train_end=check)])
    assert distance(found, expected) < 1e-12


def test_synchronous_replicas() -> None:
    expected = fit_pipeline(wholes(), "auto", 1, gradient_clip_val=0.3)
    found = fit_pipeline(Halves(), PipelineStrategy(2, 2, **FORKED), 4, gradient_clip_val=0.3)
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("compressor", ["topk:0.25", "qsgd:5"])
def test_compressed_gradients_between_replicas(compressor: str) -> None:
    def check(trainer: Trainer, module: Any) -> None:
        strategy = trainer.strategy
        assert strategy.error_feedback == ("gradient" if "topk" in compressor else "none")
        assert all(p.isfinite().all() for p in module.parameters())
        trainer.strategy.share_weights()
        assert_same_on_all_ranks(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
        assert min(module.seen["train"][-3:]) < module.seen["train"][0]

    class Long(Halves):
        def __init__(self) -> None:
            super().__init__()
            self.data = list(batches_of(24, 8, torch.float32))
            self.float()
            self.make = partial(torch.optim.SGD, lr=0.2)

    strategy = StalePipelineStrategy("dsp", stages=2, compressor=compressor, **FORKED)
    fit_pipeline(Long(), strategy, 4, callbacks=[At(train_end=check)])


def test_devices_must_be_a_multiple_of_the_stages() -> None:
    with pytest.raises(Exception, match=r"3 for 2"):
        fit_pipeline(Halves(), StalePipelineStrategy("dsp", stages=2, **FORKED), 3)

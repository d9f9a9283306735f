"""Stages times replicas, 2 x 2: the mean over replicas is what one pipeline learns from both their batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_distopt import PipelineStrategy, ResumableLoader, StalePipelineStrategy
from lightning_distopt.model_parallel import StalenessPlan
from tests.model_parallel.models import batches_of
from tests.strategies.fits import At, assert_same_on_all_ranks, distance, trainer
from tests.strategies.pipelines import Chain, equal, fit_pipeline, simulated

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


class Shuffled(Chain):
    """Each replica shuffles and perturbs data of its own, by the process's random numbers."""

    def __init__(self) -> None:
        super().__init__(2, norm=False, dropout=0.3)
        self.layers[1].append(nn.Dropout(0.1))  # on the other process, too
        self.data = list(batches_of(16, 4, torch.float32))
        self.float()

    def train_dataloader(self) -> Any:
        replica = self.trainer.strategy.replica
        mine = torch.utils.data.TensorDataset(*map(torch.cat, zip(*self.data[replica::2], strict=True)))
        return ResumableLoader(mine, batch_size=4, shuffle=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize(
    ("make", "compressor", "step"),
    [
        (partial(StalePipelineStrategy, "dsp"), "topk:0.25", 3),
        (partial(StalePipelineStrategy, "dsp"), "topk:0.25", 8),
        pytest.param(partial(StalePipelineStrategy, "pipedream"), "qsgd:5", 3, marks=pytest.mark.slow),
        (PipelineStrategy, "powersgd:1", 3),
        pytest.param(PipelineStrategy, "powersgd:1", 8, marks=pytest.mark.slow),
    ],
)
def test_a_run_of_replicas_resumes_bit_for_bit(make: Any, compressor: str, step: int, tmp_path: Path) -> None:
    """In the middle of an epoch and at its end: residuals, orders of data and random numbers go on."""

    path = tmp_path / "saved.ckpt"

    def save(trainer: Trainer, module: Any) -> None:
        if trainer.global_step == step:
            trainer.save_checkpoint(path)

    def fit(*callbacks: Any, ckpt_path: Any = None) -> Any:
        torch.manual_seed(5)
        module = Shuffled()
        strategy = make(stages=2, compressor=compressor, cuts=[1], **FORKED)
        trainer(strategy, -1, 4, max_epochs=2, callbacks=list(callbacks)).fit(module, ckpt_path=ckpt_path)
        return dict(module.state_dict())

    whole = fit(At(train_batch_end=save))
    content = torch.load(path, weights_only=True)["lightning_distopt_pipeline"]["replicas"]
    assert len(content) == 2
    if "qsgd" not in compressor:
        assert set(content[0]["residuals"]) == {name for name, _ in Shuffled().named_parameters()}
        assert any(not torch.equal(e, content[1]["residuals"][name]) for name, e in content[0]["residuals"].items())
    assert equal(fit(ckpt_path=path), whole)


def test_devices_must_be_a_multiple_of_the_stages() -> None:
    with pytest.raises(Exception, match=r"3 for 2"):
        fit_pipeline(Halves(), StalePipelineStrategy("dsp", stages=2, **FORKED), 3)

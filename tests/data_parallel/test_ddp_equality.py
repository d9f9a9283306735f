"""Where nothing is lost on the way, the update engine is plain DDP."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_distopt.compressors import parse
from lightning_distopt.data_parallel import UpdateSync, UpdateSyncConfig
from lightning_distopt.exchange import Meter
from tests.data_parallel.together import together

STEPS = 20
ACCUMULATE = 2


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def _batch(rank: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(6, 8, generator=draw), torch.randint(0, 3, (6,), generator=draw)


def _optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)


def _loss(model: nn.Module, rank: int, step: int, micro: int) -> Tensor:
    inputs, labels = _batch(rank, step, micro)
    return nn.functional.cross_entropy(model(inputs), labels) / ACCUMULATE


def _ddp(rank: int) -> nn.Module:
    model = _model()
    optimizer, schedule = _optimizer(model)
    ddp = DistributedDataParallel(model)
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            with nullcontext() if micro == ACCUMULATE - 1 else ddp.no_sync():
                _loss(ddp, rank, step, micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def _engine(rank: int, compressor: str, exchange: Any, coefficient: float, dense_steps: int) -> nn.Module:
    model = _model()
    optimizer, schedule = _optimizer(model)
    sync = UpdateSync(
        UpdateSyncConfig(
            parse(compressor), exchange, coefficient, averaging_period=6, dense_steps=dense_steps, bucket_bytes=700
        ),
        Meter(),
    )
    params = dict(model.named_parameters())
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            sync.track(params, dict.fromkeys(params, (0,)))
            sync.enter()
            _loss(model, rank, step, micro).backward()
            if micro < ACCUMULATE - 1:
                sync.leave()
        optimizer.step()
        optimizer.zero_grad()
        sync.exchange()
        schedule.step()
    return model


def _both(rank: int, world: int, *method: Any) -> float:
    pairs = zip(_ddp(rank).parameters(), _engine(rank, *method).parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


EXACT = [
    ("fp32", "all_reduce", 1.0, 0),
    ("fp32", "all_reduce", 0.0, 0),
    ("fp32", "all_gather", 1.0, 0),
    ("fp32", "sharded_server", 1.0, 0),
    ("topk:1", "all_gather", 1.0, 0),
    ("sign", "all_gather", 1.0, STEPS),  # every step is one of the dense ones
]
LOSSY = ("sign", "all_gather", 1.0, 0)


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_an_exchange_that_loses_nothing_is_ddp(method: tuple[Any, ...]) -> None:
    """With momentum, weight decay, a schedule and accumulation; the mean of linear steps is the step of the mean."""
    # Weights are below 4 and move 20 times; some float32 roundings each, not amplified by this smooth loss.
    assert max(together(2, _both, [*EXACT, LOSSY], method)) < 1e-5


def test_compression_is_not_ddp() -> None:
    assert max(together(2, _both, [*EXACT, LOSSY], LOSSY)) > 1e-3

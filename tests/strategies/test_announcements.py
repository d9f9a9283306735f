"""Loaders that do not know their length: the ranks without data hear of each batch and of the end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_distopt import PipelineStrategy, StalePipelineStrategy
from tests.model_parallel.models import batches_of
from tests.strategies.fits import At, distance
from tests.strategies.pipelines import Chain, fit_pipeline

FORKED: dict[str, Any] = {"start_method": "fork", "timeout": 20, "balance": "layers"}


class Stream(IterableDataset[Any]):
    def __init__(self, data: list[Any]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


class Streamed(Chain):
    def __init__(self) -> None:
        super().__init__(2, norm=False, dropout=0.0)
        self.data = list(batches_of(6, 4))

    def train_dataloader(self) -> Any:
        return DataLoader(Stream(self.data), batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader(Stream(self.data[:3]), batch_size=None)


@pytest.mark.parametrize("make", [partial(StalePipelineStrategy, "naive"), partial(PipelineStrategy, microbatches=2)])
@pytest.mark.parametrize("limit", [1.0, 4])
def test_a_stream_ends_for_all_ranks(make: Any, limit: Any) -> None:
    """Training and validation of two epochs; also where Lightning ends an epoch before the stream ends."""
    batches = 6 if limit == 1.0 else limit

    def check(trainer: Trainer, module: Any) -> None:
        assert trainer.global_step == 2 * batches
        assert len(module.seen["train"]) == 2 * batches
        assert len(module.seen["val"]) == 6

    options: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": limit}
    found = fit_pipeline(
        Streamed(), make(**FORKED), 2, limit_val_batches=1.0, callbacks=[At(train_end=check)], **options
    )
    assert distance(found, fit_pipeline(Streamed(), "auto", 1, **options)) < 1e-12

"""The character model learns the text that Python brings along."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer

from recipes.text import CharModel, StandardLibraryText


def test_targets_are_the_next_characters_and_the_splits_are_disjoint() -> None:
    data = StandardLibraryText(characters=4000, length=16, batch_size=4)
    data.setup("fit")
    inputs, targets = next(iter(data.val_dataloader()))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < 128
    assert len(data.train_dataloader().dataset) + len(data.val_dataloader().dataset) == 4000 // 16


def test_the_loss_falls() -> None:
    torch.manual_seed(0)
    model = CharModel(width=16, optimizer=lambda params: torch.optim.Adam(params, lr=0.01))
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, StandardLibraryText(characters=8000, length=32, batch_size=8))
    assert float(trainer.callback_metrics["val/loss"]) < 4.0  # ln 128 is 4.85


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 64, 32 and 100"):
        StandardLibraryText(characters=100)
    with pytest.raises(ValueError, match="`width` must be at least 1: got 0"):
        CharModel(width=0)

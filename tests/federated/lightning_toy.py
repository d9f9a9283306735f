"""A LightningModule and DataModule small enough that a federation of them trains in a second."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CPU = {"accelerator": "cpu"}


class Line(pl.LightningModule):
    """Linear regression; ``norm=True`` puts a BatchNorm before it, ``momentum`` into its optimizer."""

    def __init__(self, norm: bool = False, momentum: float = 0.0, lr: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.body = nn.Linear(4, 3)
            self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
            self.head = nn.Linear(3, 1)
        self.momentum, self.lr = momentum, lr

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(self.norm(self.body(batch[0]))), batch[1])

    def training_step(self, batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class Points(pl.LightningDataModule):
    """``8 (partition + 1)`` points of a plane that differs from client to client."""

    def __init__(self, partition: int, partitions: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(partition)
        x = torch.randn(8 * (partition + 1), 4, generator=generator)
        self.data = TensorDataset(x, x.sum(1, keepdim=True) + partition)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, 64)

"""Windows of a text's bytes, for models of the next byte."""

import gzip
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt.zeroth_order import StepLoader


class TextData(LightningDataModule):
    """A text file as windows of bytes below 128 (others become 0), the last tenth to validate.

    Args:
        path: of the text, plain or gzip.
        length: of a window, at least 2.
        batch_size: windows of a batch; used where gradients train.
        steps: optimizer steps of an epoch by queries; ``null`` gives ordinary shuffled batches.
        limit: training windows; ``null`` takes all.
    """

    def __init__(
        self, path: str, length: int = 64, batch_size: int = 32, steps: int | None = None, limit: int | None = None
    ) -> None:
        super().__init__()
        if length < 2:
            raise ValueError(f"`length` must be at least 2 bytes: got {length}.")
        self.path, self.length, self.batch_size, self.steps, self.limit = path, length, batch_size, steps, limit
        self.parts: tuple[TensorDataset, TensorDataset] | None = None

    def setup(self, stage: str) -> None:
        """Read the text on first use."""
        if self.parts is None:
            path = Path(self.path)
            if not path.is_file():
                raise FileNotFoundError(f"`path` must be a text file: there is no '{path}'.")
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            codes = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
            codes = codes.where(codes < 128, 0)
            windows = codes[: len(codes) // self.length * self.length].view(-1, self.length)
            kept = len(windows) - max(1, len(windows) // 10)
            self.parts = TensorDataset(windows[:kept][: self.limit]), TensorDataset(windows[kept:][:500])

    def train_dataloader(self) -> Any:
        """Steps by queries, or shuffled batches."""
        assert self.parts is not None
        if self.steps is not None:
            return StepLoader(self.parts[0], self.steps)
        return DataLoader(self.parts[0], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """At most 500 windows of the end of the text."""
        assert self.parts is not None
        return DataLoader(self.parts[1], 100)

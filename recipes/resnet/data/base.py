"""What the image data modules share: loaders over a training set and an evaluation set."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_distopt import ResumableLoader
from recipes.resnet.data.in_memory import InMemoryImages, keep_batch


class ImageData(LightningDataModule):
    """Loaders for a training set, shuffled, and an evaluation set, in order.

    Validation, test and prediction read the same evaluation set unless a subclass has another. A subclass fills
    ``train_set`` and ``eval_set`` in :meth:`load`, which every process calls once.

    Args:
        batch_size: images in a batch of ONE process, at least 1; the global batch is this times the number of
            processes (times ``accumulate_grad_batches``).
        num_workers: loader processes per training process, at least 0; 0 loads in the training process itself.

    Attributes:
        num_classes: number of labels, from 0 to ``num_classes - 1``.
    """

    num_classes: int

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1 image a process: got {batch_size}.")
        if num_workers < 0:
            raise ValueError(f"`num_workers` must be at least 0: got {num_workers}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train_set: Dataset[Any] | None = None
        self.eval_set: Dataset[Any] | None = None

    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return the training set and the evaluation set; called once in every process, never downloads."""
        raise NotImplementedError(f"`{type(self).__name__}.load` must return a training set and an evaluation set.")

    def setup(self, stage: str) -> None:
        """Read the data on first use; later stages find it in memory."""
        if self.train_set is None:
            self.train_set, self.eval_set = self.load()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches, whose order a resumed run takes up again; Lightning gives each process its own share."""
        dataset = self._checked(self.train_set)
        return ResumableLoader(dataset, shuffle=True, **self._settings(dataset))

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the evaluation set, in order."""
        return self._loader(self.eval_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the evaluation set, in order."""
        return self._loader(self.eval_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the evaluation set, in order."""
        return self._loader(self.eval_set)

    def _loader(self, dataset: Dataset[Any] | None) -> DataLoader[Any]:
        dataset = self._checked(dataset)
        return DataLoader(dataset, persistent_workers=self.num_workers > 0, **self._settings(dataset))

    def _checked(self, dataset: Dataset[Any] | None) -> Dataset[Any]:
        if dataset is None:
            raise RuntimeError(f"`{type(self).__name__}.setup` must run before its loaders are asked for.")
        return dataset

    def _settings(self, dataset: Dataset[Any]) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": keep_batch if isinstance(dataset, InMemoryImages) else None,
        }

"""MNIST from its idx files: batches for a classifier, and correctly classified images of one digit to attack."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt.zeroth_order import StepLoader
from recipes.black_box.data.idx import read_idx


def read_mnist(root: str | Path, part: str) -> tuple[Tensor, Tensor]:
    """Return images in (-1/2, 1/2), float32 of shape ``(n, 1, 28, 28)``, and labels, of ``part`` "train" or "t10k"."""
    root = Path(root)
    tensors = []
    for kind in ("images-idx3", "labels-idx1"):
        packed = root / f"{part}-{kind}-ubyte.gz"
        tensors.append(read_idx(packed if packed.is_file() else packed.with_suffix("")))
    return tensors[0].unsqueeze(1).float() / 255 - 0.5, tensors[1].long()


class MnistData(LightningDataModule):
    """MNIST for a classifier.

    Args:
        root: folder with the four idx files, plain or gzip.
        batch_size: images of a batch of one process, at least 1.
        limit: training images; ``null`` takes all.
    """

    def __init__(self, root: str, batch_size: int = 64, limit: int | None = None) -> None:
        super().__init__()
        self.root, self.batch_size, self.limit = root, batch_size, limit
        self.parts: dict[str, TensorDataset] = {}

    def setup(self, stage: str) -> None:
        """Read the files on first use."""
        if not self.parts:
            for part in ("train", "t10k"):
                images, labels = read_mnist(self.root, part)
                few = slice(None, self.limit if part == "train" else None)
                self.parts[part] = TensorDataset(images[few], labels[few])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        return DataLoader(self.parts["train"], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Test images, in order."""
        return DataLoader(self.parts["t10k"], 500)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test images, in order."""
        return self.val_dataloader()


class AttackData(LightningDataModule):
    """Test images of one digit that a classifier gets right.

    Args:
        root: folder with MNIST's idx files.
        victim: checkpoint of a ``DigitClassifier``.
        label: the digit, 0 to 9.
        count: images, at least 1.
        steps: optimizer steps of an epoch, at least 1.
    """

    def __init__(self, root: str, victim: str, label: int = 1, count: int = 100, steps: int = 100) -> None:
        super().__init__()
        if not 0 <= label <= 9:
            raise ValueError(f"`label` must be a digit from 0 to 9: got {label}.")
        if count < 1:
            raise ValueError(f"`count` must be at least 1 image: got {count}.")
        self.root, self.victim, self.label, self.count, self.steps = root, victim, label, count, steps
        self.images: TensorDataset | None = None

    def setup(self, stage: str) -> None:
        """Choose the images on first use.

        Raises:
            ValueError: if the classifier gets fewer images of the digit right than are asked for.
        """
        if self.images is None:
            from recipes.black_box.classifier import DigitClassifier  # the module of this data's victim

            victim = DigitClassifier.load_from_checkpoint(self.victim, map_location="cpu").eval()
            images, labels = read_mnist(self.root, "t10k")
            images = images[labels == self.label]
            with torch.no_grad():
                images = images[victim(images).argmax(1) == self.label]
            if len(images) < self.count:
                raise ValueError(
                    f"`count` must be at most {len(images)}, the images classified as {self.label}: got {self.count}."
                )
            self.images = TensorDataset(images[: self.count], torch.full((self.count,), self.label))

    def train_dataloader(self) -> StepLoader:
        """Steps over the images."""
        return StepLoader(self.images, self.steps)

"""LIBSVM text files: a label and ``index:value`` pairs a line, indices from 1."""

import gzip
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt.zeroth_order import StepLoader


def read_libsvm(path: str | Path, features: int | None = None) -> tuple[Tensor, Tensor]:
    """Return features and labels as float64, dense: shapes ``(n, d)`` and ``(n,)``.

    Args:
        path: of the file, plain or gzip (``.gz``); blank lines are passed over.
        features: number d of features; ``None`` is the largest index of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the first line that is not in the format, or an index above ``features``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`path` must be a LIBSVM file: there is no '{path}'. Give the file's own path.")
    rows, columns, values, labels = [], [], [], []
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            labels.append(float(words[0]))
            for word in words[1:]:
                index, _, value = word.partition(":")
                rows.append(len(labels) - 1)
                columns.append(int(index) - 1)
                values.append(float(value))
        except ValueError as error:
            raise ValueError(
                f"Line {number} of '{path}' must be 'label index:value ...': got {line[:60]!r}."
            ) from error
    width = max(columns, default=-1) + 1
    if features is not None and width > features:
        raise ValueError(f"`features` must be at least the largest index: got {features} for {width}. Raise it.")
    dense = torch.zeros(len(labels), features or width, dtype=torch.float64)
    dense[torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)] = torch.tensor(
        values, dtype=torch.float64
    )
    return dense, torch.tensor(labels, dtype=torch.float64)


class LibsvmData(LightningDataModule):
    """Binary classification from a LIBSVM file, labels -1 and 1 (0 is read as -1).

    Args:
        path: of the training file, plain or gzip.
        test_path: of the test file; ``null`` validates on the training samples.
        features: number of features; ``null`` takes the largest index (give it where a test file may hold more).
        limit: training samples, chosen at random with ``seed``; ``null`` takes all.
        steps: optimizer steps of an epoch, at least 1.
        seed: chooses the part.
    """

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        features: int | None = None,
        limit: int | None = None,
        steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.test_path, self.features, self.limit = path, test_path, features, limit
        self.steps, self.seed = steps, seed
        self.train_set: TensorDataset | None = None
        self.test_set: TensorDataset | None = None

    def setup(self, stage: str) -> None:
        """Read the files on first use."""
        if self.train_set is None:
            inputs, labels = read_libsvm(self.path, self.features)
            if self.limit is not None:
                chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))[: self.limit]
                inputs, labels = inputs[chosen], labels[chosen]
            self.train_set = TensorDataset(inputs, labels.sign().where(labels > 0, -1.0))
            if self.test_path is not None:
                inputs, labels = read_libsvm(self.test_path, inputs.shape[1])
                self.test_set = TensorDataset(inputs, labels.sign().where(labels > 0, -1.0))

    def train_dataloader(self) -> StepLoader:
        """Steps over the training samples."""
        return StepLoader(self.train_set, self.steps)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test samples, in one batch; without a test file those for training."""
        chosen = self.test_set or self.train_set
        assert chosen is not None
        return DataLoader(chosen, batch_size=len(chosen))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the same as :meth:`val_dataloader`."""
        return self.val_dataloader()

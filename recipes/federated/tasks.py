"""The study's two tasks, each over 100 clients that hold different things: MNIST for a CNN, Shakespeare for an LSTM."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_distopt.federated.partitions import Indices, natural_id, pathological
from recipes.black_box.data.mnist import read_mnist
from recipes.federated.curves import GRIDS

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        name: in the table.
        module: makes the module for a client rate; initial weights by torch's seed.
        data: inputs and targets of all clients together.
        parts: what each client holds.
        test: what the server judges by.
        rates: of the clients: the grid, the same for every method.
        rounds: of a run.
        epochs: passes of a client over its data in a round.
        batch: samples in a batch of a client.
        target: accuracy that is timed, in rounds.
    """

    name: str
    module: Callable[[float], LightningModule]
    data: TensorDataset
    parts: list[Indices]
    test: TensorDataset
    rates: tuple[float, ...]
    rounds: int
    epochs: int
    batch: int
    target: float


class Classifier(LightningModule):
    """Cross-entropy by plain SGD.

    Args:
        net: from a batch of inputs to logits whose last-but-one dimension fits the targets.
        lr: of the clients, above 0.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        return F.cross_entropy(self.net(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    @torch.no_grad()
    def accuracy(self, data: TensorDataset) -> float:
        """Return the share of targets that are the likeliest answer."""
        self.eval()
        hits = total = 0
        for at in range(0, len(data), 500):  # slices: a loader would collate sample by sample
            inputs, targets = data[at : at + 500]
            hits += int((self.net(inputs).argmax(-1) == targets).sum())
            total += targets.numel()
        return hits / total


class Part(LightningDataModule):
    """What one client holds."""

    def __init__(self, data: TensorDataset, batch: int) -> None:
        super().__init__()
        self.data, self.batch = data, batch

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches, each taken from the tensors at once."""
        batches = BatchSampler(RandomSampler(self.data), self.batch, drop_last=False)
        return DataLoader(self.data, batch_size=None, sampler=batches)


class Recurrent(nn.Module):
    """Embedding of 8, one LSTM layer, and a linear layer.

    Args:
        characters: size of the alphabet.
        width: of the recurrent state.
    """

    def __init__(self, characters: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 8)
        self.lstm = nn.LSTM(8, width, batch_first=True)
        self.output = nn.Linear(width, characters)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits of shape ``(N, length, characters)``."""
        logits: Tensor = self.output(self.lstm(self.embedding(codes))[0])
        return logits


def mnist(root: Path, clients: int = 100, samples: int = 12_000) -> Task:
    """Return MNIST, two shards of sorted labels a client, and a CNN of two convolutions with strides."""
    images, labels = read_mnist(root, "train")
    images, labels = images[:samples], labels[:samples]
    test = TensorDataset(*(part[:2000] for part in read_mnist(root, "t10k")))

    def module(lr: float) -> Classifier:
        net = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        return Classifier(net, lr)

    parts = pathological(labels.numpy(), clients, shards=2, seed=0)
    return Task(
        "mnist", module, TensorDataset(images, labels), parts, test, (0.01, 0.03, 0.1, 0.3, 1.0), 60, 2, 20, 0.9
    )


def shakespeare(root: Path, clients: int = 100, length: int = 80) -> Task:
    """Return tiny-shakespeare by role: the ``clients`` roles that say most, at most 30 windows of each, and an LSTM.

    Every tenth window of each role is kept for the server.
    """
    packed = root / "input.txt.gz"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.is_file() else (root / "input.txt").read_text()
    roles: dict[str, list[str]] = {}
    for speech in text.split("\n\n"):
        role, _, words = speech.partition(":\n")
        roles.setdefault(role, []).append(words)
    alphabet = sorted(set(text))
    code = {character: number for number, character in enumerate(alphabet)}
    most = sorted(roles, key=lambda role: (-sum(map(len, roles[role])), role))[:clients]
    windows, keys = [], []
    for role in most:
        codes = torch.tensor([code[character] for character in "\n".join(roles[role])])
        for at in range(min(30, max(1, (len(codes) - 1) // length))):
            piece = codes[at * length : (at + 1) * length + 1]
            windows.append(F.pad(piece, (0, length + 1 - len(piece)), value=code[" "]))
            keys.append(role)
    stacked = torch.stack(windows)
    kept = np.arange(len(stacked)) % 10 != 9
    train, test = (stacked[torch.from_numpy(chosen)] for chosen in (kept, ~kept))
    parts = natural_id([key for key, stays in zip(keys, kept, strict=True) if stays])
    data, judged = (TensorDataset(part[:, :-1], part[:, 1:]) for part in (train, test))

    def module(lr: float) -> Classifier:
        return Classifier(Recurrent(len(alphabet)), lr)

    return Task("shakespeare", module, data, parts, judged, GRIDS["shakespeare"], 40, 1, 4, 0.3)


TASKS: dict[str, Callable[[Path], Task]] = {"mnist": mnist, "shakespeare": shakespeare}

"""Ten clients learn scikit-learn's digits; each holds another mixture of classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from flwr.app import Context
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_distopt.federated import Deadline, FedMom, Service, lightning_client_app, lightning_server_app
from lightning_distopt.federated.partitions import dirichlet

Batch = tuple[Tensor, Tensor]
CPU = {"accelerator": "cpu", "devices": 1}
ALPHA = 0.3
"""Of the Dirichlet distribution: most clients lack some classes."""


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,437 images of 8 x 8 to train and 360 to evaluate, float32 in [0, 1], with their labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    return TensorDataset(x.float(), y.long()), TensorDataset(x_test.float(), y_test.long())


class DigitsNet(LightningModule):
    """One hidden layer.

    Logs ``train/loss``, ``val/loss`` and ``val/accuracy``.

    Args:
        lr: of plain SGD on the clients, above 0.
    """

    def __init__(self, lr: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.lr = lr

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        logits = self.net(batch[0])
        self.log("val/loss", F.cross_entropy(logits, batch[1]))
        self.log("val/accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class DigitsPart(LightningDataModule):
    """What one client holds: four fifths to train, one fifth to validate."""

    def __init__(self, partition: int, partitions: int) -> None:
        super().__init__()
        train, _ = digits()
        part = dirichlet(train.tensors[1].numpy(), partitions, ALPHA, seed=1)[partition]
        self.fit_part = Subset(train, [at for n, at in enumerate(part.tolist()) if n % 5])
        self.val_part = Subset(train, part[::5].tolist())

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of 16."""
        return DataLoader(self.fit_part, 16, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """All in one batch."""
        return DataLoader(self.val_part, 512)


class DigitsTest(LightningDataModule):
    """The 360 images that no client holds, for the server."""

    def val_dataloader(self) -> DataLoader[Batch]:
        """All in one batch."""
        return DataLoader(digits()[1], 512)


def make_net() -> DigitsNet:
    """Return the net with the same initial weights everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DigitsNet()


def make_strategy(context: Context) -> FedMom:
    """Return FedMom with the settings of the run: ``lr``, ``momentum``, ``fraction-train``, ``seed``, ``state-dir``, ..."""
    config = context.run_config
    deadline = Deadline(seconds=float(config.get("deadline", 60.0)), min_replies=int(config.get("min-replies", 1)))
    return FedMom(
        lr=float(config.get("lr", 1.0)),
        momentum=float(config.get("momentum", 0.9)),
        fraction_train=float(config.get("fraction-train", 0.5)),
        fraction_evaluate=float(config.get("fraction-evaluate", 1.0)),
        min_available_nodes=int(config.get("clients", 2)),
        seed=int(config.get("seed", 0)),
        compressor=str(config["compressor"]) if config.get("compressor") else None,
        service=Service(state_dir=str(config["state-dir"]) if config.get("state-dir") else None, deadline=deadline),
    )


client_app = lightning_client_app(make_net, DigitsPart, local_epochs=1, trainer=CPU)
server_app = lightning_server_app(make_net, make_strategy, num_rounds=10, datamodule_factory=DigitsTest, trainer=CPU)

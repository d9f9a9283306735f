"""The next character, by a gated recurrent network."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from recipes.text.data import CHARACTERS

Batch = tuple[Tensor, Tensor]


class CharModel(LightningModule):
    """Embedding, GRU, linear layer; cross-entropy in nats a character.

    Logs ``train/loss``, and ``val/loss`` and ``val/accuracy`` (share of characters that are the likeliest one).

    Args:
        width: of the embedding and of the recurrent state, at least 1.
        optimizer: any torch optimizer by class, with its arguments and without the parameters.
    """

    def __init__(self, width: int = 96, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"`width` must be at least 1: got {width}. 96 is the default.")
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, CHARACTERS)
        self.optimizer = optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits of shape ``(N, length, characters)`` for codes of shape ``(N, length)``."""
        return self.output(self.recurrent(self.embedding(inputs))[0])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        logits = self(batch[0]).flatten(0, 1)
        targets = batch[1].flatten()
        self.log("val/loss", F.cross_entropy(logits, targets), sync_dist=True, batch_size=len(batch[0]))
        accuracy = (logits.argmax(1) == targets).float().mean()
        self.log("val/accuracy", accuracy, sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer over all parameters."""
        return self.optimizer(self.parameters())

"""What a language model is measured by: figures of the mean negative log-likelihood, over tokens and not over batches."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean negative log-likelihood, in nats a token.

    Batches of different sizes count by their tokens; sums over processes are taken when it is computed.

    Example:
        >>> loss = TokenLoss()
        >>> loss.update(torch.tensor(1.0), 30)
        >>> loss.update(torch.tensor(2.0), 10)
        >>> float(loss.compute())
        1.25
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor | int) -> None:
        """Take in a batch.

        Args:
            loss: mean over its tokens, in nats.
            tokens: how many they were.
        """
        self.nats += loss.detach().double() * tokens
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return the figure."""
        return self.nats / self.tokens


class BitsPerCharacter(TokenLoss):
    """``loss / ln 2``: bits that a character costs."""

    def compute(self) -> Tensor:
        """Return the figure."""
        return super().compute() / math.log(2)


class Perplexity(TokenLoss):
    """``exp(loss)``: among how many equally likely tokens the model hesitates."""

    def compute(self) -> Tensor:
        """Return the figure."""
        return super().compute().exp()

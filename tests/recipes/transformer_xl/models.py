"""Small models and texts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from recipes.transformer_xl import Context, TransformerXL
from recipes.transformer_xl.data import TokenData
from recipes.transformer_xl.vocabulary import Vocabulary

LETTERS = "abcdefghij \n"


def small(**options: Any) -> TransformerXL:
    """Return a model of 12 tokens; without dropout unless asked for."""
    sizes = {
        "vocabulary": len(LETTERS),
        "n_layer": 2,
        "d_model": 8,
        "n_head": 2,
        "d_head": 4,
        "d_inner": 16,
        "dropout": 0.0,
    }
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return TransformerXL(**{**sizes, "context": Context(6), "optimizer": optimizer, **options})


class Letters(TokenData):
    """A text in which each letter follows from the two before it."""

    def __init__(self, size: int = 400, **lengths: Any) -> None:
        super().__init__(**{"tgt_len": 6, "batch_size": 4, **lengths})
        self.size = size

    def load(self) -> tuple[Vocabulary, dict[str, Tensor]]:
        tokens = [1, 2]
        while len(tokens) < 2 * self.size:
            tokens.append((tokens[-1] + 2 * tokens[-2] + 1) % len(LETTERS))
        stream = torch.tensor(tokens, dtype=torch.int32)
        half = self.size // 2
        parts = {"train": stream[: self.size], "val": stream[self.size :][:half], "test": stream[self.size + half :]}
        return Vocabulary(LETTERS, "characters"), parts


def segments(tokens: Tensor, length: int, model: TransformerXL) -> Tensor:
    """Return what a model makes of a stream ``(B, n)`` cut into segments, memories going from each to the next."""
    model.forget()
    return torch.cat([model(part) for part in tokens.split(length, dim=1)], dim=1)

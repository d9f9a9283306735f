"""Small chains and batches, the same in every process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

WIDTH, CLASSES = 6, 4


def layers(count: int, dropout: float = 0.0, norm: bool = False, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """Return ``count`` layers of one width; the last gives logits."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        made: list[nn.Module] = []
        for index in range(count):
            last = index == count - 1
            parts: list[nn.Module] = [nn.Linear(WIDTH, CLASSES if last else WIDTH)]
            if not last:
                parts += [nn.BatchNorm1d(WIDTH)] * norm + [nn.Tanh()] + [nn.Dropout(dropout)] * (dropout > 0)
            made.append(nn.Sequential(*parts).to(dtype))
        return made


def blocks(stages: int, dropout: float = 0.0, norm: bool = False) -> list[nn.Module]:
    """Return one layer a stage."""
    return layers(stages, dropout, norm)


def batches_of(count: int, size: int = 5, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs whose class a linear map decides."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(WIDTH, CLASSES, generator=generator, dtype=torch.float64)
    for _ in range(count):
        x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
        yield x.to(dtype), (x @ truth).argmax(1)

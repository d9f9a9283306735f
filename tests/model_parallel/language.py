"""A small language model in layers: tied embedding, memories, dropout; and its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

TOKENS, WIDTH = 7, 4


class Remembering(nn.Module):
    """Mixes its input with what it saw in the last segment: ``y = x + dropout(tanh(A x + B memory))``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.new, self.old = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.dropout(torch.tanh(self.new(x) + self.old(state))), x


class TiedHead(nn.Module):
    """Mean cross-entropy of ``x W^T + b``; ``W`` is the embedding."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(TOKENS, dtype=weight.dtype))

    def of(self, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(nn.functional.linear(x, weight, self.bias).flatten(0, -2), target.flatten())

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.of(x, target, self.weight)


def layers(count: int, dropout: float = 0.3) -> tuple[list[nn.Module], TiedHead]:
    """Return an embedding with ``count`` layers after it, and the head; all in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        embedding = nn.Embedding(TOKENS, WIDTH, dtype=torch.float64)
        made = [embedding, *(Remembering(dropout).double() for _ in range(count))]
        return made, TiedHead(embedding.weight)


def chain(stages: int, dropout: float = 0.3) -> tuple[list[nn.Sequential], TiedHead]:
    """Return one memory a stage, the embedding before the first, and the head, which has the embedding's weight."""
    (embedding, first, *rest), head = layers(stages, dropout)
    return [nn.Sequential(embedding, first), *(nn.Sequential(layer) for layer in rest)], head


def parameters_of(modules: Sequence[nn.Module], head: nn.Module) -> list[nn.Parameter]:
    """Return every parameter once; the tied one is the first."""
    return list(dict.fromkeys(p for m in (*modules, head) for p in m.parameters()))


def texts(count: int, rows: int = 3, length: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield segments that continue each other, and the tokens that follow."""
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(TOKENS, (rows, count * length + 1), generator=generator)
    stream[:, ::2] = 0  # something to learn
    for begin in range(0, count * length, length):
        yield stream[:, begin : begin + length], stream[:, begin + 1 : begin + length + 1]

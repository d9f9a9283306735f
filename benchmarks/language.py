"""Language models with a tied embedding for the benchmarks: a small transformer, or the Transformer-XL of the recipes."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Model", "Size", "blocks_of", "build", "parameters_of", "segments", "text"]

MODELS = ("small", "transformer_xl")


class Size(NamedTuple):
    """How large a model is.

    Attributes:
        vocabulary: tokens.
        blocks: layers between embedding and head.
        width: numbers a token.
        length: tokens a segment.
        memory: tokens that are remembered; Transformer-XL only.
        dropout: in [0, 1).
    """

    vocabulary: int
    blocks: int
    width: int
    length: int
    memory: int = 0
    dropout: float = 0.0


class Model(NamedTuple):
    """Layers in order, and a head that owns the embedding's weight, too: (output, target) -> mean loss in nats."""

    layers: list[nn.Module]
    head: nn.Module


class Embedding(nn.Module):
    """Tokens and places to numbers."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.length, size.width)
        self.dropout = nn.Dropout(size.dropout)
        nn.init.normal_(self.tokens.weight, std=size.width**-0.5)
        nn.init.normal_(self.places.weight, std=size.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.tokens(x) + self.places.weight[: x.shape[1]])


class CausalBlock(nn.Module):
    """Attention to what came before, and two matrices; normalised before each."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = max(1, width // 64)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, 2))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.inner(self.second(x)))  # type: ignore[no-any-return]


class TiedHead(nn.Module):
    """Mean cross-entropy of ``norm(x) V^T + b``."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(len(weight)))
        self.norm = nn.LayerNorm(weight.shape[1])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        scores = nn.functional.linear(self.norm(x), self.weight, self.bias)
        return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())


def build(name: str, size: Size, seed: int = 0) -> Model:
    """Return a model, the same for the same seed.

    Raises:
        ImportError: for ``transformer_xl`` where the recipe is not there.
    """
    torch.manual_seed(seed)
    if name == "small":
        embedding = Embedding(size)
        return Model([embedding, *(CausalBlock(size) for _ in range(size.blocks))], TiedHead(embedding.tokens.weight))
    from recipes import transformer_xl

    module = transformer_xl.TransformerXL(
        size.vocabulary,
        n_layer=size.blocks,
        d_model=size.width,
        n_head=max(1, size.width // 64),
        d_head=min(64, size.width),
        d_inner=4 * size.width,
        dropout=size.dropout,
        context=transformer_xl.Context(size.memory),
    )
    return Model(list(module.layers), module.loss)


def parameters_of(*modules: nn.Module) -> list[nn.Parameter]:
    """Return every parameter once."""
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def text(path: Path) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the characters of a text file (it may be gzipped) as tokens: 90 % to train, 5 % to validate, 5 % to test, and how
    many kinds there are.

    Raises:
        ValueError: if the file has fewer than 1,000 characters.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    characters = raw.decode()
    if len(characters) < 1000:
        raise ValueError(
            f"`--data` must have at least 1,000 characters: got {len(characters)} in {path}. Give another file."
        )
    number = {c: i for i, c in enumerate(sorted(set(characters)))}
    tokens = torch.tensor([number[c] for c in characters])
    a, b = int(0.9 * len(tokens)), int(0.95 * len(tokens))
    return tokens[:a], tokens[a:b], tokens[b:], len(number)


def segments(tokens: Tensor, rows: int, length: int, begin: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input, target) for ever: the stream in ``rows`` rows, each segment going on where the last one of its row ended.

    Args:
        tokens: the stream.
        rows: of a batch.
        length: of a segment.
        begin: number of the first segment.
    """
    each = (len(tokens) - 1) // rows
    x, y = (tokens[d : d + each * rows].view(rows, each) for d in (0, 1))
    count = each // length
    for number in itertools.count(begin):
        place = number % count * length
        yield x[:, place : place + length], y[:, place : place + length]


def blocks_of(layers: Sequence[nn.Module], cuts: Sequence[int]) -> list[list[nn.Module]]:
    """Return the layers of each stage."""
    return [list(layers[a:b]) for a, b in itertools.pairwise((0, *cuts, len(layers)))]

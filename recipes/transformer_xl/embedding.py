"""Tokens to vectors; rare tokens may have fewer numbers of their own."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD, PROJECTION_STD = 0.02, 0.01


def cluster_edges(vocabulary: int, cutoffs: Sequence[int]) -> tuple[int, ...]:
    """Return 0, the cutoffs and the size of the vocabulary: cluster i is the tokens from edge i to edge i + 1.

    Raises:
        ValueError: if they do not rise.
    """
    edges = (0, *cutoffs, vocabulary)
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"`cutoffs` must rise and lie between 1 and {vocabulary - 1}, the last token: got {list(cutoffs)} for `vocabulary="
            f"{vocabulary}`. Tokens are in the order of their frequency; leave `cutoffs` out for a plain softmax."
        )
    return edges


class TokenEmbedding(nn.Module):
    """Embedding tables by frequency, projected to ``d_model``, times its square root, and a dropout.

    With ``div_val=1`` there is one table; with more, cluster i has ``d_embed // div_val**i`` numbers a token.

    Args:
        vocabulary: number of tokens, the most frequent first where there are cutoffs.
        d_model: numbers of the result.
        d_embed: numbers of a frequent token.
        cutoffs: first tokens of the second cluster and those after.
        div_val: by what clusters shrink.
        dropout: of the result.

    Attributes:
        tables: one, or one a cluster.
        projections: ``(d_model, numbers)`` for each table; none where there is one table with ``d_embed = d_model``.

    Source: arXiv:1901.02860, authors' code.
    """

    def __init__(
        self, vocabulary: int, d_model: int, d_embed: int, cutoffs: Sequence[int], div_val: int, dropout: float
    ) -> None:
        super().__init__()
        self.d_model, self.edges = d_model, cluster_edges(vocabulary, cutoffs)
        if div_val == 1:
            shapes = [(vocabulary, d_embed)]
        else:
            shapes = [(b - a, d_embed // div_val**i) for i, (a, b) in enumerate(itertools.pairwise(self.edges))]
        if shapes[-1][1] < 1:
            raise ValueError(
                f"`div_val` leaves nothing of the last cluster: got {div_val} for `d_embed={d_embed}` and {len(shapes)} "
                f"clusters. Use at most {int(d_embed ** (1 / (len(shapes) - 1)))}, or fewer `cutoffs`."
            )
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        projected = div_val > 1 or d_embed != d_model
        self.projections = nn.ParameterList(
            nn.Parameter(torch.empty(d_model, width)) for _, width in (shapes if projected else [])
        )
        self.dropout = nn.Dropout(dropout)
        for table in self.tables:
            nn.init.normal_(table, 0.0, INIT_STD)
        for projection in self.projections:
            nn.init.normal_(projection, 0.0, PROJECTION_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return vectors ``(B, T, d_model)`` for int64 tokens ``(B, T)``."""
        if len(self.tables) == 1:
            found = F.embedding(tokens, self.tables[0])
            if len(self.projections):
                found = F.linear(found, self.projections[0])
        else:
            found = self._by_cluster(tokens.flatten()).view(*tokens.shape, self.d_model)
        scaled: Tensor = self.dropout(found * self.d_model**0.5)
        return scaled

    def _by_cluster(self, tokens: Tensor) -> Tensor:
        parts, order = [], []
        for i, (table, projection) in enumerate(zip(self.tables, self.projections, strict=True)):
            # A cluster without tokens takes part with none, so that its parameters get a gradient of 0 on every rank.
            places = ((tokens >= self.edges[i]) & (tokens < self.edges[i + 1])).nonzero().squeeze(1)
            parts.append(F.linear(F.embedding(tokens[places] - self.edges[i], table), projection))
            order.append(places)
        return torch.cat(parts)[torch.cat(order).argsort()]

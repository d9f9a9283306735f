"""The head: probabilities of the next token, rare tokens by way of their cluster.

    log p(token t) = log p0(t)                           t in the first cluster
                   = log p0(cluster i) + log p_i(t)      t in cluster i

p0 is a softmax over the first cluster's tokens and one entry for every other cluster.

Source: arXiv:1609.04309 (adaptive softmax), arXiv:1901.02860's code (ties and projections).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.transformer_xl.embedding import INIT_STD, PROJECTION_STD, TokenEmbedding


class AdaptiveSoftmax(nn.Module):
    """Mean negative log-likelihood of the next tokens; a plain softmax where there is one cluster.

    Which tables and clusters there are is the embedding's; what is tied is the very same parameter as in the embedding, so it
    learns from both sides.

    Args:
        embedding: whose clusters, and, as far as tied, parameters are used.
        tie_weight: use the embedding's tables as weights.
        tie_projections: for each cluster, use the embedding's projection.

    Attributes:
        weights: one table, or one a cluster.
        biases: one a table.
        cluster_weight: rows of p0 for the clusters after the first, in their order; with
        cluster_bias: their biases.
        projections: as the embedding's, for each cluster; none where there are none there.
    """

    def __init__(self, embedding: TokenEmbedding, tie_weight: bool, tie_projections: Sequence[bool]) -> None:
        super().__init__()
        self.edges = embedding.edges
        clusters = len(self.edges) - 1
        if len(tie_projections) != clusters:
            raise ValueError(
                f"`tie_projs` must have one entry a cluster: got {len(tie_projections)} for {clusters} clusters. Write for "
                f"example {[False] + [True] * (clusters - 1)}."
            )
        tables = [table if tie_weight else nn.Parameter(torch.empty_like(table)) for table in embedding.tables]
        self.weights = nn.ParameterList(tables)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(len(table))) for table in tables)
        if clusters > 1:
            self.cluster_weight = nn.Parameter(torch.empty(clusters - 1, tables[0].shape[1]))
            self.cluster_bias = nn.Parameter(torch.zeros(clusters - 1))
            nn.init.normal_(self.cluster_weight, 0.0, INIT_STD)
        theirs = list(embedding.projections)
        if theirs:
            theirs = theirs * clusters if len(theirs) == 1 else theirs
            made = [
                p if tied else nn.Parameter(torch.empty_like(p))
                for p, tied in zip(theirs, tie_projections, strict=True)
            ]
            self.projections = nn.ParameterList(made)
            for projection, tied in zip(made, tie_projections, strict=True):
                if not tied:
                    nn.init.normal_(projection, 0.0, PROJECTION_STD)
        else:
            self.projections = nn.ParameterList()
        if not tie_weight:
            for table in tables:
                nn.init.normal_(table, 0.0, INIT_STD)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all tokens, in nats.

        Args:
            hidden: ``(B, T, d_model)``.
            target: next tokens, int64 ``(B, T)``.
        """
        hidden, target = hidden.flatten(0, 1), target.flatten()
        if len(self.edges) == 2:
            return F.cross_entropy(self._logits(0, hidden), target)
        head = self._logits(0, hidden).log_softmax(dim=1)
        first = self.edges[1]
        inside = target < first
        # Column of p0: the token itself, or that of its cluster.
        column = torch.bucketize(target, torch.tensor(self.edges[1:-1], device=target.device), right=True)
        entry = torch.where(inside, target, first + column - 1)
        total = head.gather(1, entry[:, None]).sum()
        for i in range(1, len(self.edges) - 1):
            # Clusters without targets take part with none, so that their parameters get a gradient of 0 on every rank.
            places = (column == i).nonzero().squeeze(1)
            tail = self._logits(i, hidden[places]).log_softmax(dim=1)
            total = total + tail.gather(1, (target[places] - self.edges[i])[:, None]).sum()
        return -total / len(target)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Return the log-probabilities of all tokens, ``(N, vocabulary)``, for hidden states ``(N, d_model)``."""
        head = self._logits(0, hidden).log_softmax(dim=1)
        first = self.edges[1]
        parts = [head[:, :first]]
        for i in range(1, len(self.edges) - 1):
            tail = self._logits(i, hidden).log_softmax(dim=1)
            parts.append(head[:, first + i - 1, None] + tail)
        return torch.cat(parts, dim=1)

    def _logits(self, cluster: int, hidden: Tensor) -> Tensor:
        """Return the logits of a cluster; those of the first one with an entry for each other cluster behind them."""
        if len(self.projections):
            hidden = F.linear(hidden, self.projections[cluster].t())
        start, end = self.edges[cluster], self.edges[cluster + 1]
        if len(self.weights) == 1:
            weight, bias = self.weights[0][start:end], self.biases[0][start:end]
        else:
            weight, bias = self.weights[cluster], self.biases[cluster]
        if cluster == 0 and len(self.edges) > 2:
            weight, bias = torch.cat([weight, self.cluster_weight]), torch.cat([bias, self.cluster_bias])
        return F.linear(hidden, weight, bias)

"""The adaptive softmax and embedding are the plain ones over an assembled matrix; ties are the same parameter."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.transformer_xl.embedding import TokenEmbedding
from recipes.transformer_xl.softmax import AdaptiveSoftmax

V, D = 30, 8
CASES = [
    # d_embed, cutoffs, div_val, tie_weight, tie_projections
    (8, (), 1, True, [True]),
    (8, (), 1, False, [True]),
    (6, (), 1, True, [False]),
    (8, (10, 20), 1, True, [False, True, True]),
    (6, (10, 20), 1, True, [False, True, True]),
    (8, (10, 20), 2, True, [False, True, True]),
    (8, (4, 25), 2, False, [False, False, False]),
]


def made(
    d_embed: int, cutoffs: tuple[int, ...], div_val: int, tie: bool, ties: list[bool]
) -> tuple[TokenEmbedding, AdaptiveSoftmax]:
    torch.manual_seed(0)
    embedding = TokenEmbedding(V, D, d_embed, cutoffs, div_val, 0.0).double()
    head = AdaptiveSoftmax(embedding, tie, ties).double()
    for parameter in (*embedding.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter)
    return embedding, head


def assembled(embedding: TokenEmbedding) -> Tensor:
    """Return all embeddings ``(V, d_model)``."""
    edges = embedding.edges
    if len(embedding.tables) == 1:
        table = embedding.tables[0]
        return (table @ embedding.projections[0].t() if len(embedding.projections) else table) * D**0.5
    parts = zip(embedding.tables, embedding.projections, strict=True)
    whole = torch.cat([table @ projection.t() for table, projection in parts]) * D**0.5
    assert len(whole) == edges[-1]
    return whole


def log_probabilities(head: AdaptiveSoftmax, hidden: Tensor) -> Tensor:
    """Return those of all tokens, from one matrix of logits and a softmax for each cluster."""
    edges = head.edges
    weights = (
        [head.weights[0][a:b] for a, b in itertools.pairwise(edges)] if len(head.weights) == 1 else list(head.weights)
    )
    biases = [head.biases[0][a:b] for a, b in itertools.pairwise(edges)] if len(head.biases) == 1 else list(head.biases)
    projections = list(head.projections) or [torch.eye(D, dtype=hidden.dtype)] * len(weights)
    logits = torch.cat([hidden @ p @ w.t() + b for p, w, b in zip(projections, weights, biases, strict=True)], dim=1)
    if len(weights) == 1:
        return logits.log_softmax(1)
    clusters = hidden @ projections[0] @ head.cluster_weight.t() + head.cluster_bias
    first = torch.cat([logits[:, : edges[1]], clusters], 1).log_softmax(1)
    parts = [first[:, : edges[1]]]
    for i in range(1, len(weights)):
        parts.append(first[:, edges[1] + i - 1, None] + logits[:, edges[i] : edges[i + 1]].log_softmax(1))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_the_assembled_matrix(case: tuple) -> None:
    embedding, head = made(*case)
    tokens, target = torch.randint(V, (3, 5)), torch.randint(V, (3, 5))
    parameters = list(dict.fromkeys([*embedding.parameters(), *head.parameters()]))
    ours = head(embedding(tokens), target)
    probabilities = log_probabilities(head, assembled(embedding)[tokens.flatten()])
    plain = F.nll_loss(probabilities, target.flatten())
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(head.log_prob(embedding(tokens).flatten(0, 1)), probabilities)
    torch.testing.assert_close(probabilities.exp().sum(1), torch.ones(15, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient_even_where_a_cluster_has_no_token(case: tuple) -> None:
    embedding, head = made(*case)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    head(embedding(tokens), tokens).backward()
    assert all(p.grad is not None for p in (*embedding.parameters(), *head.parameters()))


def test_it_is_torchs_adaptive_softmax_where_that_has_a_form_for_it() -> None:
    _, head = made(8, (10, 20), 2, False, [False, False, False])
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(D, V, [10, 20], div_value=2, head_bias=True).double()
    with torch.no_grad():
        # Torch projects no head and has no biases in the tails.
        head.projections[0].copy_(torch.eye(D))
        theirs.head.weight.copy_(torch.cat([head.weights[0], head.cluster_weight]))
        theirs.head.bias.copy_(torch.cat([head.biases[0], head.cluster_bias]))
        for i in (1, 2):
            head.biases[i].zero_()
            theirs.tail[i - 1][0].weight.copy_(head.projections[i].t())
            theirs.tail[i - 1][1].weight.copy_(head.weights[i])
    hidden, target = torch.randn(2, 6, D, dtype=torch.float64), torch.randint(V, (2, 6))
    torch.testing.assert_close(head(hidden, target), theirs(hidden.flatten(0, 1), target.flatten()).loss)
    torch.testing.assert_close(head.log_prob(hidden.flatten(0, 1)), theirs.log_prob(hidden.flatten(0, 1)))


def test_ties_are_the_same_parameter_and_learn_from_both_sides() -> None:
    embedding, head = made(8, (10, 20), 2, True, [False, True, True])
    assert all(a is b for a, b in zip(embedding.tables, head.weights, strict=True))
    tied = [a is b for a, b in zip(embedding.projections, head.projections, strict=True)]
    assert tied == [False, True, True]
    tokens, target = torch.tensor([[3]]), torch.tensor([[5]])
    head(embedding(tokens), target).backward()
    changed = embedding.tables[0].grad.abs().sum(1) > 0
    assert bool(changed[3])
    assert bool(changed[5])


def test_clusters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[10, 30\] for `vocabulary=30`"):
        TokenEmbedding(30, 8, 8, (10, 30), 1, 0.0)
    with pytest.raises(ValueError, match="got 4 for `d_embed=8` and 3 clusters"):
        TokenEmbedding(30, 8, 8, (10, 20), 4, 0.0)
    with pytest.raises(ValueError, match="got 2 for 3 clusters"):
        AdaptiveSoftmax(TokenEmbedding(30, 8, 8, (10, 20), 1, 0.0), True, [True, True])

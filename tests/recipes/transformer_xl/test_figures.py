"""Figures, learning rates and draws."""

from __future__ import annotations

import math

import pytest
import torch

from recipes.transformer_xl import BitsPerCharacter, Perplexity, Sampling, TokenLoss, WarmupCosine
from recipes.transformer_xl.sampling import draw
from recipes.transformer_xl.schedule import warmup_cosine
from tests.ranks import run_ranks


def test_figures_are_means_over_tokens() -> None:
    for kind, wanted in ((TokenLoss, 1.25), (BitsPerCharacter, 1.25 / math.log(2)), (Perplexity, math.exp(1.25))):
        figure = kind()
        figure.update(torch.tensor(1.0), 30)
        figure.update(torch.tensor(2.0), torch.tensor(10.0))
        assert float(figure.compute()) == pytest.approx(wanted)


def _figure_of_rank(rank: int, world: int) -> float:
    figure = TokenLoss()
    figure.update(torch.tensor(float(rank + 1)), 30 - 20 * rank)
    return float(figure.compute())


def test_figures_are_means_over_the_tokens_of_all_processes() -> None:
    assert run_ranks(2, _figure_of_rank) == [1.25, 1.25]


def test_the_rate_rises_and_then_follows_the_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = WarmupCosine(optimizer, steps=10, warmup_steps=4)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == [0.0, 0.5, 1.0, 1.5]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * min(s, 10) / 10) for s in range(4, 12)])
    assert warmup_cosine(0, 10, 0) == 1
    with pytest.raises(ValueError, match="`warmup_steps` must be below `steps`: got 10 of 10"):
        WarmupCosine(optimizer, 10, 10)


def test_draws_follow_temperature_and_top_k() -> None:
    log_prob = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(4000, 3)
    share = lambda *how: draw(log_prob, *how, torch.Generator().manual_seed(0)).bincount(minlength=3) / 4000  # noqa: E731
    assert share(1.0, 0).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert share(0.5, 0).tolist() == pytest.approx([25 / 38, 9 / 38, 4 / 38], abs=0.03)
    assert share(1.0, 2).tolist() == pytest.approx([5 / 8, 3 / 8, 0], abs=0.03)
    assert share(0.0, 0).tolist() == [1, 0, 0]
    assert share(1.0, 1).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "`length` must be an integer >= 1: got 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0: got -1.0"),
        ({"top_k": -2}, "`top_k` must be an integer >= 0: got -2"),
    ],
)
def test_samplings_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)

"""Every row of the table of methods builds and trains."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.methods import METHODS, method, sgd
from lightning_distopt.exchange import Meter
from recipes.resnet.models import CifarResNet
from tests.ranks import run_ranks

_EXTRA = ("updates:topk:0.1", "gradients:random_block:0.1")


def _train(rank: int, world: int) -> dict[str, tuple[torch.Tensor, float]]:
    found = {}
    for name in (*METHODS, *_EXTRA):
        torch.manual_seed(0)
        model, meter = CifarResNet(1, 10, in_channels=1, width=4), Meter()
        replica = method(name).build(model, sgd(model, 0.01), meter)
        images, labels = torch.randn(4, 1, 8, 8) + rank, torch.tensor([1, 2, 3, 4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's hooks' own
            for _ in range(4):
                replica.step(images, labels)
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()]), meter.seconds["encode"]
    return found


@pytest.fixture(scope="module")
def trained() -> list[dict[str, tuple[torch.Tensor, float]]]:
    return run_ranks(2, _train)


@pytest.mark.parametrize("name", [*METHODS, *_EXTRA])
def test_replicas_stay_alike_unless_they_do_not_communicate(
    trained: list[dict[str, tuple[torch.Tensor, float]]], name: str
) -> None:
    one, other = (rank[name][0] for rank in trained)
    assert one.isfinite().all()
    assert torch.equal(one, other) == (name != "none")


@pytest.mark.parametrize("name", METHODS)
def test_our_methods_time_their_codec(trained: list[dict[str, tuple[torch.Tensor, float]]], name: str) -> None:
    assert (trained[0][name][1] > 0) == (METHODS[name].family in ("16 bit", "ours"))


@pytest.mark.parametrize("name", ["sgn", "gradients:", "updates:nothing"])
def test_an_unknown_method_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="topk"):
        method(name)

"""Optimizer state by name: taken apart by stages, put together as one device would have it; loaders of no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_distopt.strategies.named_optimizer import keep_only, layout_of, load_state, merge_states, own_state
from lightning_distopt.strategies.no_data import NoData


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def grouped(module: nn.Module, make: Callable[..., Any]) -> Any:
    """Weights decay, biases do not: two groups, so numbers are not those of the module's order."""
    named = list(module.named_parameters())
    weights = [p for name, p in named if "weight" in name]
    return make([{"params": weights, "weight_decay": 0.1}, {"params": [p for n, p in named if "bias" in n], "lr": 0.3}])


def stepped(module: nn.Module, optimizer: Any) -> None:
    for value, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        p.grad = torch.full_like(p, float(p.numel() + value * 0))
    optimizer.step()


MAKERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("cuts", [[1], [1, 2]])
def test_parts_make_the_state_of_one_device_and_come_back(make: Callable[..., Any], cuts: list[int]) -> None:
    whole = model()
    alone = grouped(whole, make)
    stepped(whole, alone)
    parts, layout = [], []
    edges = [0, *cuts, 3]
    for begin, end in zip(edges, edges[1:], strict=False):  # noqa: RUF007
        mine = model()
        names = {p: name for name, p in mine.named_parameters()}
        optimizer = grouped(mine, make)
        layout = layout_of(optimizer, names)
        keep_only(optimizer, list(mine[begin:end].parameters()))
        assert len(optimizer.param_groups) == 2
        stepped(mine, optimizer)
        parts.append(own_state(optimizer, names))
    merged, expected = merge_states(parts, layout), alone.state_dict()
    assert merged["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(merged["state"][number][key]), torch.as_tensor(value)), (number, key)
    for ours, theirs in zip(merged["param_groups"], expected["param_groups"], strict=True):
        assert {k: v for k, v in ours.items() if k != "param_names"} == theirs

    alone.load_state_dict(merged)  # loads where all parameters are
    for source in (merged, expected):  # and into the last stage, with names or without
        other = model()
        names = {p: name for name, p in other.named_parameters()}
        optimizer = grouped(other, make)
        layout = layout_of(optimizer, names)
        keep_only(optimizer, list(other[2].parameters()))
        load_state(optimizer, source, names, layout)
        for p in other[2].parameters():
            number = [name for group in layout for name in group].index(names[p])
            for key, value in expected["state"][number].items():
                assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value))
        assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_the_state_of_another_model_is_refused() -> None:
    whole = model()
    names = {p: name for name, p in whole.named_parameters()}
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    saved = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="2 in 1 groups for 6 in 1"):
        load_state(optimizer, saved, names, layout_of(optimizer, names))


def test_no_data_is_as_long_as_the_data() -> None:
    loader = DataLoader(list(range(10)), batch_size=3)
    assert len(NoData(loader)) == 4
    assert list(NoData(loader)) == [()] * 4

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            yield from range(3)

    endless = iter(NoData(DataLoader(Stream())))
    assert [next(endless) for _ in range(5)] == [()] * 5

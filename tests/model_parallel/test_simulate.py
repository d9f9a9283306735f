"""The simulator: the numbers of the specification, plain back-propagation, and equalities between methods."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.model_parallel import StalenessPlan, simulate
from tests.model_parallel.models import batches_of, blocks

SGD = partial(torch.optim.SGD, lr=0.05)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


class Times(nn.Module):
    """One weight: ``y = w x``."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[weight]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def half_square(y: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (y - target).square().sum()


ONE = (torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "after_3", "after_6"),
    [
        ("naive", (0.731136, 1.127501, 2.065712), (0.797320, 1.171079, 2.089692)),
        ("ddg", (0.799405, 1.147336, 2.073940), (0.909683, 1.209968, 2.107566)),
        ("pipedream", (0.799405, 1.147336, 2.073940), (0.909683, 1.209968, 2.107566)),
        ("features_replay", (0.809138, 1.147336, 2.073940), (0.919277, 1.207205, 2.106021)),
        ("dsp", (0.814915, 1.149961, 2.074066), (1.100464, 1.275717, 2.139756)),
        ("dsp(2,2,0;6,3,0)", (0.814915, 1.149961, 2.074066), (1.153058, 1.291209, 2.144635)),
    ],
)
def test_a_chain_of_three_numbers(name: str, after_3: tuple[float, ...], after_6: tuple[float, ...]) -> None:
    for count, expected in ((1, (0.6, 1.05, 2.025)), (3, after_3), (6, after_6)):
        modules = [Times(w) for w in (0.5, 1.0, 2.0)]
        losses = simulate(modules, half_square, [ONE] * count, StalenessPlan.preset(name, 3), SGD)
        assert [float(m.weight.detach()) for m in modules] == pytest.approx(expected, abs=6e-7)
        assert losses[0] == 0.5
        assert len(losses) == count


def run(plan: StalenessPlan, make: Callable[..., Any] = SGD, count: int = 9, **options: Any) -> list[Tensor]:
    modules = blocks(plan.stages)
    simulate(modules, nn.functional.cross_entropy, batches_of(count), plan, make, **options)
    return [p.detach().clone() for m in modules for p in m.parameters()]


def plain(stages: int, make: Callable[..., Any], count: int = 9) -> tuple[list[Tensor], list[float]]:
    """Back-propagation as anybody would write it."""
    model = nn.Sequential(*blocks(stages))
    optimizer, losses = make(model.parameters()), []
    for x, y in batches_of(count):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return [p.detach().clone() for p in model.parameters()], losses


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_naive_is_back_propagation_bit_for_bit(stages: int, make: Callable[..., Any]) -> None:
    expected, losses = plain(stages, make)
    modules = blocks(stages)
    plan = StalenessPlan.preset("naive", stages)
    assert simulate(modules, nn.functional.cross_entropy, batches_of(9), plan, make) == losses
    assert all(torch.equal(p, q) for p, q in zip((p for m in modules for p in m.parameters()), expected, strict=True))


@pytest.mark.parametrize("name", ["ddg", "features_replay", "pipedream", "dsp", "ouroboros"])
def test_one_stage_is_back_propagation(name: str) -> None:
    assert all(map(torch.equal, run(StalenessPlan.preset(name, 1)), plain(1, SGD)[0]))


def test_only_the_sums_of_the_delays_matter() -> None:
    a, b = (run(StalenessPlan((p, p), (q, q))) for p, q in ((1, 1), (0, 2)))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_ddg_is_pipedream(stages: int) -> None:
    make = OPTIMIZERS["momentum"]
    a, b = (run(StalenessPlan.preset(name, stages), make) for name in ("ddg", "pipedream"))
    c = run(StalenessPlan.preset("features_replay", stages), make)
    assert all(map(torch.equal, a, b))
    assert not all(map(torch.equal, a, c))


def test_double_buffering_is_delayed_sgd() -> None:
    plan = StalenessPlan.preset("pipedream_2bw", 3, accumulate=4)
    model = nn.Sequential(*blocks(3))
    old = new = [p.detach().clone() for p in model.parameters()]
    data = list(batches_of(20))
    for group in range(5):
        grads = [torch.zeros_like(p) for p in model.parameters()]
        for p, value in zip(model.parameters(), old, strict=True):
            p.data = value.clone()
        for x, y in data[4 * group : 4 * group + 4]:
            loss = nn.functional.cross_entropy(model(x), y)
            for total, g in zip(grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                total += g / 4
        old, new = new, [w - 0.05 * g for w, g in zip(new, grads, strict=True)]
    for value, expected in zip(run(plan, count=20), new, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddg", "features_replay", "dsp", "pipedream_2bw"])
def test_without_a_learning_rate_every_gradient_is_exact(name: str) -> None:
    """Dropout draws again what it drew, batch norm normalises by the same batch."""
    seen: dict[str, list[list[Tensor]]] = {}

    class Still(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            self.seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]])

    for key, plan in (
        ("exact", StalenessPlan.preset("naive", 3)),
        (name, StalenessPlan.preset(name, 3, accumulate=4) if "2bw" in name else StalenessPlan.preset(name, 3)),
    ):
        made: list[Any] = []

        def make(parameters: Any, made: list[Any] = made) -> Any:
            made.append(Still(parameters, lr=1.0))
            made[-1].seen = []
            return made[-1]

        modules = blocks(3, dropout=0.5, norm=True)
        simulate(modules, nn.functional.cross_entropy, batches_of(8), plan, make)
        seen[key] = [reduce(operator.iadd, o.seen, []) for o in made]
        buffers = [b for m in modules for b in m.buffers()]
        seen[key].append([b.double() for b in buffers])
    if "2bw" in name:
        groups = [
            [(g[i] + g[i + n] + g[i + 2 * n] + g[i + 3 * n]) / 4 for s in (0, 4 * n) for i in range(s, s + n)]
            for g in seen["exact"][:3]
            for n in [len(g) // 8]
        ]
        seen["exact"] = [*groups, seen["exact"][3]]
    for exact, stale in zip(seen["exact"], seen[name], strict=True):
        assert len(exact) == len(stale) > 0
        for a, b in zip(exact, stale, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_schedules_clipping_and_a_short_last_group() -> None:
    """Both act by update: 2 updates for 5 batches in groups of 3."""
    rates: list[float] = []
    plan = StalenessPlan.preset("dsp", 2, accumulate=3)

    class Seen(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            norm = nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])
            assert norm <= 0.1 * (1 + 1e-5)
            super().step()

    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    run(plan, partial(Seen, lr=0.8), count=5, clip=0.1, scheduler=scheduler)
    assert rates == [0.8, 0.8, 0.4, 0.4]


def test_the_loss_may_have_parameters_and_stages_may_pass_tuples() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Any) -> Any:
            x, mask = x if isinstance(x, tuple) else (x, x.detach() > 0)
            return super().forward(x).tanh(), mask

    class Head(nn.Linear):
        def forward(self, output: Any, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(super().forward(output[0]), target)

    torch.manual_seed(1)
    modules, head = [Pair(6, 6).double() for _ in range(3)], Head(6, 4).double()
    before = head.weight.clone()
    losses = simulate(modules, head, batches_of(30), StalenessPlan.preset("dsp", 3), partial(torch.optim.SGD, lr=0.2))
    assert not torch.equal(head.weight, before)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_number_of_modules_must_be_that_of_the_stages() -> None:
    with pytest.raises(ValueError, match="2 for 3 stages"):
        simulate(blocks(2), nn.functional.cross_entropy, [], StalenessPlan.preset("dsp", 3), SGD)

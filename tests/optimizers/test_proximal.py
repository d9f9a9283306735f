"""Each proximal operator is the minimiser that its definition asks for, found by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_distopt.optimizers.proximal import (
    L0,
    L1,
    Box,
    ElasticNet,
    GroupLasso,
    L1Box,
    L1MinusL2,
    NuclearNorm,
    Proximal,
    ProximalStep,
    Zero,
)

SEPARABLE = [
    Zero(), L1(0.7), ElasticNet(0.7, 1.3), Box(-0.5, 0.25), Box(-math.inf, 0.1), L1Box(0.7, -0.5, 0.4), L1Box(0.7, 0.2, 1.0),
    L0(0.4),
]  # fmt: skip
PLANAR = [GroupLasso(0.9, [[0, 1]]), L1MinusL2(0.8, 0.0), L1MinusL2(0.8, 0.5), L1MinusL2(0.8, 1.0)]


def objective(proximal: Proximal, x: Tensor, z: Tensor, step: float) -> float:
    return float(proximal.value(x) + (x - z).square().sum() / (2 * step))


@pytest.mark.parametrize("proximal", SEPARABLE, ids=repr)
def test_a_separable_operator_is_the_best_point_of_a_fine_grid(proximal: Proximal) -> None:
    grid = torch.cat([torch.linspace(-3, 3, 60001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for z in torch.linspace(-2.5, 2.5, 41, dtype=torch.float64):
        for step in (0.3, 1.0):
            values = _pointwise(proximal, grid) + (grid - z).square() / (2 * step)
            mine = proximal(z.view(1), step)
            assert objective(proximal, mine, z.view(1), step) <= float(values.min()) + 1e-9
            if proximal.convex:  # one minimiser only
                assert abs(float(mine) - float(grid[values.argmin()])) <= 1.01e-4


def _pointwise(proximal: Proximal, grid: Tensor) -> Tensor:
    absolute = grid.abs()
    inside = torch.zeros_like(grid)
    if isinstance(proximal, (Box, L1Box)):
        inside = torch.where((grid < proximal.lo) | (grid > proximal.hi), math.inf, 0.0)
    if isinstance(proximal, (L1, L1Box)):
        return proximal.lam * absolute + inside
    if isinstance(proximal, ElasticNet):
        return proximal.lam1 * absolute + proximal.lam2 / 2 * grid.square()
    if isinstance(proximal, L0):
        return proximal.lam * (grid != 0)
    return inside


@pytest.mark.parametrize("proximal", PLANAR, ids=repr)
def test_an_operator_on_two_entries_beats_a_grid_of_the_plane(proximal: Proximal) -> None:
    axis = torch.cat([torch.linspace(-3, 3, 301, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    norm, absolute = (first**2 + second**2).sqrt(), first.abs() + second.abs()
    term = proximal.lam * (norm if isinstance(proximal, GroupLasso) else absolute - proximal.a * norm)
    for z in 2 * torch.randn(40, 2, dtype=torch.float64):
        values = term + ((first - z[0]) ** 2 + (second - z[1]) ** 2) / (2 * 0.9)
        assert objective(proximal, proximal(z, 0.9), z, 0.9) <= float(values.min()) + 1e-12


def test_the_nuclear_norms_operator_meets_the_optimality_condition() -> None:
    z, lam, step = torch.randn(6, 4, dtype=torch.float64) * 2, 5.0, 0.7
    x = NuclearNorm(lam)(z, step)
    subgradient = (z - x) / (step * lam)  # must be U V' + W with |W| <= 1, W orthogonal to both spaces
    u, sigma, v = torch.linalg.svd(x, full_matrices=False)
    rank = int((sigma > 1e-10).sum())
    assert 0 < rank < 4
    u, v = u[:, :rank], v[:rank]
    rest = subgradient - u @ v
    assert torch.linalg.matrix_norm(rest, 2) <= 1 + 1e-9
    assert (u.T @ rest).abs().max() < 1e-9
    assert (rest @ v.T).abs().max() < 1e-9
    assert NuclearNorm(lam).value(z) == pytest.approx(lam * np.linalg.norm(z.numpy(), "nuc"))


def test_the_nuclear_norms_operator_is_found_by_a_minimiser_over_factors() -> None:
    """The nuclear norm of A B is the least of (|A|^2 + |B|^2) / 2 over factors, which is smooth."""
    z, lam, step = torch.randn(5, 3, dtype=torch.float64) * 2, 1.5, 0.7
    factors = [
        torch.randn(5, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 3, dtype=torch.float64, requires_grad=True),
    ]
    search = torch.optim.LBFGS(
        factors, max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        a, b = factors
        loss = lam / 2 * (a.square().sum() + b.square().sum()) + (a @ b - z).square().sum() / (2 * step)
        loss.backward()
        return loss

    search.step(closure)
    found = (factors[0] @ factors[1]).detach()
    assert torch.allclose(NuclearNorm(lam)(z, step), found, atol=1e-5)


def test_values_known_by_hand() -> None:
    assert L1(1.0)(torch.tensor([3.0, -0.5, 1.0]), 1.0).tolist() == [2.0, 0.0, 0.0]
    group = GroupLasso(2.0, [[0, 1]])(torch.tensor([3.0, 4.0], dtype=torch.float64), 1.0)
    assert group.tolist() == pytest.approx([1.8, 2.4])
    assert ElasticNet(1.0, 1.0)(torch.tensor([3.0, -0.5]), 1.0).tolist() == [1.0, 0.0]


def test_groups_can_be_written_in_four_ways() -> None:
    z = torch.randn(3, 2, dtype=torch.float64)
    rows = GroupLasso(0.5, "rows")(z, 1.0)
    assert torch.allclose(GroupLasso(0.5, [[0, 1], [2, 3], [4, 5]])(z, 1.0), rows)
    assert torch.allclose(GroupLasso(0.5, [0, 0, 1, 1, 2, 2])(z, 1.0), rows)
    assert torch.allclose(GroupLasso(0.5, torch.tensor([0, 0, 1, 1, 2, 2]))(z, 1.0), rows)
    assert torch.allclose(GroupLasso(0.5, "columns")(z.T.contiguous(), 1.0), rows.T)
    assert torch.equal(GroupLasso(9.0, [[0, 1]])(z, 1.0)[1:], z[1:])  # in no group: left alone
    assert GroupLasso(1.0, [[0, 1]])(torch.zeros(2), 1.0).tolist() == [0.0, 0.0]


CONVEX = [*(p for p in SEPARABLE if p.convex), GroupLasso(0.9, [[0, 2], [1, 3]])]


@pytest.mark.parametrize("proximal", CONVEX, ids=repr)
@settings(max_examples=25, deadline=None)
@given(x=st.lists(st.floats(-9, 9), min_size=4, max_size=4), y=st.lists(st.floats(-9, 9), min_size=4, max_size=4))
def test_convex_operators_are_firmly_non_expansive(proximal: Proximal, x: list[float], y: list[float]) -> None:
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    apart = proximal(a, 0.6) - proximal(b, 0.6)
    assert float(apart @ apart) <= float(apart @ (a - b)) + 1e-9


@pytest.mark.parametrize("proximal", [*SEPARABLE, *PLANAR, NuclearNorm(0.3)], ids=repr)
def test_the_argument_is_left_as_it_was(proximal: Proximal) -> None:
    z = torch.randn(1, 2)
    before = z.clone()
    assert proximal(z, 0.5).shape == z.shape
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: L1(-1.0), ("`lam`", "-1.0")),
        (lambda: L1(math.nan), ("`lam`", "nan")),
        (lambda: Box(1.0, 0.0), ("lo=1.0", "hi=0.0")),
        (lambda: GroupLasso(1.0, [[0, 1], [1, 2]]), ("`groups`", "twice")),
        (lambda: GroupLasso(1.0, "layers"), ("'layers'",)),
        (lambda: GroupLasso(1.0, [[0, 5]])(torch.zeros(3), 1.0), ("5", "3 entries")),
        (lambda: GroupLasso(1.0, "rows")(torch.zeros(3), 1.0), ("(3,)",)),
        (lambda: NuclearNorm(1.0)(torch.zeros(3), 1.0), ("(3,)",)),
        (lambda: L1MinusL2(1.0, 2.0), ("`a`", "2.0")),
        (lambda: L1(1.0)(torch.zeros(3), 0.0), ("`step`", "0.0")),
    ],
)
def test_bad_values_are_named(make: object, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        make()  # type: ignore[operator]
    assert all(word in str(error.value) for word in words), error.value


def test_proximal_step_is_proximal_sgd() -> None:
    model = nn.Linear(5, 1, dtype=torch.float64)
    by_hand = [p.detach().clone() for p in model.parameters()]
    optimizer = ProximalStep(torch.optim.SGD(model.parameters(), lr=0.2), L1(0.1))
    inputs, targets = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    for _ in range(5):
        model.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        for mine, parameter in zip(by_hand, model.parameters(), strict=True):
            mine -= 0.2 * parameter.grad
            mine.copy_(mine.sign() * (mine.abs() - 0.2 * 0.1).clamp(min=0))
        optimizer.step()
    for mine, parameter in zip(by_hand, model.parameters(), strict=True):
        assert torch.allclose(mine, parameter, rtol=0, atol=1e-14)


def test_proximal_step_shares_rates_and_state_with_its_optimizer() -> None:
    parameters = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "proximal": Box(-0.1, 0.1)}]
    optimizer = ProximalStep(torch.optim.Adam(groups, lr=0.1), L1(100.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in parameters)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.05
    assert parameters[0].abs().max() == 0
    assert parameters[1].abs().max() <= 0.1
    state = optimizer.state_dict()
    assert "proximal" not in state["param_groups"][1]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert isinstance(optimizer.param_groups[1]["proximal"], Box)


def test_proximal_step_checks_its_arguments() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="`proximal`"):
        ProximalStep(torch.optim.SGD([parameter], lr=0.1), 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`optimizer`"):
        ProximalStep([parameter], L1(0.1))  # type: ignore[arg-type]

"""Estimators against functions whose estimates are known exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_distopt.zeroth_order import CoordinateEstimator, Estimator, GaussianEstimator, SphereEstimator
from tests.zeroth_order.problems import FORMS, Problem, draw


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def estimate(problem: Problem, estimator: Estimator, form: str, samples: int, smoothing: float | None = None) -> Tensor:
    found, _ = estimator.mean(problem.ask(form), draw(samples), smoothing)
    return found.slice(0, sum(p.numel() for p in problem.params), torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("central", [True, False])
def test_coordinates_are_exact_for_linear_functions(form: str, central: bool) -> None:
    g = random(8, 5)
    problem = Problem(lambda x, i: g[i] @ x, random(2, 2), random(1))
    found = estimate(problem, CoordinateEstimator(central), form, 8)
    assert torch.allclose(found, g.mean(0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 10.0])
def test_coordinates_are_exact_for_quadratics_at_every_smoothing(smoothing: float) -> None:
    h, x = random(5, 5), random(5)
    problem = Problem(lambda x, i: 0.5 * ((h @ x) ** 2).sum(-1).expand(len(i)), x)
    assert torch.allclose(estimate(problem, CoordinateEstimator(), "closure", 3, smoothing), h.T @ h @ x, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("central", "expected"), [(True, [3.01, 12.01]), (False, [3.31, 12.61])])
def test_coordinates_on_a_cubic(form: str, central: bool, expected: list[float]) -> None:
    problem = Problem(lambda x, i: (x**3).sum().expand(i.shape), torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert estimate(problem, CoordinateEstimator(central), form, 2, 0.1).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimator", "second"),
    [(GaussianEstimator(sharing="per_example"), 12.0), (SphereEstimator(sharing="per_example"), 10.0)],
)
def test_random_directions_have_the_known_moments_on_a_linear_function(estimator: Estimator, second: float) -> None:
    g, n = random(10), 20_000
    problem = Problem(lambda x, i: (x @ g).expand(i.shape), random(10))
    scalars, keys, _ = estimator.rows(problem.ask("objective"), draw(n), None)  # type: ignore[misc]
    from lightning_distopt.compressors.randomness import normals

    each = scalars * normals(keys[:, 0], 0, 10).double()
    assert (each.mean(0) - g).norm() < 5 * g.norm() * (second / n) ** 0.5  # five standard errors
    assert float(each.square().sum(1).mean() / g.square().sum()) == pytest.approx(second, rel=0.05)


def test_a_gaussian_estimate_is_unbiased_on_a_quadratic() -> None:
    h, x, n = random(4, 4), random(4), 40_000
    problem = Problem(lambda x, i: 0.5 * ((h @ x) ** 2).sum(-1).expand(i.shape), x)
    found = estimate(problem, GaussianEstimator(sharing="per_example"), "objective", n, 0.5)
    exact = h.T @ h @ x
    assert (found - exact).norm() < 0.1 * (exact.norm() + (h.T @ h).norm())


@pytest.mark.parametrize("estimator", [GaussianEstimator, SphereEstimator])
@pytest.mark.parametrize("sharing", ["per_example", "per_batch"])
@pytest.mark.parametrize("central", [True, False])
def test_both_ways_to_ask_give_the_same(estimator: type[GaussianEstimator], sharing: str, central: bool) -> None:
    g = random(6, 7)
    problem = Problem(lambda x, i: torch.sin((g[i] * x).sum(-1)), random(2, 3), random(1))
    chosen = estimator(3, sharing, central)  # type: ignore[arg-type]
    a, b = (estimate(problem, chosen, form, 6) for form in FORMS)
    assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    rows, keys, _ = chosen.rows(problem.ask("closure"), draw(6), None)
    from lightning_distopt.zeroth_order.directions import combine

    assert keys is not None
    again = combine(keys.reshape(-1), rows.reshape(-1) / 6, 0, 7, torch.float64)
    assert torch.allclose(a, again, rtol=1e-7, atol=1e-9)  # the table's rows have the same mean


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("estimator", "cost"),
    [
        (CoordinateEstimator(), 10),
        (CoordinateEstimator(central=False), 6),
        (GaussianEstimator(), 2),
        (GaussianEstimator(3), 4),
        (GaussianEstimator(3, central=True), 6),
        (SphereEstimator(2, "per_batch"), 3),
    ],
)
def test_queries_are_those_of_the_table(form: str, estimator: Estimator, cost: int) -> None:
    g = random(6, 5)
    problem = Problem(lambda x, i: (g[i] * x).sum(-1), random(5))
    assert estimator.queries(5) == cost
    for found in (estimator.mean, estimator.rows):
        ask = problem.ask(form)
        found(ask, draw(6), None)
        assert ask.count.total == 6 * cost
        assert form == "objective" or problem.asked == 6 * cost
        problem.asked = 0


def test_chunks_of_any_size_give_the_same() -> None:
    g = random(6, 7)
    problem = Problem(lambda x, i: torch.sin((g[i] * x).sum(-1)), random(3, 2), random(1))
    for estimator in (CoordinateEstimator(), GaussianEstimator(5)):
        found = []
        for chunk_bytes in (1, 400, 1 << 20):
            ask = problem.ask("objective")
            ask.chunk_bytes = chunk_bytes  # type: ignore[attr-defined]
            found.append(estimator.mean(ask, draw(6), None)[0].slice(0, 7, torch.float64))
        assert torch.allclose(found[0], found[2], atol=1e-10)
        assert torch.allclose(found[1], found[2], atol=1e-10)


def test_the_error_of_coordinates_falls_and_rises_with_smoothing() -> None:
    a = random(30) / 30**0.5
    x = 0.3 * random(30)
    problem = Problem(lambda x, i: torch.sigmoid(a @ x).expand(len(i)), x)
    s = torch.sigmoid(a @ x)
    exact = s * (1 - s) * a
    errors = [
        float((estimate(problem, CoordinateEstimator(), "closure", 1, h) - exact).norm()) for h in (1e-1, 1e-2, 1e-4)
    ]
    assert errors[0] > 20 * errors[1] > 20 * 100 * errors[2]
    assert float((estimate(problem, CoordinateEstimator(), "closure", 1, 1e-10) - exact).norm()) > 1e3 * errors[2]


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_directions_are_counted_from_one(bad: object) -> None:
    with pytest.raises(ValueError, match="`directions`"):
        GaussianEstimator(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'all'"):
        GaussianEstimator(1, "all")  # type: ignore[arg-type]

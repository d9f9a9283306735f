"""The methods against plain loops written from their equations, and against the specification's regression problem."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_distopt.optimizers.proximal import L1
from lightning_distopt.zeroth_order import (
    CoordinateEstimator,
    Estimator,
    GaussianEstimator,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)
from tests.zeroth_order.problems import sigmoid_problem

N, D, H, LAM = 30, 7, 1e-4, 1e-3


def soft(z: Tensor, threshold: float) -> Tensor:
    return z.sign() * (z.abs() - threshold).clamp(min=0)


def coordinate(f: Any, x: Tensor, i: int) -> Tensor:
    """One component's estimate, one coordinate after the other."""
    out = torch.zeros_like(x)
    for j in range(len(x)):
        e = torch.zeros_like(x)
        e[j] = H
        out[j] = (f(x + e, torch.tensor([i])) - f(x - e, torch.tensor([i])))[0] / (2 * H)
    return out


def walk(method: str, f: Any, batches: list[Tensor], rate: float, m: int) -> Tensor:
    """Plain loops over sections 3.1 to 3.3 of the specification."""
    x = torch.zeros(D, dtype=torch.float64)
    table = [coordinate(f, x, i) for i in range(N)]
    phi = sum(table) / N
    for t, batch in enumerate(batches):
        new = {int(i): coordinate(f, x, int(i)) for i in batch}
        mean = sum(new[int(i)] for i in batch) / len(batch)
        eta = rate
        if method == "sgd":
            v, eta = mean, rate / math.sqrt(t + 1)
        elif method == "svrg":
            if t % m == 0:
                anchor = x.clone()
                full = sum(coordinate(f, anchor, i) for i in range(N)) / N
            v = mean - sum(coordinate(f, anchor, int(i)) for i in batch) / len(batch) + full
        else:
            v = mean - sum(table[int(i)] for i in batch) / len(batch) + phi
            for i, row in new.items():
                phi = phi + (row - table[i]) / N
                table[i] = row
        x = soft(x - eta * v, eta * LAM)
    return x


@pytest.mark.parametrize(("method", "cls"), [("sgd", ZOProxSGD), ("svrg", ZOProxSVRG), ("saga", ZOProxSAGA)])
def test_the_methods_are_the_specifications_loops(method: str, cls: Any) -> None:
    problem, _, _ = sigmoid_problem(N, D)
    optimizer = cls(problem.params, n_samples=N, lr=3.0, proximal=L1(LAM), smoothing=H, inner_steps=4)
    batches = []
    for _ in range(11):
        batches.append(optimizer._batch(method != "saga"))
        optimizer.step(objective=problem.objective)
    assert torch.allclose(problem.flat(), walk(method, problem.f, batches, 3.0, 4), rtol=0, atol=1e-9)


def run(cls: Any, estimator: Estimator, rate: float, steps: int, **arguments: Any) -> tuple[float, float, int]:
    """Return the last objective, the squared gradient mapping with step 0.5 / L, and the queries."""
    problem, a, y = sigmoid_problem()
    optimizer = cls(
        problem.params,
        n_samples=400,
        lr=rate / 0.096,
        proximal=L1(1e-3),
        smoothing=1e-4,
        estimator=estimator,
        **arguments,
    )
    for _ in range(steps):
        optimizer.step(objective=problem.objective)
    x, step = problem.flat(), 0.5 / 0.096
    s = torch.sigmoid(-y * (a @ x))
    gradient = a.T @ (-y * s * (1 - s)) / 400
    mapping = (x - soft(x - step * gradient, step * 1e-3)) / step
    return float(s.mean() + 1e-3 * x.abs().sum()), float(mapping.square().sum()), optimizer.queries


@pytest.mark.slow
def test_the_specifications_regression_problem_keeps_its_orders() -> None:
    coordinates, gauss = CoordinateEstimator(), GaussianEstimator()
    svrg = {rate: run(ZOProxSVRG, coordinates, rate, 420) for rate in (1.0, 1 / 3, 1 / (3 * 30**0.5))}
    saga = run(ZOProxSAGA, coordinates, 1.0, 600)
    sgd = {rate: run(ZOProxSGD, coordinates, rate, 590) for rate in (1.0, 3.0)}
    assert svrg[1.0][2] == 60 * 69_360
    assert saga[2] == 60 * (400 + 32_400)
    assert saga[0] <= svrg[1.0][0] <= sgd[3.0][0]
    assert svrg[1.0][0] < svrg[1 / 3][0] < svrg[1 / (3 * 30**0.5)][0]
    assert saga[1] < svrg[1.0][1] < sgd[3.0][1] < sgd[1.0][1]
    assert 0.1 * 1.1e-6 < saga[1] < 10 * 1.1e-6
    shared, alone, tiny = (
        run(ZOProxSVRG, gauss, 1 / 3, 2100, shared_directions=True),
        run(ZOProxSVRG, gauss, 1 / 3, 2100, shared_directions=False),
        run(ZOProxSVRG, gauss, 1 / 90, 2100),
    )
    assert shared[2] == 300 * 2 * (400 + 2 * 54 * 7)
    assert shared[0] <= alone[0] < tiny[0]
    assert shared[0] < run(ZOProxSGD, gauss, 0.3, 6000)[0]

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_distopt.federated.nesterov import nesterov_step


def run(w: Tensor, gradients, lr, momentum: float) -> list[Tensor]:
    v, path = w, []
    for t, gradient in enumerate(gradients):
        g = gradient(w) if callable(gradient) else gradient
        w, v = nesterov_step(w, v, g, lr(t) if callable(lr) else lr, momentum)
        path.append(w)
    return path


def test_scalar_trace_of_the_specification() -> None:
    path = run(torch.tensor(1.0, dtype=torch.float64), [lambda w: w] * 5, 0.5, 0.9)
    expected = torch.tensor([0.05, -0.4025, -0.404875, -0.20350625, -0.0111371875], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(path), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_constant_rate_is_torchs_nesterov(dtype: torch.dtype, tolerance: float) -> None:
    matrix = torch.randn(7, 7, dtype=dtype)
    matrix = matrix @ matrix.T / 7 + torch.eye(7, dtype=dtype)
    start = torch.randn(7, dtype=dtype)
    ours = run(start, [lambda w: matrix @ w] * 30, 0.2, 0.9)[-1]
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([param], lr=0.2, momentum=0.9, nesterov=True)
    for _ in range(30):
        param.grad = matrix @ param.detach()
        optimizer.step()
    torch.testing.assert_close(ours, param.detach(), rtol=0, atol=tolerance)


def test_scheduled_rate_is_the_displacement_form_and_not_torchs() -> None:
    gradients = list(torch.randn(20, 5, dtype=torch.float64))
    schedule = lambda t: 0.7 * 0.97**t  # noqa: E731
    ours = run(torch.zeros(5, dtype=torch.float64), gradients, schedule, 0.9)[-1]
    w, p = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    param = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD([param], lr=0.7, momentum=0.9, nesterov=True)
    for t, g in enumerate(gradients):
        p = 0.9 * p - schedule(t) * g
        w = w + 0.9 * p - schedule(t) * g
        optimizer.param_groups[0]["lr"] = schedule(t)
        param.grad = g
        optimizer.step()
    torch.testing.assert_close(ours, w, rtol=0, atol=1e-12)
    assert (ours - param.detach()).abs().max() > 1e-2


def test_it_is_not_the_heavy_ball() -> None:
    start = torch.ones(3, dtype=torch.float64)
    ours = run(start, [lambda w: w] * 10, 0.7, 0.9)[-1]
    w, b = start, torch.zeros(3, dtype=torch.float64)
    for _ in range(10):
        b = 0.9 * b + w
        w = w - 0.7 * b
    assert (ours - w).abs().max() > 0.1


def test_without_momentum_it_is_a_plain_step() -> None:
    w, v, g = torch.randn(3, 4)
    new, kept = nesterov_step(w, v, g, 0.3, 0.0)
    assert torch.equal(new, w - 0.3 * g)
    assert torch.equal(kept, new)


def test_constant_displacement_ends_at_one_over_one_minus_momentum() -> None:
    path = run(torch.tensor(0.0, dtype=torch.float64), [torch.tensor(1.0, dtype=torch.float64)] * 400, 0.1, 0.9)
    assert float(path[-1] - path[-2]) == pytest.approx(-1.0, abs=1e-9)
